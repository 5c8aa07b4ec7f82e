"""What the planner says of a run that may get smaller, which has to fit when each worker holds most, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.views import rehearsal
from jobs.views.plan import command, show
from pipeline.config.load import load_config
from pipeline.planner.estimate import Hardware

MESH = "parallelism={replicate: 4, shard: 64, ep: 8, elastic: {min_workers: %d}}"


def test_the_fullest_size_has_to_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """One replica of 64 holds as much as four do; 8 workers hold all of the network between them."""
    assert show(load_config("moonlight-16b-a3b", [MESH % 64]), Hardware(), None) == 0
    first, *_, said = capsys.readouterr().out.splitlines()
    assert "256 GPUs" in first
    assert said.startswith("elastic    ")
    assert said.endswith("s there")
    assert "(replicate 1 x shard 64)" in said
    assert show(load_config("moonlight-16b-a3b", [MESH % 8]), Hardware(memory_gb=40), None) == 1
    out = capsys.readouterr().out
    assert "on 8 (replicate 1 x shard 8), the fullest" in out
    assert "it does not fit" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rehearse", "--mfu", "0.3"], "--mfu is not asked by a rehearsal"),
        (["--rehearse", "--corpus-bytes", "20TB"], "--corpus-bytes is not asked by a rehearsal"),
        (["--trace", "step.json"], "--trace belongs to a rehearsal: add --rehearse"),
    ],
)
def test_an_option_without_effect_is_refused(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.views.rehearsal.rehearse_and_show", lambda *_: 0)
    with pytest.raises(SystemExit, match="2"):
        command(["--config", "debug", *options])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("where", ["", "no/such/step.json"])
def test_a_trace_that_has_no_place_is_refused_before_the_step(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rehearsed(*_: object, **__: object) -> None:
        raise AssertionError("a step was rehearsed")

    monkeypatch.setattr(rehearsal, "rehearse", rehearsed)
    with pytest.raises(ValueError, match=r"^--trace \S+: (a folder|there is no folder \S+); name a file$"):
        rehearsal.rehearse_and_show(load_config("debug"), "h100", str(tmp_path / where))
