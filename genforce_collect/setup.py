from setuptools import find_packages, setup

NODES = [
    "robot",
    "netft",
    "camera",
    "segmenter",
    "recorder",
    "indenter",
    "replay",
    "taxels",
    "viewer",
]

setup(
    name="genforce_collect",
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/genforce_collect"]),
        ("share/genforce_collect", ["package.xml"]),
    ],
    package_data={"genforce_collect": ["templates/*.j2"]},
    license="Apache-2.0",
    entry_points={
        "console_scripts": [f"{node} = genforce_collect.nodes.{node}:main" for node in NODES],
    },
)
