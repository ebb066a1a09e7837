"""ATI calibration files (`.cal`): six gauge voltages → wrench.

A file belongs to one transducer, by serial number. Its `UserAxis` elements are the rows of the
matrix; the `Axis` elements are ATI's own, scaled and in another frame, and are not read.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genforce_collect.devices.wrench import AXES, NEWTON_METERS, NEWTONS
from genforce_collect.errors import ConfigError


@dataclass(frozen=True)
class GaugeCalibration:
    """One transducer: its matrix and its ranges, in SI."""

    serial: str
    body: str
    part_number: str
    date: str  # as ATI writes it
    matrix: np.ndarray  # (6, 6) float64: N and N·m per V
    limits: np.ndarray  # (6,) float64: rated |wrench| (N, N·m)
    full_scale_v: float  # |gauge voltage| at which the amplifier saturates

    def wrench(self, voltages: np.ndarray) -> np.ndarray:
        """Gauge voltages (..., 6) in V → wrench (..., 6) in N and N·m, transducer frame.

        Absolute only after a tare: gauges have an offset of their own.
        """
        return np.asarray(voltages, dtype=np.float64) @ self.matrix.T


def read_calibration(path: str | Path) -> GaugeCalibration:
    """Read a `.cal` file. Raises `ConfigError` naming the file and the element at fault."""
    path = Path(path)
    try:
        sensor = ElementTree.parse(path).getroot()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # and unknown encodings
        raise ConfigError(f"{path}: not an ATI calibration file: {error}") from error
    if sensor.tag != "FTSensor":
        raise ConfigError(f"{path}: root element is {sensor.tag}, expected FTSensor")
    gauges = _attribute(path, sensor, "NumGages")
    if gauges != "6":
        raise ConfigError(f"{path}: FTSensor NumGages is {gauges}, only 6 gauges are supported")
    calibration = sensor.find("Calibration")
    if calibration is None:
        raise ConfigError(f"{path}: element Calibration is missing")

    rows, limits = [], []
    axes = {axis.get("Name"): axis for axis in calibration.findall("UserAxis")}
    for name in AXES:
        if name not in axes:
            raise ConfigError(f"{path}: element UserAxis {name} is missing")
        rows.append(_numbers(path, axes[name], "values", 6))
        limits += _numbers(path, axes[name], "max", 1)
    si = np.repeat(
        [
            _unit(path, calibration, "ForceUnits", NEWTONS),
            _unit(path, calibration, "TorqueUnits", NEWTON_METERS),
        ],
        3,
    )
    output_range = _numbers(path, calibration, "OutputRange", 1)[0]
    bipolar = calibration.get("OutputBipolar", "True") == "True"
    return GaugeCalibration(
        serial=_attribute(path, sensor, "Serial"),
        body=sensor.get("BodyStyle", ""),
        part_number=calibration.get("PartNumber", ""),
        date=calibration.get("CalDate", ""),
        matrix=np.array(rows) * si[:, None],
        limits=np.array(limits) * si,
        full_scale_v=output_range / 2 if bipolar else output_range,
    )


def _attribute(path: Path, element: ElementTree.Element, key: str) -> str:
    value = element.get(key)
    if value is None:
        raise ConfigError(f"{path}: {_label(element)} has no attribute {key}")
    return value


def _numbers(path: Path, element: ElementTree.Element, key: str, count: int) -> list[float]:
    text = _attribute(path, element, key)
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        expected = "a number" if count == 1 else f"{count} numbers"
        raise ConfigError(f"{path}: {_label(element)} {key}: expected {expected}, found {text!r}")
    return numbers


def _unit(path: Path, element: ElementTree.Element, key: str, known: dict[str, float]) -> float:
    name = _attribute(path, element, key)
    if name not in known:
        raise ConfigError(
            f"{path}: {_label(element)} {key}: expected one of {', '.join(known)}, found {name!r}"
        )
    return known[name]


def _label(element: ElementTree.Element) -> str:
    return " ".join(filter(None, (element.tag, element.get("Name"))))
