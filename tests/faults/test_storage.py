"""Storage that answers with errors, slowly or not at all."""

from __future__ import annotations

import threading
from functools import partial

from tests.faults import harm
from tests.faults.runs import EVERY, Place, Reference, lost, now, one_line, same
from tests.faults.table import Row, fault

AWAY_S = 60.0


@fault("storage answers with errors for 60 s")
def test_errors_for_a_minute(place: Place, row: Row, reference: Reference) -> None:
    """503 SlowDown to every request on S3, which is waited for. A folder's EIO is an answer: the run ends and says so."""
    if place.proxy is None:
        first = place.train(harm=harm.io_error)
        assert set(first.wait()) == {1}, first.log.text
        assert "Input/output error: '" in one_line(first.log.text)
        assert place.steps() == [EVERY]
        again = place.train()
        assert again.wait() == [0, 0], again.log.text
        row.steps, row.seconds = lost(first.log, first.ended, EVERY, again.log)
        row.happened = (
            f"refused in one line with the path, exit 1; when it works again the run goes on from step {EVERY}"
        )
    else:
        proxy = place.proxy
        first = place.train(harm=partial(harm.slow_steps, 0.2))
        first.wait_for(place.steps)
        began, before = now(), first.log.reached()
        proxy.rule = lambda method, path: "503"
        threading.Timer(AWAY_S, lambda: setattr(proxy, "rule", lambda method, path: "")).start()
        assert first.wait() == [0, 0], first.log.text
        back = next(when for when, step in first.log.steps() if step > max(before, EVERY) and when > began + AWAY_S)
        row.steps, row.seconds = 0, back - began
        row.happened = "waits for it and goes on"
    row.same = same(place, reference())


@fault("slow storage")
def test_slow(place: Place, row: Row, reference: Reference) -> None:
    """0.3 s more a request on S3, as much more a write in a folder."""
    if place.proxy is not None:
        place.proxy.delay_s = 0.3
    run = place.train(harm=partial(harm.slow_writes, 0.3) if place.proxy is None else None)
    assert run.wait() == [0, 0], run.log.text
    if place.proxy is not None:
        place.proxy.delay_s = 0.0
    row.happened, row.steps, row.same = (
        "takes longer; the loop waits only for the save before",
        0,
        same(place, reference()),
    )


@fault("storage drops connections", places=["s3"])
def test_dropping(place: Place, row: Row, reference: Reference) -> None:
    """One in eight, before the request, in the answer or after it; one in twenty answers is an error."""
    assert place.proxy is not None
    place.proxy.drop_rate, place.proxy.error_rate = 0.125, 0.05
    run = place.train()
    assert run.wait() == [0, 0], run.log.text
    faults, requests = place.proxy.faults, place.proxy.requests
    place.proxy.drop_rate = place.proxy.error_rate = 0.0
    assert faults > 5
    row.happened, row.steps = f"{faults} of {requests} requests failed and were asked again", 0
    row.same = same(place, reference())
