"""Killed at any moment of a save, or out of room in one: the same command goes on from the newest checkpoint that is whole."""

from __future__ import annotations

import signal
from functools import partial

from pipeline.training.commits import step_folder
from tests.faults import harm
from tests.faults.runs import EVERY, RUN, STEPS, Place, Reference, lost, one_line, same
from tests.faults.table import Row, fault

WHOLE = {"right after the manifest"}  # moments at which the hurt save counts
DELETING = "when an old checkpoint is half deleted"


QUICK = [
    "in the last rank's part@s3",
    "right before the manifest@folder",
    "when an old checkpoint is half deleted@s3",
]


@fault("killed in a save", cases=harm.MOMENTS, quick=QUICK)
def test_killed_in_a_save(place: Place, case: str, row: Row, reference: Reference) -> None:
    """All ranks die with the one that gets there."""
    first = place.train(harm=partial(harm.killed_in_save, case))
    assert -signal.SIGKILL in first.wait()
    hurt = 2 * EVERY + EVERY if case == DELETING else 2 * EVERY
    resumed = hurt if case in WHOLE or case == DELETING else hurt - EVERY
    assert place.steps()[-1] == resumed
    again = place.train()
    assert again.wait() == [0, 0], again.log.text
    row.steps, row.seconds = lost(first.log, first.ended, resumed, again.log)
    row.same = same(place, reference())
    assert place.steps() == [STEPS - EVERY, STEPS]
    assert place.storage.list(step_folder(RUN, EVERY)) == []
    row.happened = f"goes on from step {resumed}"


@fault("disk full on one rank")
def test_disk_full(place: Place, row: Row, reference: Reference) -> None:
    """On S3 the server has no room for that rank's part."""
    if place.proxy is not None:
        place.proxy.rule = lambda method, path: (
            "507" if method != "GET" and f"{2 * EVERY:08d}" in path and "__1_0" in path else ""
        )
    first = place.train(harm=harm.disk_full if place.proxy is None else None)
    assert first.wait() == [1, 1], first.log.text
    said = one_line(first.log.text)
    assert "__1_0.distcp" in said
    assert "No space left" in said or "XMinioStorageFull" in said or "free drive threshold" in said
    assert place.steps() == [EVERY]
    if place.proxy is not None:
        place.proxy.rule = lambda method, path: ""
    again = place.train()
    assert again.wait() == [0, 0], again.log.text
    row.steps, row.seconds = lost(first.log, first.ended, EVERY, again.log)
    row.same = same(place, reference())
    row.happened = f"refused in one line with the part's name, exit 1; with room again it goes on from step {EVERY}"
