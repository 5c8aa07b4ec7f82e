"""Storage that answers with errors, slowly or not at all."""

from __future__ import annotations

from functools import partial

from pipeline.training.commits import manifest_path
from tests.faults import harm
from tests.faults.runs import EVERY, RUN, Place, Reference, lost, now, one_line, same
from tests.faults.table import Row, fault

AWAY_S = 60.0


@fault("storage answers with errors for 60 s", quick=["s3"])
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
        came: list[float] = []  # requests from the first checkpoint's commit on; storage is away from the second on

        def away(method: str, path: str) -> str:
            if came or (method == "PUT" and path.endswith(manifest_path(RUN, EVERY))):
                came.append(now())
            return "503" if len(came) > 1 and now() < came[1] + AWAY_S else ""

        proxy.rule = away
        first = place.train()
        assert first.wait() == [0, 0], first.log.text
        back = next(when for when, step in first.log.steps() if step > EVERY and when > came[1] + AWAY_S)
        row.steps, row.seconds = 0, back - came[1]
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
