from setuptools import find_packages, setup

NODES = ["force_estimator"]

setup(
    name="genforce_infer",
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/genforce_infer"]),
        ("share/genforce_infer", ["package.xml"]),
    ],
    license="Apache-2.0",
    entry_points={
        "console_scripts": [f"{node} = genforce_infer.nodes.{node}:main" for node in NODES],
    },
)
