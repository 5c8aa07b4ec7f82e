"""`moonlight models` from its command line: on a published run, with a second version beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.models import main
from pipeline.config.load import dump_yaml
from pipeline.evaluation.heldout import evaluate
from pipeline.manifest import ModelManifest
from pipeline.publishing import registry
from pipeline.publishing.export import publish
from tests.evaluation.make import MadeRun, make_run, run_config


class Registry:
    """Two published versions of one checkpoint: bf16 and fp32; the second is promoted."""

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.made: MadeRun = make_run(run_config(str(root)))
        self.config = root / "run.yaml"
        self.config.write_text(dump_yaml(self.made.config))
        made = self.made
        self.evaluation = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)
        self.first = self.publish(dtype="bf16").version
        second = self.publish(seed=1)  # same run, same step: nobody promotes it by itself
        self.second = second.version
        registry.move(made.storage, second, "promote", "")

    def publish(self, *, seed: int | None = None, **settings: Any) -> ModelManifest:
        section = self.made.config.publishing.model_copy(update=settings)
        config = self.made.config.model_copy(update={"publishing": section})
        if seed is not None:
            config = config.model_copy(update={"seed": seed})
        made = self.made
        return publish(config, made.train, self.evaluation, made.dataset, made.storage, report=lambda _: None)

    def __call__(self, *arguments: str) -> int:
        return main(["--config", str(self.config), *arguments])

    @property
    def promoted(self) -> str:
        found = registry.latest(self.made.storage, "tiny")
        assert found is not None
        return found.version


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("models"))


def test_list_and_history(models: Registry, capsys: pytest.CaptureFixture[str]):
    assert models("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[2:].split()[0]: line[0] for line in lines} == {models.first: " ", models.second: "*"}
    assert "run made  was promoted" in next(line for line in lines if models.first in line)
    assert models("history") == 0
    told = capsys.readouterr().out
    assert told.count("promote ") == 2
    assert f"{models.second}  (before: {models.first})" in told


def test_show_leads_from_the_model_to_what_it_was_made_from(models: Registry, capsys: pytest.CaptureFixture[str]):
    assert models("show") == 0
    shown, made = capsys.readouterr().out, models.made
    assert f"model        tiny {models.second}  (promoted)" in shown
    assert f"digest {made.checkpoint.digest}" in shown
    assert "step 50" in shown
    assert made.dataset.digest[:16] in shown
    assert made.dataset.tokenizer.sha256[:16] in shown
    assert models.evaluation.digest[:16] in shown
    assert "commit       unknown" in shown


def test_diff_says_what_differs(models: Registry, capsys: pytest.CaptureFixture[str]):
    assert models("diff", models.second, models.first) == 0
    shown = capsys.readouterr().out
    assert f"tiny: {models.first} -> {models.second}" in shown
    assert "checkpoint_digest  the same" in shown
    assert "  publishing.dtype: bf16 -> fp32" in shown
    assert "  seed: 0 -> 1" in shown
    assert "(+0.0000 ± 0.0000, paired over 5 documents)" in shown
    assert "tensors" in shown


def test_rollback_and_promotion_by_hand(models: Registry, capsys: pytest.CaptureFixture[str]):
    assert models("rollback", "--because", "it rhymes") == 0
    assert models.promoted == models.first
    assert models("rollback") == 2
    assert "is the first version that was promoted" in capsys.readouterr().err
    assert models("promote", models.second) == 0
    assert models.promoted == models.second
    assert models("history") == 0
    assert "because it rhymes" in capsys.readouterr().out


def test_a_closed_gate_keeps_people_from_promoting_too_until_they_say_why(
    models: Registry, capsys: pytest.CaptureFixture[str]
):
    assert models("rollback") == 0
    gate = "publishing.beats_frequencies=true"
    assert models("promote", models.second, gate) == 4
    told = capsys.readouterr().err
    assert "the entropy of the same tokens under their own frequencies" in told
    assert "token frequencies  at most their entropy" in told
    assert models.promoted == models.first
    with pytest.raises(SystemExit):
        models("promote", models.second, gate, "--force")
    assert models("promote", models.second, gate, "--force", "--because", "a test of the loader") == 0
    assert models.promoted == models.second
    capsys.readouterr()
    assert models("history") == 0
    assert "because forced: a test of the loader" in capsys.readouterr().out


def test_what_is_not_there(models: Registry, capsys: pytest.CaptureFixture[str]):
    assert models("show", "step-9") == 2
    assert f"tiny has no version step-9; it has {min(models.first, models.second)}" in capsys.readouterr().err
    assert models("list", "publishing.name=other") == 2
    assert "models there: tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        models("shew")


def test_damaged_files_are_not_promoted(models: Registry, capsys: pytest.CaptureFixture[str]):
    path = f"models/tiny/{models.first}/config.json"
    before = models.made.storage.read(path)
    models.made.storage.write(path, before + b" ")
    try:
        assert models("rollback", models.first) == 2
        assert f"model tiny {models.first} is damaged" in capsys.readouterr().err
        assert models.promoted == models.second
    finally:
        models.made.storage.write(path, before)
