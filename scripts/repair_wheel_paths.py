"""Point the exported CMake files of the ROS 2 wheels at this Python.

The wheels name the Python and numpy headers of the machine that built them, which makes
`find_package` of every message package fail. Run with the venv's python; prints nothing.
"""

import re
import sys
import sysconfig
from pathlib import Path

import numpy


def main() -> None:
    python_include = sysconfig.get_paths()["include"]
    for file in Path(sys.prefix, "share").rglob("*.cmake"):
        text = file.read_text()
        repaired = re.sub(r'/opt/python/[^;"\s]*/numpy/_core/include', numpy.get_include(), text)
        repaired = re.sub(r'/opt/python/[^;"\s]*/include/python3\.\d+', python_include, repaired)
        if repaired != text:
            file.write_text(repaired)


if __name__ == "__main__":
    main()
