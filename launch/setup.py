from glob import glob

from setuptools import find_packages, setup

setup(
    name="genforce_bringup",
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/genforce_bringup"]),
        ("share/genforce_bringup", ["package.xml"]),
        ("share/genforce_bringup/launch", glob("*.launch.py")),
        ("share/genforce_bringup/config/cells", glob("config/cells/*.yaml")),
        ("share/genforce_bringup/config/foxglove", glob("config/foxglove/*.json")),
        ("share/genforce_bringup/config/sensors", glob("config/sensors/*.yaml")),
    ],
    license="Apache-2.0",
    # Installed into bin/, which a sourced workspace puts on PATH.
    entry_points={"console_scripts": ["genforce = genforce_bringup.cli:main"]},
)
