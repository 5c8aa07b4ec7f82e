"""`jobs.evaluate --follow` and `--all` end in one line, with the exit code of the stage, whatever ends them."""

from __future__ import annotations

import pytest

from jobs import evaluate, stages
from jobs.on_ray.failed import WorkersFailed
from tests.jobs.conftest import Prepared


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("option", [[], ["--all"], ["--follow"]])
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            PermissionError("Access Denied: 's3://moonlight/x'"),
            1,
            "evaluate: storage: Access Denied: 's3://moonlight/x'",
        ),
        (WorkersFailed("rank 3 died four times"), 1, "evaluate: rank 3 died four times"),
        (ValueError("evaluation.tasks: no such task"), 2, "evaluate: evaluation.tasks: no such task"),
    ],
)
def test_one_line(
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: list[str],
    error: Exception,
    code: int,
    told: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(stages, "find", fail)
    assert evaluate.main([*option, *prepared.arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith(told)
    assert said.count("\n") == 1
