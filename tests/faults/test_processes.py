"""Ranks that hang, clocks that jump, and more drivers than one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial

import psutil

from pipeline.training.commits import lease_path, train_folder
from tests.faults import harm
from tests.faults.runs import (
    EVERY,
    LIMIT_S,
    LONG,
    LONG_EVERY,
    RANKS,
    RUN,
    Log,
    Place,
    Reference,
    lost,
    now,
    plain_environment,
    same,
)
from tests.faults.table import REPOSITORY, Row, fault

HELD = 3
SLOW = partial(harm.slow_steps, 1.0)  # a run that others meet at work


@fault("a rank hangs")
def test_a_rank_hangs(place: Place, row: Row, reference: Reference) -> None:
    """Stopped in step 6, as by a dead mount: its peer waits in a collective until the watchdog ends it."""
    limit = 20.0
    first = place.train(f"training.step_timeout_s={limit:g}", harm=partial(harm.hangs, 6))
    assert first.wait()[0] == 1, first.log.text
    folder = f"{train_folder(RUN)}/hangs/step-00000006"
    assert [info.path for info in place.storage.list(folder)] == [f"{folder}/rank-00000.txt"]
    assert "rank 0 hangs in step of step 6" in first.log.text
    assert "no sign of ranks [1]" in first.log.text
    again = place.train()
    assert again.wait() == [0, 0], again.log.text
    began = max(when for when, step in first.log.steps())
    row.steps, row.seconds = lost(first.log, began, EVERY, again.log)
    row.happened = f"ended after {limit:.0f} s (training.step_timeout_s); stacks in storage, the silent rank named; goes on from step {EVERY}"
    row.same = same(place, reference())


@fault("the clock goes back a day")
def test_clock_back(place: Place, row: Row, reference: Reference) -> None:
    """In mid-run, and it stays there for the next start; the ranks' own clock, not the machine's."""
    day = 86_400.0
    first = place.train(
        harm=partial(
            harm.both, partial(harm.clock_back, 6, day), partial(harm.killed_in_save, "right before the manifest")
        )
    )
    assert -signal.SIGKILL in first.wait()
    again = place.train(harm=partial(harm.clock_back, 0, day))
    assert again.wait() == [0, 0], again.log.text
    row.steps, row.seconds = lost(first.log, first.ended, EVERY, again.log)
    row.happened = f"nothing; killed besides it goes on from step {EVERY}"
    row.same = same(place, reference())


MESHES = {
    "equal meshes": ((), RANKS),
    "different meshes": (("parallelism={shard: 1, ep: 1}",), 1),
}
TIMES = 5  # of each case and place: 20 in all


@fault("two drivers at once", cases=MESHES)
def test_two_drivers(place: Place, case: str, row: Row, reference: Reference) -> None:
    """Both begin together; whichever holds the lease first trains, the other one leaves while the first is at work."""
    more, ranks = MESHES[case]
    seconds = 0.0
    for number in range(TIMES):
        run = f"{RUN}-{number}"
        pair = [place.train(f"run_id={run}", harm=SLOW), place.train(f"run_id={run}", *more, harm=SLOW, ranks=ranks)]
        began = now()
        while all(each.alive for each in pair):
            time.sleep(0.1)
        loser, winner = sorted(pair, key=lambda each: each.alive)
        assert set(loser.wait()) == {HELD}, loser.log.text
        seconds += now() - began
        assert f"run {run} is being written by" in loser.log.text
        assert "Traceback" not in loser.log.text
        assert loser.log.reached() == 0
        assert set(winner.wait()) == {0}, winner.log.text
        assert json.loads(place.storage.read(lease_path(run)))["number"] == 1
        expected = reference() if winner is pair[0] else reference(*more, ranks=ranks)
        assert place.manifest(run).checkpoint.content_sha256 == expected.checkpoint.content_sha256
    row.happened = (
        f"{TIMES} times: one trains, the other leaves with exit 3 after {seconds / TIMES:.0f} s and says who trains"
    )
    row.steps, row.same = 0, "yes"


@fault("a suspended driver wakes late")
def test_suspended(place: Place, row: Row, reference: Reference) -> None:
    """Stopped after its first checkpoint; another driver takes over after its silence and ends the run; the first one goes on."""
    patience = "training.step_timeout_s=1000"  # the watchdog's, whose time goes on while the process is suspended
    first = place.train(patience, harm=SLOW)
    first.wait_for(place.steps)
    first.signal(signal.SIGSTOP)
    began, resumed = now(), place.steps()[-1]
    second = place.train()
    assert second.wait() == [0, 0], second.log.text
    row.steps, row.seconds = lost(first.log, began, resumed, second.log)
    row.same = same(place, reference())
    before = contents(place)
    first.signal(signal.SIGCONT)
    assert set(first.wait()) == {HELD}, first.log.text
    assert "nothing more is written" in first.log.text
    assert contents(place) == before
    row.happened = "after 15 s of silence the second goes on; the first wakes, commits nothing and leaves with exit 3"


def contents(place: Place) -> dict[str, bytes]:
    storage = place.storage
    return {info.path: storage.read(info.path) for info in storage.list(train_folder(RUN))}


@fault("a rank killed under torchrun")
def test_torchrun(place: Place, row: Row, reference: Reference) -> None:
    """`torchrun --max-restarts 1`: it starts both ranks again, and they go on."""
    log = Log(place.folder / "torchrun")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={RANKS}",
        "--max-restarts=1",
    ]
    command = [*launcher, "-m", "pipeline.training", *place.training_arguments(*LONG)]
    with log.path.open("w") as out:
        run = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, env=plain_environment())
        while not place.steps():
            assert run.poll() is None, log.text
            time.sleep(0.05)
        ranks = [each for each in psutil.Process(run.pid).children() if "pipeline.training" in " ".join(each.cmdline())]
        ranks[1].kill()
        reached = log.reached()
        assert run.wait(LIMIT_S) == 0, log.text
    (_, again) = [line for line in log.text.splitlines() if line.startswith(f"run {RUN}: ")]
    resumed = int(again.rpartition("after step ")[2])
    assert resumed >= LONG_EVERY
    row.steps, row.seconds = max(reached - resumed, 0), None
    row.happened = f"torchrun starts its ranks again, which go on from step {resumed}; exit 0"
    row.same = same(place, reference(*LONG))
