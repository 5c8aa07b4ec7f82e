"""Runs as they are recorded: configuration, events, journal and scores, written without training anything."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

from pipeline.config.load import dump_yaml, load_config
from pipeline.manifest import EvaluationManifest, SourceScore
from pipeline.report.run import Run
from pipeline.storage import Storage
from pipeline.training.journal import History, journal_folder
from pipeline.training.metrics import read_metrics
from tests.publishing.conftest import PublishedRun

START = 1_764_320_000.0  # UNIX
STEP_S = 2.0
TOKENS = 8_170  # of a step
LAYERS = 3


def settings(storage: Storage, run_id: str, *overrides: str) -> None:
    config = load_config("debug", [f"run_id={run_id}", f"storage.root={storage.root}", *overrides])
    storage.write(f"runs/{run_id}/config.yaml", dump_yaml(config).encode())


def events(storage: Storage, run_id: str, *happened: tuple[float, str, str, dict[str, Any]]) -> None:
    """(seconds after START, event, stage, facts)"""
    lines = [{"time": START + at, "event": event, "stage": stage, **facts} for at, event, stage, facts in happened]
    storage.write(f"runs/{run_id}/events.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def line(step: int, at: float, *, shift: float = 0.0, every: int = 1, **more: Any) -> dict[str, Any]:
    """A logged step, `at` seconds after START."""
    noise = random.Random(step * 7919 + round(shift * 1000))
    if "seconds" in more:
        more = {"first_step": step, "last_step": step, **more}
    loss = 4.2 + shift + 4.1 * math.exp(-step / 25) + noise.uniform(-0.05, 0.05)
    return {
        "time": START + at, "step": step, "steps": 120, "tokens": step * TOKENS, "slots": step * 8192, "loss": loss,
        "aux_loss": 0.01, "gradient_norm": 0.6 + 2 * math.exp(-step / 10) + noise.uniform(0, 0.1),
        "learning_rate": 4e-3 * min(1.0, step / 10) * (1 - step / 150), "bias_rate": 1e-2 if step < 96 else 0.0,
        "global_batch": 16, "tokens_per_second": TOKENS / STEP_S + noise.uniform(-90, 90), "eta_s": (120 - step) * STEP_S,
        "load_imbalance": [1.0 + layer / 4 + math.exp(-step / 30) for layer in range(LAYERS)],
        "expert_load": 2.0, "skipped_steps": int(step > 50), "spikes": int(step > 70), "checkpoint_step": step // 40 * 40, **more,
    }  # fmt: skip


def journal(storage: Storage, run_id: str, *attempts: tuple[float, int, int], ranks: int = 2, **more: Any) -> None:
    """(seconds after START, from step, to step) of each. `more`: of each line, and `shift` and `every` of `line`."""
    every = more.get("every", 1)
    for number, (began, first, last) in enumerate(attempts, start=1):
        begin = {"attempt": number, "from_step": first, "ranks": ranks, "time": START + began}
        logged = [step for step in range(first + 1, last + 1) if step % every == 0 or step in (1, last)]
        lines = [begin, *(line(step, began + 8 + (step - first) * STEP_S, **more) for step in logged)]
        data = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
        name = f"{number:06d}-{int((START + began) * 1000):013d}-0000.jsonl"
        storage.write(f"{journal_folder(run_id)}/{name}", data)


def score(storage: Storage, run_id: str, step: int, loss: float) -> EvaluationManifest:
    """An evaluation of the checkpoint of a step."""
    found = SourceScore(
        documents=60, tokens=40_000, text_bytes=150_000, loss=loss, bits_per_byte=loss * 0.4, stderr=0.05
    )
    manifest = EvaluationManifest(
        identity="e" * 64,
        checkpoint_digest="c" * 64,
        dataset_digest="d" * 64,
        step=step,
        sequence_length=512,
        overall=found,
        sources={"code": found},
        unigram_entropy=6.8,
        baselines={"gzip -9": 1.9, "xz -9": 1.65, "token frequencies": 2.5},
        source_baselines={"code": {"gzip -9": 1.9, "xz -9": 1.65, "token frequencies": 2.5}},
        tokens_seen=step * TOKENS,
        tokenizer_sha256="t" * 64,
    )
    storage.write(f"runs/{run_id}/evaluate/step-{step:08d}.json", manifest.to_json())
    return manifest


def recorded(storage: Storage, run_id: str, *overrides: str, **more: Any) -> None:
    """A run that was killed after step 95, went on from step 80 and is trained and scored."""
    settings(storage, run_id, *overrides)
    events(
        storage,
        run_id,
        (0, "started", "prepare", {}),
        (30, "finished", "prepare", {"seconds": 30.0}),
        (31, "started", "train", {}),
        (260, "started", "train", {}),
        (365, "finished", "train", {"seconds": 105.0}),
        (366, "started", "evaluate", {}),
        (380, "finished", "evaluate", {"seconds": 14.0}),
    )
    journal(storage, run_id, (40, 0, 95), (262, 80, 120), **more)
    for step, loss in ((40, 5.2), (80, 4.7), (120, 4.5)):
        score(storage, run_id, step, loss + more.get("shift", 0.0))


def run_of(run: PublishedRun, **changes: Any) -> Run:
    """A published run as its page takes it."""
    made = run.made
    history = History(steps=read_metrics(made.train.metrics, made.storage))
    known = Run(
        "made", START + 400, config=made.config, history=history, dataset=made.dataset, train=made.train, evaluation=run.evaluation,
        checkpoint=made.checkpoint, evaluation_path="runs/made/evaluate/step-00000050.json", model=run.manifest,
    )  # fmt: skip
    return replace(known, **changes)
