from setuptools import find_packages, setup

setup(
    name="genforce_train",
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/genforce_train"]),
        ("share/genforce_train", ["package.xml"]),
    ],
    license="Apache-2.0",
)
