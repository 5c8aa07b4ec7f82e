"""Figures that are no numbers, or far from the run's own."""

from __future__ import annotations

import math
from functools import partial

from pipeline.training.commits import train_folder
from tests.faults import harm
from tests.faults.runs import BATCH, EVERY, RUN, STEPS, Place, Reference, lost, one_line, same
from tests.faults.table import Row, fault

VALUES = {"NaN": math.nan, "inf": math.inf}
HORIZON = "training.spikes.horizon_steps=10"
SPIKE_AT = 13
SPIKE = partial(harm.bad_loss, 50.0, SPIKE_AT, SPIKE_AT, 1)


@fault("in one step of one rank", cases=VALUES, quick=["NaN@folder"])
def test_one_step(place: Place, case: str, row: Row, reference: Reference) -> None:
    """The batch is passed over by all ranks; a run that is killed besides ends as one that is not."""
    bad = partial(harm.bad_loss, VALUES[case], 3, 3, 1)
    first = place.train(harm=partial(harm.both, bad, partial(harm.killed_in_save, "right before the manifest")))
    first.wait()
    again = place.train()
    assert again.wait() == [0, 0], again.log.text
    assert place.manifest().skipped_steps == 1
    row.steps, row.seconds = lost(first.log, first.ended, EVERY, again.log)
    row.same = same(place, reference(harm=bad))
    row.happened = "that step changes nothing and is counted"


@fault("in every step of one rank", cases=VALUES)
def test_every_step(place: Place, case: str, row: Row, reference: Reference) -> None:
    """From step 5 on. Three in a row end the run before the next checkpoint; the cause mended, nothing is lost."""
    limit = "training.max_skipped_steps=3"
    first = place.train(limit, harm=partial(harm.bad_loss, VALUES[case], EVERY + 1, STEPS, 1))
    assert first.wait() == [1, 1], first.log.text
    assert "step 7: the last 3 steps had a non-finite loss" in one_line(first.log.text)
    again = place.train(limit)
    assert again.wait() == [0, 0], again.log.text
    row.steps, row.seconds = lost(first.log, first.ended, EVERY, again.log)
    row.same = same(place, reference(limit))
    row.happened = (
        f"refused in one line after training.max_skipped_steps, exit 1; the cause mended it goes on from step {EVERY}"
    )


@fault("a spike that is skipped")
def test_a_spike_is_skipped(place: Place, row: Row, reference: Reference) -> None:
    """`training.spikes.action: skip`; killed in the save after it."""
    settings = (HORIZON, "training.spikes.action=skip", "checkpoint.every_steps=7")
    first = place.train(
        *settings, harm=partial(harm.both, SPIKE, partial(harm.killed_in_save, "right after the manifest"))
    )
    first.wait()
    again = place.train(*settings)
    assert again.wait() == [0, 0], again.log.text
    assert place.manifest().skipped_steps == 1
    assert b'"spikes":1' in place.storage.read(f"{train_folder(RUN)}/metrics/00001000.jsonl")
    row.steps, row.seconds = lost(first.log, first.ended, 14, again.log)
    row.same = same(place, reference(*settings, harm=SPIKE))
    row.happened = "that step changes nothing and is counted"


@fault("a spike that is gone back on")
def test_a_spike_is_gone_back_on(place: Place, row: Row, reference: Reference) -> None:
    """`training.spikes.action: go_back`; killed when that is decided."""
    settings = (HORIZON, "training.spikes.action=go_back")
    bad = partial(harm.bad_data, (SPIKE_AT - 1) * BATCH, 50.0)
    first = place.train(*settings, harm=partial(harm.both, bad, harm.killed_when_it_goes_back))
    first.wait()
    again = place.train(*settings, harm=bad)
    assert again.wait() == [0, 0], again.log.text
    left_out = ((SPIKE_AT - 1) * BATCH, SPIKE_AT * BATCH)
    assert place.manifest().checkpoint.left_out == (left_out,)
    row.steps, row.seconds = lost(first.log, first.ended, SPIKE_AT - 1, again.log)
    row.same = same(place, reference(*settings, harm=bad))
    twin = reference(HORIZON, f"training.skip_sequences=[[{left_out[0]},{left_out[1]}]]")
    assert place.manifest().checkpoint.content_sha256 == twin.checkpoint.content_sha256
    row.happened = (
        f"goes back to step {SPIKE_AT - 1} and leaves that data out, as if training.skip_sequences had said so"
    )
