"""The virtual cell as its clients see it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import rtde_control
import rtde_receive
import yaml

from genforce_collect.config import CellConfig, load_sensor
from genforce_collect.errors import DeviceError
from genforce_sim import cell as cell_module
from genforce_sim.cell import VirtualCell

pytestmark = pytest.mark.live


@pytest.fixture
def cell(loopback_host: str) -> CellConfig:
    return CellConfig.model_validate(
        {
            "name": "test",
            "robot": {"host": loopback_host, "tcp": [0, 0, 0.12, 0, 0, 0]},
            "netft": {"host": loopback_host, "rdt_port": 30049, "http_port": 8081},
            "camera": {"source": f"http://{loopback_host}:8080/stream.mjpg", "fps": 30},
            "sensor_pose": [0.4, -0.1, 0.2, 0, 0, 0.5],
            "limits": {
                "workspace_min_m": [-0.012, -0.012, -0.005],
                "workspace_max_m": [0.012, 0.012, 0.05],
            },
            "simulation": {"time_scale": 4.0},
        }
    )


@pytest.fixture
def cell_file(cell, tmp_path) -> Path:
    path = tmp_path / "cell.yaml"
    path.write_text(yaml.safe_dump(cell.model_dump(mode="json")))
    return path


def test_a_plain_ur_rtde_script_presses_the_gel(cell, cell_file, tmp_path):
    """Robot down by ur_rtde: the force rises, and only while the tip is in the gel."""
    # In a process of its own: ur_rtde holds the interpreter while it connects.
    command = [sys.executable, "-m", "genforce_sim.cell", "--cell", str(cell_file)]
    process = subprocess.Popen(
        [*command, "--truth", str(tmp_path / "truth.npz")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert cell.robot.host in process.stdout.readline()
        control = rtde_control.RTDEControlInterface(cell.robot.host)
        receive = rtde_receive.RTDEReceiveInterface(cell.robot.host)
        camera = cv2.VideoCapture(cell.camera.source)
        control.setTcp(list(cell.robot.tcp))
        pose = receive.getActualTCPPose()
        pose[2] = cell.sensor_pose[2] - 0.0008
        assert control.moveL(pose, 0.02, 0.1)
        for _ in range(10):  # frames go on, so the world does
            ok, frame = camera.read()
            assert ok
        assert frame.shape == (480, 640, 3)
        camera.release()
        control.stopScript()
        control.disconnect()
        receive.disconnect()
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    with np.load(tmp_path / "truth.npz") as truth:
        times, height, force = truth["time_ns"], truth["tip_pose"][:, 2], truth["wrench"][:, 2]
    assert (force[height < -0.0005] < 0).all()
    assert (force[height > 0.001] == 0).all()
    assert force.min() < -0.3
    assert height[-1] == pytest.approx(-0.0008, abs=1e-5)
    assert (np.diff(times) > 0).all()


def test_the_instance_of_the_sensor_is_that_of_the_cell_file_unless_another_is_asked_for(
    cell: CellConfig, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    monkeypatch.setattr(cell_module, "SolverProcess", lambda *given: asked.append(given[-1]))
    simulation = cell.simulation.model_copy(update={"seed": 7})
    seeded = cell.model_copy(update={"simulation": simulation})
    for seed in (None, 0, 3):
        VirtualCell(seeded, load_sensor("array_1"), "sphere", seed)
    assert asked == [7, 0, 3]


def test_a_second_cell_on_the_same_addresses_is_refused_with_the_address(cell):
    sensor = load_sensor("array_1")
    with (
        VirtualCell(cell, sensor, "sphere", seed=0),
        pytest.raises(DeviceError, match=cell.robot.host),
    ):
        VirtualCell(cell, sensor, "sphere", seed=0).start()


def test_a_cell_that_could_not_start_leaves_its_ports_free(cell):
    sensor = load_sensor("array_1")
    with (
        socket.create_server((cell.netft.host, cell.simulation.camera_port)),
        pytest.raises(DeviceError, match=str(cell.simulation.camera_port)),
    ):
        VirtualCell(cell, sensor, "sphere", seed=0).start()
    with VirtualCell(cell, sensor, "sphere", seed=0):
        pass


def test_a_real_cell_file_is_refused_by_the_command(cell, tmp_path):
    path = tmp_path / "lab.yaml"
    text = (Path(__file__).parents[2] / "launch/config/cells/virtual.yaml").read_text()
    path.write_text(text.split("simulation:")[0])
    done = subprocess.run(
        [sys.executable, "-m", "genforce_sim.cell", "--cell", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "not a virtual one" in done.stderr
