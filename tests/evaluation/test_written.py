"""What a checkpoint writes: the continuations that the published model gives, kept beside its score and shown on the run's page."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.evaluation.heldout import evaluate
from pipeline.evaluation.written import read_texts, texts_folder
from pipeline.generation.sample import Sampling, generate
from pipeline.report.page import render
from pipeline.report.run import Run, read_run
from pipeline.tokenizer import Encoder
from tests.evaluation.make import make_run, run_config

PROMPTS = ["def area(", "The <moon>"]


def test_texts_are_kept_beside_the_score(tmp_path: Path):
    made = make_run(run_config(str(tmp_path), sample_prompts=PROMPTS))
    evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)
    [written] = read_texts(made.storage, "made")
    assert (written.step, written.tokens_seen, written.checkpoint_digest) == (50, 12500, made.checkpoint.digest)
    encoder = Encoder.load("tokenizers/t", made.storage)
    prompts = [encoder.encode([prompt.encode()])[0].tolist() for prompt in PROMPTS]
    likeliest = generate(made.model, prompts, [Sampling()] * 2, eos=encoder.eos_id, max_new_tokens=5, max_positions=64)
    assert [(each.prompt, each.text) for each in written.texts] == [
        (prompt, encoder.decode(new)) for prompt, new in zip(PROMPTS, likeliest)
    ]
    assert "<em>The &lt;moon&gt;</em>" in render(read_run(made.storage, "made"))


def test_without_prompts_there_are_none(tmp_path: Path):
    made = make_run(run_config(str(tmp_path)))
    evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)
    assert read_texts(made.storage, "made") == []
    assert "What it writes" not in render(read_run(made.storage, "made"))


def test_a_damaged_one_is_named(tmp_path: Path):
    made = make_run(run_config(str(tmp_path), sample_prompts=PROMPTS))
    evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)
    path = f"{texts_folder('made')}/step-00000050.json"
    made.storage.write(path, made.storage.read(path).replace(b"def area", b"def are"))
    with pytest.raises(ValueError, match=path):
        read_texts(made.storage, "made")
    run: Run = read_run(made.storage, "made")
    assert any(path in problem for problem in run.problems)
