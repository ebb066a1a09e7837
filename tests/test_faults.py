"""Faults of the processes of a collection, on the whole graph: whatever is killed, and whenever, no
finished contact is lost and a resumed run makes the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import rclpy
import yaml
from rclpy.executors import SingleThreadedExecutor

from genforce_collect.bags import BagReader, session_bags
from genforce_collect.nodes.common import LATCHED_QOS, NAMESPACE, spin_until
from genforce_collect.trajectory import Phase
from genforce_collect.verification import verify
from genforce_msgs.msg import Contact

PATIENCE_S = 120.0  # a test that waits this long has failed, however busy the machine
PLAN = "speed_mm_s: 2.0\nstep_z_mm: 0.5\n"  # seconds in the gel, so that a kill falls in there
RESUMES = 4
KILLED_IN_TURN = ("robot", "netft", "recorder", "indenter", "virtual_cell")
IN_GEL = {Phase.NORMAL_INC, Phase.SHEAR_INC, Phase.SHEAR_DEC, Phase.NORMAL_DEC}
TORN_S = 1.0  # what a kill may cost

pytestmark = pytest.mark.live


class Collection:
    """`genforce collect` as a process, and a listener of what it announces."""

    def __init__(self, cell: Path, bag: Path) -> None:
        self._cell, self._bag = cell, bag
        self._plan = bag.with_name("plan.yaml")
        self._plan.write_text(PLAN)
        self.phases: list[Phase] = []
        self._done_at = 0.0
        self._family: dict[psutil.Process, list[str]] = {}  # what nothing is to be left of
        self.process: subprocess.Popen[str] | None = None

    def _note(self, message: Contact) -> None:
        self.phases.append(Phase(message.phase))
        if self.phases[-1] == Phase.DONE:
            self._done_at = time.monotonic()

    def _listen(self) -> None:
        """A participant of DDS for each run: one that remembers killed ones may be late to find
        those that follow them."""
        self._deafen()
        rclpy.init()
        self._node = rclpy.create_node(f"listener_{os.getpid()}", namespace=NAMESPACE)
        self._node.create_subscription(Contact, "contact", self._note, LATCHED_QOS)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)

    def _deafen(self) -> None:
        if rclpy.ok():
            self._executor.shutdown()
            self._node.destroy_node()
            rclpy.shutdown()

    def start(self, contacts: int) -> None:
        self._listen()
        self.phases.clear()
        words = ("--plan", str(self._plan), "--contacts", str(contacts), "--resume")
        self.process = collect(self._cell, self._bag, *words)

    def spin(self, done: Callable[[], bool]) -> bool:
        return spin_until(self._executor, done, PATIENCE_S)

    def in_contact(self, number: int) -> None:
        """Wait until so many contacts are done, for more than `TORN_S`, and the next one is in the
        gel."""

        def reached() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.process.communicate()[0]
            done = self.phases.count(Phase.DONE) >= number
            return (
                done
                and self.phases[-1] in IN_GEL
                and time.monotonic() - self._done_at > 1.2 * TORN_S
            )

        assert self.spin(reached)
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        self._family = {process: process.cmdline() for process in children}

    def kill(self, executable: str) -> None:
        """SIGKILL to one node."""
        assert self.process is not None
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if any(word.endswith(f"/{executable}") for word in process.cmdline()):
                process.kill()
                return
        raise AssertionError(f"no {executable} among the processes")

    def finish(self) -> tuple[int, str]:
        assert self.process is not None
        assert self.spin(lambda: self.process is not None and self.process.poll() is not None)
        text, _ = self.process.communicate()
        _, alive = psutil.wait_procs(self._family, timeout=10)
        assert not alive, [self._family[process] for process in alive]
        return self.process.returncode, text

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.communicate(timeout=60)
        self._deafen()


def collect(cell: Path, bag: Path, *words: str) -> subprocess.Popen[str]:
    """Begun as by a script with `&`, whose shell has it ignore SIGINT."""
    command = (sys.executable, "-m", "genforce_bringup.cli", "collect", "--cell", str(cell))
    return subprocess.Popen(
        [*command, "--out", str(bag), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_IGN),
    )


@pytest.fixture
def collection(fast_cell: Path, tmp_path: Path) -> Iterator[Collection]:
    data = yaml.safe_load(fast_cell.read_text())
    data["simulation"]["time_scale"] = 1.0  # the rates of a real cell
    fast_cell.write_text(yaml.safe_dump(data))
    collection = Collection(fast_cell, tmp_path / "bag")
    yield collection
    collection.close()


def whole(bag: Path) -> list[int]:
    return [index for path in session_bags(bag) for index in verify(path).whole_contacts]


def reasons(bag: Path) -> list[str]:
    """Why contacts of the newest run are not whole."""
    return [c.reason for c in verify(session_bags(bag)[-1]).contacts if not c.whole]


def complete(collection: Collection, bag: Path, contacts: int) -> None:
    """Resume until the plan is whole; a starved machine may break a contact twice in a run."""
    for _ in range(RESUMES):
        if sorted(whole(bag)) == list(range(contacts)):
            return
        collection.start(contacts)
        code, text = collection.finish()
    assert sorted(whole(bag)) == list(range(contacts)), (code, text)


def test_a_killed_camera_or_segmenter_comes_back_and_its_contact_is_repeated(collection, tmp_path):
    collection.start(5)
    for number, executable in enumerate(("camera", "segmenter")):
        collection.in_contact(number + 1)
        collection.kill(executable)
        killed_at = len(collection.phases)
    collection.finish()
    log = (tmp_path / "bag.log").read_text()
    assert "camera died (exit code -9): starting it again" in log
    assert "segmenter died (exit code -9): starting it again" in log
    assert Phase.INVALID in collection.phases
    assert Phase.DONE in collection.phases[killed_at:], "it went on"


@pytest.mark.timeout(900)
def test_whichever_node_is_killed_the_plan_is_whole_after_resuming(collection, tmp_path):
    bag = tmp_path / "bag"
    total = len(KILLED_IN_TURN) + 1
    for number, executable in enumerate(KILLED_IN_TURN):
        before = whole(bag)
        collection.start(total)
        collection.in_contact(1)
        collection.kill(executable)
        killed_ns = time.time_ns()
        code, text = collection.finish()
        assert code != 0, text
        log = (tmp_path / "bag.log").read_text()
        assert log.index("indenter ended") < log.index("recorder ended"), "it waits for nobody dead"
        now = whole(bag)
        assert set(now) >= set(before)
        assert len(now) == len(set(now)), "what was whole was not made again"
        torn_ns = killed_ns - TORN_S * 1e9
        done = [c for c in verify(session_bags(bag)[-1]).contacts if c.end_ns < torn_ns]
        assert done
        assert not any("ends before" in c.reason for c in done), "what was finished is not torn"
        assert "ended by the operator" not in reasons(bag)
        with BagReader(session_bags(bag)[number]) as reader:
            last_ns = max(record.log_ns for record in reader.raw())
        assert torn_ns < last_ns, f"{executable}: all but the last second is there"
    complete(collection, bag, total)


def test_a_second_collector_is_refused_and_the_first_does_not_notice(
    collection, fast_cell, tmp_path
):
    collection.start(3)
    collection.in_contact(1)
    second = collect(fast_cell, tmp_path / "other", "--contacts", "1")
    text, _ = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 3, text
    assert "driven by another graph" in text
    collection.finish()
    assert not any("began anew" in reason for reason in reasons(tmp_path / "bag"))


def test_ctrl_c_twice_still_closes_the_bag_and_leaves_no_process(collection, tmp_path):
    collection.start(20)
    collection.in_contact(1)
    for _ in range(2):
        collection.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    code, text = collection.finish()
    assert code == 130, text
    assert "repaired" not in verify(tmp_path / "bag").metadata
    assert "ended by the operator" in reasons(tmp_path / "bag")


def test_a_press_beyond_the_force_limit_ends_the_run_tip_out_of_the_gel(
    collection, fast_cell, tmp_path
):
    data = yaml.safe_load(fast_cell.read_text())
    data["limits"]["force_n"] = [8.0, 8.0, 0.5]
    fast_cell.write_text(yaml.safe_dump(data))
    collection.start(5)
    code, text = collection.finish()
    assert code != 0
    assert "3 contacts in a row broke off: force Fz" in text
    bag = tmp_path / "bag"
    assert all("is beyond 0.5 N" in reason for reason in reasons(bag)), reasons(bag)
    with BagReader(bag) as reader:
        *_, last = reader.messages([f"/{NAMESPACE}/robot/tcp_pose"])
    assert last.message.pose.position.z > 0.0019, "clear of the gel"
