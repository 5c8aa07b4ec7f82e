"""Muon against AdamW: held-out loss over steps on the demo corpus, at three model sizes.

    python -m benchmarks.compare_optimizers [--sizes 96,160,256] [--steps 120] [--root runs/compare]

The pair of a size has everything in common but the optimizer: initial weights, rows and their order, schedules, weight
decay, clipping. That is asserted, not assumed: the loss of the first step, before any update, and the digest of the
data order must agree. Moonlight's claim is about equal rates (section 2.2: an update RMS of 0.2 lets Muon take AdamW's
rate), so the first comparison is at one rate, the `debug` preset's. That rate was chosen for Muon and a longer run, so
both optimizers also get a sweep of their own at the smallest size, by factors of two and continued until the best rate
has a worse one on either side. Every size is then run at that rate, too, and two more comparisons use the better of an
optimizer's runs at the size: Muon as it is against AdamW at its best rate, and both at their best. One seed.

Network: the preset's with `hidden_size` d, d / 32 heads of 24 + 8, feed-forward widths 3 d (dense) and 3 d / 4 (expert).
Corpus and tokenizer: the preset's, prepared in this process unless they are below --root already (`--root runs` after
`make demo`). Runs: each in a process of its own with one thread, two at a time. Whatever has finished is not repeated;
an interrupted run continues from its last checkpoint. Every sixth of a run the checkpoint is scored on a fixed
part of the held-out documents, the same for all (pipeline/evaluation/heldout.py).

Result: a table, `optimizers.png` below --root, and one line of JSON; ratio = Muon's final loss / AdamW's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from queue import Empty
from typing import Any

import torch

from benchmarks.compare_report import OPTIMIZERS, Contender, Curve, Curves, best_rate, plot, results, table
from data_prep.prepare import prepare
from data_prep.records import PrepareProgress
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.evaluation.heldout import evaluate
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, TrainManifest, digest_of
from pipeline.model.shapes import count_parameters
from pipeline.storage import Storage, open_storage
from pipeline.training.commits import committed, train_folder
from pipeline.training.metrics import TrainProgress
from pipeline.training.trainer import train

PROCESSES = 2
POINTS = 6  # scored checkpoints of a run
SEQUENCE, SEQUENCES = 256, 16  # a step is 4,096 tokens
HELDOUT_TOKENS = 12_000  # per source
SWEEP = (0.5, 1.0, 2.0)  # first rates at the smallest size, as multiples of the preset's
PREPARED = load_config("debug")
RATE = max(stage.end for stage in PREPARED.schedule.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="96,160,256", help="hidden sizes, multiples of 32")
    parser.add_argument("--steps", type=int, default=120, help=f"optimizer steps of {SEQUENCE * SEQUENCES:,} tokens")
    parser.add_argument("--root", default="runs/compare")
    given = parser.parse_args()
    sizes = sorted(int(size) for size in given.sizes.split(","))
    if given.steps < POINTS or any(size % 32 or size <= 0 for size in sizes):
        parser.error(f"--steps must be at least {POINTS} and --sizes multiples of 32")

    torch.set_num_threads(1)
    storage = open_storage(PREPARED.storage.model_copy(update={"root": given.root}))
    dataset = prepare(PREPARED, storage, report=show_prepare)
    curves = run_all(sizes, given.steps, storage, dataset)
    counts = {size: count_parameters(load_config("debug", overrides(network(size))).model) for size in sizes}
    print(table(curves, counts, RATE, SEQUENCE * SEQUENCES))
    storage.write("optimizers.png", plot(curves, sizes, RATE))
    print(f"\nplot: {storage.uri('optimizers.png')}")
    print(json.dumps(results(curves, sizes, RATE)))


# -- the runs --------------------------------------------------------------------------------------------------------


def planned(sizes: Sequence[int]) -> list[Contender]:
    """What is known from the start: the sweeps at the smallest size, and the pair of every size."""
    sweeps = [Contender(name, sizes[0], RATE * factor) for factor in SWEEP for name in OPTIMIZERS]
    pairs = [Contender(name, size, RATE) for size in sizes for name in OPTIMIZERS]
    return list(dict.fromkeys(sweeps + pairs))


def called_for(curves: Curves, known: Collection[Contender], sizes: Sequence[int]) -> list[Contender]:
    """What a finished sweep asks for: a rate beyond its end if the best is there, else the best rate at every size."""
    found = []
    for name in OPTIMIZERS:
        rates = sorted(run.rate for run in known if run.optimizer == name and run.hidden == sizes[0])
        if any(Contender(name, sizes[0], rate) not in curves for rate in rates):
            continue
        best = best_rate(curves, name, sizes[0])
        if best in (rates[0], rates[-1]):
            found.append(Contender(name, sizes[0], best * 2 if best == rates[-1] else best / 2))
        else:
            found += [run for size in sizes if (run := Contender(name, size, best)) not in known]
    return found


def configure(run: Contender, steps: int, root: str, dataset_digest: str) -> RunConfig:
    """The preset at another size, with its schedule's shape over other steps. The run's name holds a digest of all of it."""
    step_tokens = SEQUENCE * SEQUENCES
    total, warmup, frozen = (round(steps * part) * step_tokens for part in (1.0, 0.1, 0.8))
    changes = {
        **network(run.hidden),
        "storage.root": root,
        "optimizer.name": run.optimizer,
        "schedule.total_tokens": total,
        "schedule.learning_rate": [
            {"until_tokens": max(warmup, step_tokens), "shape": "linear", "start": 0.0, "end": run.rate},
            {"until_tokens": total, "shape": "cosine", "start": run.rate, "end": run.rate / 10},
        ],
        "schedule.global_batch": [{"until_tokens": total, "sequences": SEQUENCES}],
        "schedule.bias_rate": [{"until_tokens": frozen, "rate": 1e-3}, {"until_tokens": total, "rate": 0.0}],
        "parallelism": {},
        "training": {"sequence_length": SEQUENCE, "micro_batch": SEQUENCES, "log_every": 1},
        "checkpoint": {"every_steps": steps // POINTS, "keep": 2},
        "evaluation": {"max_tokens_per_source": HELDOUT_TOKENS},
    }
    config = load_config("debug", overrides(changes))
    decisive = config.model_dump(mode="json", exclude={"run_id", "storage", "cluster", "publishing"})
    digest = digest_of({"dataset": dataset_digest, "config": decisive})
    return config.model_copy(update={"run_id": f"{run.optimizer}-{run.hidden}-{digest[:12]}"})


def network(size: int) -> dict[str, Any]:
    """The preset's network at another hidden size."""
    return {
        "model.hidden_size": size,
        "model.num_attention_heads": size // 32,
        "model.kv_lora_rank": size // 4,
        "model.qk_nope_head_dim": 24,
        "model.qk_rope_head_dim": 8,
        "model.v_head_dim": 24,
        "model.intermediate_size": size * 3,
        "model.moe_intermediate_size": size * 3 // 4,
    }


def overrides(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def run_all(sizes: Sequence[int], steps: int, storage: Storage, dataset: DatasetManifest) -> Curves:
    """Every run of the comparison, two at a time, small ones first."""
    spawn = multiprocessing.get_context("spawn")
    messages = spawn.Queue()
    pool = ProcessPoolExecutor(
        PROCESSES, mp_context=spawn, initializer=adopt, initargs=(messages,), max_tasks_per_child=1
    )
    curves: Curves = {}
    configs: dict[Contender, RunConfig] = {}  # of every run known so far
    running: dict[Future[None], Contender] = {}
    progress = Overall()

    def end(run: Contender) -> None:
        curves[run] = read_curve(configs[run], storage)
        progress.known(run, 1.0)
        print(f"{run.name}: held-out loss {curves[run].final:.4f}", flush=True)

    waiting = planned(sizes)
    try:
        while waiting or running:
            for run in waiting:
                configs.setdefault(run, configure(run, steps, storage.config.root, dataset.digest))
                progress.known(run, 0.0)
            for run in [run for run in waiting if storage.exists(manifest_path(configs[run]))]:
                waiting.remove(run)
                end(run)
            while waiting and len(running) < PROCESSES:
                run = waiting.pop(0)
                running[pool.submit(execute, run, configs[run], dataset)] = run
            done, _ = wait(running, timeout=15, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # a failed run ends the comparison; what has finished is kept
                end(running.pop(future))
            for run, share in drain(messages):
                progress.known(run, share)
            waiting = sorted(waiting + called_for(curves, configs, sizes), key=lambda run: run.hidden)
            print(progress.line(), flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    check_pairs(curves)
    return curves


class Overall:
    """Progress over the runs known so far (the best rates join once a sweep has ended), weighted by cost."""

    def __init__(self) -> None:
        self.shares: dict[Contender, float] = {}
        self.began = time.monotonic()
        self.before: float | None = None  # work that was done at the first report, by an earlier call

    def known(self, run: Contender, share: float) -> None:
        self.shares[run] = max(share, self.shares.get(run, 0.0))

    def line(self) -> str:
        done = sum(weight(run.hidden) * share for run, share in self.shares.items())
        total = sum(weight(run.hidden) for run in self.shares)
        self.before = done if self.before is None else self.before
        elapsed = time.monotonic() - self.began
        new = done - self.before
        left = f"about {elapsed * (total - done) / new / 60:.0f} min left" if new > 0 else "time left not known yet"
        now = ", ".join(f"{run.name} {share:.0%}" for run, share in self.shares.items() if 0 < share < 1)
        return (
            f"{done / total:.0%} of {len(self.shares)} runs after {elapsed / 60:.1f} min, {left}; {now or 'starting'}"
        )


def weight(hidden: int) -> float:
    """Relative cost of a step: the parameters of attention and feed-forward grow as d squared, the head as d."""
    return 40.0 * hidden**2 + PREPARED.model.vocab_size * hidden


def check_pairs(curves: Curves) -> None:
    for run, curve in curves.items():
        twin = next(other for other in curves if other.hidden == run.hidden)
        assert curve.first_loss == curves[twin].first_loss, f"{run.name} and {twin.name} start from different weights"
        assert curve.order_digest == curves[twin].order_digest, f"{run.name} and {twin.name} see different data"


def drain(messages: Any) -> Iterator[tuple[Contender, float]]:
    while True:
        try:
            yield messages.get_nowait()
        except Empty:
            return


# -- one run, in its own process -------------------------------------------------------------------------------------

_messages: Any = None  # of the worker process: a spawned pool can hand a queue over only here


def adopt(messages: Any) -> None:
    global _messages
    _messages = messages


def execute(run: Contender, config: RunConfig, dataset: DatasetManifest) -> None:
    """Train to the end and score every checkpoint on the way; the run's manifest comes after its last score."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a run is one process
    storage = open_storage(config.storage)

    def score(checkpoint: CheckpointManifest) -> None:
        evaluate(config, dataset, checkpoint, storage, report=lambda _: None)

    def report(progress: TrainProgress) -> None:
        _messages.put((run, min(progress.step / progress.steps, 0.99)))

    for checkpoint in committed(storage, config.run_id):  # of an interrupted run; a known score is not repeated
        score(checkpoint)
    train(config, dataset, storage, report=report, on_checkpoint=score)


def manifest_path(config: RunConfig) -> str:
    return f"{train_folder(config.run_id)}/manifest.json"


def read_curve(config: RunConfig, storage: Storage) -> Curve:
    manifest = TrainManifest.model_validate_json(storage.read(manifest_path(config)))
    scores = [
        EvaluationManifest.model_validate_json(storage.read(entry.path))
        for entry in storage.list(f"runs/{config.run_id}/evaluate")
    ]
    assert scores[-1].step == manifest.steps, (config.run_id, scores[-1].step, manifest.steps)
    first = json.loads(storage.read(manifest.metrics[0].path).splitlines()[0])
    assert first["step"] == 1, first
    return Curve(
        tuple(score.step for score in scores),
        tuple(score.overall.loss for score in scores),
        first["loss"],
        manifest.checkpoint.order_digest,
    )


def show_prepare(progress: PrepareProgress) -> None:
    print(f"prepare: {progress.phase} {progress.units_done}/{progress.units_total}", flush=True)


if __name__ == "__main__":
    main()
