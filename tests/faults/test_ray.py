"""Any process of a run on Ray ends, or is asked to: the command that users type, with a Ray of its own, and one cluster of four raylets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.commands import Command
from tests.faults.runs import LONG, LONG_EVERY, LONG_STEPS, Place, Reference, lost, now, plain_environment, same
from tests.faults.table import REPOSITORY, Row, fault

Start = Callable[..., Command]


@pytest.fixture
def start(place: Place) -> Iterator[Start]:
    begun: list[Command] = []

    def one(*more: str, **environment: str) -> Command:
        begun.append(Command(place, *LONG, *more, **environment))
        return begun[-1]

    yield one
    for command in begun:
        command.end()


def begun(place: Place) -> int:
    """The newest checkpoint's step, once there is one."""
    return max(place.steps(), default=0)


def go_on(
    place: Place, start: Start, first: Command, fault_at: float, row: Row, reference: Reference, how: str
) -> None:
    """The same command again: it works at once, ends the run, and nothing of either is left."""
    resumed = begun(place)
    again = start()
    assert again.wait() == 0, again.log.text
    row.steps, row.seconds = lost(first.log, fault_at, resumed, again.log)
    row.same = same(place, reference(*LONG))
    for command in (first, again):
        command.check_nothing_left()
    row.happened = f"{how}; the same command goes on from step {resumed}"


@fault("a worker killed")
def test_worker(place: Place, row: Row, start: Start, reference: Reference) -> None:
    command = start()
    command.wait_for(lambda: begun(place))
    command.members("worker")[-1].kill()
    at = now()
    assert command.wait() == 0, command.log.text
    assert place.manifest().checkpoint.fence == 2
    row.steps, row.seconds = lost(command.log, at, begun(place), command.log)
    reached = max((step for when, step in command.log.steps() if when <= at), default=0)
    row.steps, row.seconds = min(row.steps, LONG_EVERY), None if not reached else row.seconds
    row.same = same(place, reference(*LONG))
    command.check_nothing_left()
    row.happened = "Ray starts the group again, which goes on from its last checkpoint; exit 0"


@fault("the driver killed")
def test_driver(place: Place, row: Row, start: Start, reference: Reference) -> None:
    command = start()
    command.wait_for(lambda: begun(place))
    command.process.kill()
    at = now()
    command.wait()
    go_on(place, start, command, at, row, reference, "its Ray ends with it")


@fault("Ray's part killed", cases=["raylet", "gcs"])
def test_part_of_ray(place: Place, case: str, row: Row, start: Start, reference: Reference) -> None:
    command = start()
    command.wait_for(lambda: begun(place))
    (victim,) = command.members(case)
    victim.kill()
    at = now()
    code = command.wait()
    assert code == 1, command.log.text
    assert "Traceback" not in command.log.text, command.log.text
    go_on(place, start, command, at, row, reference, f"exit 1 after {command.ended - at:.0f} s, in one line")


@fault("the whole machine killed")
def test_machine(place: Place, row: Row, start: Start, reference: Reference) -> None:
    """Driver, keeper and every process of Ray at once, as a power cut: the next command clears what they left."""
    command = start()
    command.wait_for(lambda: begun(place))
    command.process.kill()
    for each in command.members():
        each.kill()
    at = now()
    command.wait()
    row.happened = ""
    resumed = begun(place)
    again = start(TMPDIR=str(command.temporary))
    again.temporary = command.temporary
    assert again.wait() == 0, again.log.text
    row.steps, row.seconds = lost(command.log, at, resumed, again.log)
    row.same = same(place, reference(*LONG))
    again.check_nothing_left()
    row.happened = f"the next command ends what is left of the old Ray and goes on from step {resumed}"


SIGNALS = {
    "SIGTERM to the command": (signal.SIGTERM, False, 143),
    "SIGINT to its group (Ctrl-C)": (signal.SIGINT, True, 130),
}


@fault("asked to stop", cases=SIGNALS, quick=["SIGTERM to the command@folder"])
def test_signals(place: Place, case: str, row: Row, start: Start, reference: Reference) -> None:
    number, group, code = SIGNALS[case]
    command = start()
    before = command.wait_for(lambda: begun(place))
    os.killpg(command.process.pid, number) if group else command.process.send_signal(number)
    at = now()
    assert command.wait() == code, command.log.text
    assert begun(place) > before
    go_on(
        place,
        start,
        command,
        at,
        row,
        reference,
        f"commits a checkpoint and leaves after {command.ended - at:.0f} s, exit {code}",
    )


@fault("ray job stop")
def test_job_stop(place: Place, row: Row, start: Start, reference: Reference) -> None:
    """The request that `ray job stop` makes, for the job of the stage."""
    command = start()
    before = command.wait_for(lambda: begun(place))
    told = re.search(r"Ray dashboard: (\S+) \(asks for the token in (\S+)\)", command.log.text)
    job = re.search(r"train +job (\S+)", command.log.text)
    assert told is not None
    assert job is not None
    token = Path(told.group(2)).read_text()
    request = urllib.request.Request(
        f"{told.group(1)}/api/jobs/{job.group(1)}/stop", b"", {"Authorization": f"Bearer {token}"}
    )
    at = now()
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer) == {"stopped": True}
    assert command.wait() == 1, command.log.text
    assert begun(place) > before
    assert "STOPPED" in command.log.text
    how = (
        f"commits a checkpoint within RAY_JOB_STOP_WAIT_TIME_S; the driver ends with 1 after {command.ended - at:.0f} s"
    )
    go_on(place, start, command, at, row, reference, how)


@fault("a node drained")
def test_drained(place: Place, row: Row, start: Start, reference: Reference) -> None:
    """Four raylets, two ranks: the node of one of them is about to go; another node takes its place."""
    environment = {**plain_environment(), "RAY_AUTH_MODE": "disabled"}
    cluster = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.raylets", "3"], cwd=REPOSITORY, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        address, *nodes = next(line for line in cluster.stdout if ":" in line and "INFO" not in line).split()
        command = start(module="jobs.train", RAY_ADDRESS=address)
        before = command.wait_for(lambda: begun(place))
        import ray

        with ray.init(address=address, log_to_driver=False, logging_level="ERROR"):
            from ray.util.state import list_actors

            used = {
                actor.node_id
                for actor in list_actors(filters=[("state", "=", "ALIVE")])
                if "RayTrainWorker" in actor.class_name
            }
        node = next(each for each in nodes if each in used)
        drain = [
            "ray",
            "drain-node",
            "--address",
            address,
            "--node-id",
            node,
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
        ]
        at = now()
        subprocess.run(
            [*drain, "--reason-message", "maintenance", "--deadline-remaining-seconds", "60"],
            env=environment,
            check=True,
            timeout=60,
        )
        assert command.wait() == 0, command.log.text
        assert place.manifest().checkpoint.fence == 2
        assert before < LONG_STEPS
    finally:
        cluster.stdin.close()
        cluster.wait(60)
    row.happened = "commits a checkpoint within its grace; the group goes on on the nodes that stay; exit 0"
    row.steps, row.seconds = 0, next((when for when, step in command.log.steps() if when > at + 1), at) - at
    row.same = same(place, reference(*LONG))
