from setuptools import find_packages, setup

setup(
    name="genforce_sim",
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/genforce_sim"]),
        ("share/genforce_sim", ["package.xml"]),
    ],
    license="Apache-2.0",
    entry_points={"console_scripts": ["virtual_cell = genforce_sim.cell:main"]},
)
