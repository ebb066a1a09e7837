"""ATI calibration files, and gauge voltages read through a DAQ card."""

from __future__ import annotations

import importlib.util
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from genforce_collect.clock import ClockMapper
from genforce_collect.config import NetftConfig, NidaqConfig
from genforce_collect.devices.ati_calibration import read_calibration
from genforce_collect.devices.nidaq import DaqTask, NidaqSensor
from genforce_collect.devices.wrench import AXES, STATUS_SATURATION, WrenchSample
from genforce_collect.errors import ConfigError, DeviceError

MATRIX = np.arange(36).reshape(6, 6) / 10 - 1.5  # N and N·mm per V


def calibration_file(folder: Path, **replace: str) -> Path:
    """A file as ATI writes them; `replace` swaps text for text."""
    rows = "\n".join(
        f'<UserAxis Name="{name}" values="{" ".join(f"{v:9.5f}" for v in row)} " max="{limit}"/>'
        for name, row, limit in zip(AXES, MATRIX, (12, 12, 17, 120, 120, 120), strict=True)
    )
    text = f"""<?xml version="1.0" encoding="utf-8"?>
<!-- a comment, as ATI puts one here -->
<FTSensor Serial="FT00000" BodyStyle="Nano17" Family="DAQ" NumGages="6" CalFileVersion="1.1">
<Calibration PartNumber="SI-12-0.12" CalDate="1/2/2020" ForceUnits="N" TorqueUnits="N-mm"
 DistUnits="mm" OutputRange="20" OutputBipolar="True">
<Axis Name="Fx" values="9 9 9 9 9 9" max="12" scale="22.7"/>
<BasicTransform Dx="0" Dy="0" Dz="6.096" Rx="0" Ry="0" Rz="0"/>
{rows}
</Calibration>
</FTSensor>"""
    for old, new in replace.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "FT00000.cal"
    path.write_text(text)
    return path


# --- files ------------------------------------------------------------------------------------


def test_voltages_become_newtons_and_newton_metres(tmp_path):
    calibration = read_calibration(calibration_file(tmp_path))
    voltages = np.array([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
    expected = MATRIX @ voltages * [1, 1, 1, 1e-3, 1e-3, 1e-3]
    assert calibration.wrench(voltages) == pytest.approx(expected, abs=1e-9)
    many = np.stack([voltages, 2 * voltages])
    assert calibration.wrench(many) == pytest.approx(np.stack([expected, 2 * expected]), abs=1e-9)
    assert calibration.limits == pytest.approx([12, 12, 17, 0.12, 0.12, 0.12])
    assert calibration.full_scale_v == 10.0
    assert (calibration.serial, calibration.body) == ("FT00000", "Nano17")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('UserAxis Name="Fz"', 'UserAxis Name="Fq"', "UserAxis Fz is missing"),
        ('max="17"', 'max="seventeen"', "UserAxis Fz max: expected a number"),
        ('ForceUnits="N"', 'ForceUnits="pond"', "Calibration ForceUnits: expected one of N,"),
        ('TorqueUnits="N-mm"', "", "Calibration has no attribute TorqueUnits"),
        ('NumGages="6"', 'NumGages="8"', "NumGages is 8"),
        (" -1.50000", "", "UserAxis Fx values: expected 6 numbers"),
        (" -1.50000", "nan", "UserAxis Fx values: expected 6 numbers"),
        ("FTSensor", "Sensor", "root element is Sensor"),
        ("</FTSensor>", "", "not an ATI calibration file"),
    ],
)
def test_a_malformed_file_is_refused_with_file_and_element(tmp_path, old, new, named):
    path = calibration_file(tmp_path, **{old: new})
    with pytest.raises(ConfigError) as refusal:
        read_calibration(path)
    assert str(path) in str(refusal.value)
    assert named in str(refusal.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.cal: No such file"):
        read_calibration(tmp_path / "none.cal")


def test_real_files_agree_with_atis_own_matrix_moved_to_the_user_frame(realdata):
    paths = sorted((realdata / "ati").glob("*.cal"))
    assert paths
    for path in paths:
        calibration = read_calibration(path)
        root = ElementTree.parse(path).getroot()
        axes = root.findall("Calibration/Axis")
        own = np.array(
            [np.array(a.get("values").split(), float) / float(a.get("scale")) for a in axes]
        )
        distance = float(root.find("Calibration/BasicTransform").get("Dz"))
        own[3] += distance * own[1]
        own[4] -= distance * own[0]
        unit = {"N-mm": 1e-3, "N-m": 1.0}[root.find("Calibration").get("TorqueUnits")]
        own[3:] *= unit
        assert calibration.matrix == pytest.approx(own, abs=2e-5)
        assert calibration.full_scale_v == 10.0


# --- the card ---------------------------------------------------------------------------------


class PlayedVoltages:
    """An acquisition that plays voltages at the pace of a real card, then fails if told to."""

    def __init__(self, voltages: np.ndarray, rate_hz: float = 1000.0, blocks: float = np.inf):
        self.voltages, self.rate_hz, self.blocks = voltages, rate_hz, blocks
        self.pace = threading.Event()

    def read(self) -> np.ndarray:
        if self.blocks <= 0:
            raise DeviceError("NI-DAQ card Dev1: the buffer has overrun")
        self.blocks -= 1
        self.pace.wait(10 / self.rate_hz)
        return np.tile(self.voltages, (10, 1))

    def close(self) -> None:
        pass


@pytest.fixture
def config(tmp_path) -> NetftConfig:
    return NetftConfig(host="", nidaq=NidaqConfig(calibration=calibration_file(tmp_path)))


def wait_for(condition, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_a_card_gives_samples_like_the_box_does(config):
    voltages = np.array([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
    samples: list[WrenchSample] = []
    sensor = NidaqSensor(config, samples.append, lambda *_: PlayedVoltages(voltages))
    sensor.start()
    assert wait_for(lambda: len(samples) >= 100)
    assert samples[0].wrench == pytest.approx(sensor.calibration.wrench(voltages))
    tare = sensor.tare(50)
    assert tare.wrench == pytest.approx(sensor.calibration.wrench(voltages))
    assert wait_for(lambda: samples[-1].wrench == pytest.approx(np.zeros(6)))
    sensor.stop()
    assert [sample.seq for sample in samples] == list(range(len(samples)))
    assert np.diff([sample.device_time for sample in samples]) == pytest.approx(1e-3)
    mapper = ClockMapper()
    stamps = [mapper.update(sample.device_time, sample.receive_ns) for sample in samples]
    assert (np.diff(stamps) > 0).all()
    assert sensor.health().lost == 0


def test_a_gauge_at_full_scale_is_reported_as_saturated(config):
    samples: list[WrenchSample] = []
    voltages = np.array([0.0, 0.0, 10.0, 0.0, 0.0, 0.0])
    sensor = NidaqSensor(config, samples.append, lambda *_: PlayedVoltages(voltages))
    sensor.start()
    health = sensor.health()
    sensor.stop()
    assert samples[-1].status == STATUS_SATURATION
    assert not health.usable
    assert "saturated" in health.message


def test_a_card_that_fails_is_reported_and_opened_again(config):
    plays = [PlayedVoltages(np.zeros(6), blocks=5), PlayedVoltages(np.zeros(6))]
    samples: list[WrenchSample] = []
    sensor = NidaqSensor(config, samples.append, lambda *_: plays.pop(0))
    sensor.start()
    assert wait_for(lambda: "overrun" in sensor.health().message)
    assert not sensor.health().usable
    assert wait_for(lambda: len(samples) > 60)
    assert sensor.health().usable
    assert samples[50].seq == 0
    sensor.stop()


def test_without_a_calibration_file_the_cell_is_at_fault(tmp_path):
    missing = NetftConfig(host="", nidaq=NidaqConfig(calibration=tmp_path / "x.cal"))
    with pytest.raises(ConfigError, match=r"x\.cal"):
        NidaqSensor(missing, lambda sample: None)
    with pytest.raises(ConfigError, match=r"netft\.nidaq"):
        NidaqSensor(NetftConfig(host=""), lambda sample: None)


@pytest.mark.skipif(importlib.util.find_spec("nidaqmx") is not None, reason="nidaqmx is here")
def test_without_nidaqmx_the_error_names_the_extra(config):
    with pytest.raises(DeviceError, match=r"requirements/daq\.txt"):
        NidaqSensor(config, lambda sample: None).start()


@pytest.mark.skipif(importlib.util.find_spec("nidaqmx") is None, reason="needs nidaqmx")
def test_without_the_card_or_its_driver_the_error_names_the_card():
    card = NidaqConfig(device="Dev1", calibration=Path("x.cal"))
    with pytest.raises(DeviceError, match="NI-DAQ card Dev1: "):
        DaqTask(card, 1000.0, 10.0)
