"""Cross-entropy and bits per byte of a checkpoint on documents it never trained on, per source.

A held-out document of n tokens becomes [EOS] t_1 ... t_n [EOS]: it starts as documents start in training and its end is
predicted, too. That row of n + 2 tokens is cut into windows of S + 1 that overlap by one token, so each of the n + 1
tokens after the first EOS is predicted exactly once, from at most S tokens before it. Short windows are padded on the
right; attention is causal and padding is not routed, so it changes nothing.

    loss (nats per token)  = sum of nats / (n + 1 summed over documents)
    bits per byte          = sum of nats / ln 2 / sum of UTF-8 bytes

and the standard errors of both (errors.py). What each document scored is kept beside the record (documents.py).

Windows are sorted by length within a source and a batch never mixes sources. The batches are dealt round robin to parts:
the ranks of a process group, which run the same number of forward passes (a sharded model has collectives inside), or tasks
that know nothing of each other. A batch is the same whoever runs it and every window's nats are kept by themselves until all
are there, so the digits do not depend on the number of parts.

Cost: one forward pass over the held-out tokens plus `xz -9` over their text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.evaluation.result import EvaluationProgress, committed, manifest_path, window_length
from pipeline.evaluation.summary import TaskResults, commit
from pipeline.evaluation.texts import HeldoutText, Tokens, heldout_texts
from pipeline.evaluation.unseen import seen_questions
from pipeline.evaluation.weights import load_model
from pipeline.evaluation.written import write_texts
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder
from pipeline.training.retention import reading

Report = Callable[[EvaluationProgress], None]
Nats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """Tokens of a document, the first of which is only read."""

    text: int
    document: int  # of the text
    tokens: Tokens


def evaluate(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    storage: Storage,
    *,
    report: Report,
    with_tasks: bool = True,
) -> EvaluationManifest:
    """Score a checkpoint, also on `evaluation.tasks`, and commit the result; one of the same identity is returned as it is.

    Runs in one process (the whole network in fp32) or on every rank of an initialised process group, sharded as in
    training; all ranks return the same, rank 0 reports. Raises ValueError when no held-out document can be scored or a
    score is no finite number, and for tasks that cannot be had (`tasks.check`) or scored.
    """
    found = committed(config, dataset, checkpoint, storage, with_tasks=with_tasks)
    if found is not None:
        return found
    encoder, texts = Encoder.stored(dataset.tokenizer, storage), heldout_texts(dataset, config, storage)
    first = not dist.is_initialized() or dist.get_rank() == 0
    with reading(storage, checkpoint.run_id, checkpoint.step) if first else nullcontext():
        model = load_model(config, checkpoint, storage)
    nats = score(
        model, texts, eos=encoder.eos_id, length=window_length(config), batch=config.evaluation.batch, report=report
    )
    check_finite({text.source: float(each.sum()) for text, each in zip(texts, nats, strict=True)}, checkpoint)
    if not dist.is_initialized():
        write_texts(config, checkpoint, model, encoder, storage)
    tasks: TaskResults | None = None
    if with_tasks and config.evaluation.tasks:
        from pipeline.evaluation.harness import score_tasks  # lm-eval is an extra

        tasks = score_tasks(config, model, encoder, report, seen_questions(dataset, storage))
    if first:
        commit(config, dataset, checkpoint, texts, nats, tasks, storage, with_tasks=with_tasks)
    if dist.is_initialized():
        dist.barrier()
    path = manifest_path(config, checkpoint)
    return EvaluationManifest.parse(storage.read(path), storage.uri(path))


def score_part(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    storage: Storage,
    *,
    part: tuple[int, int],
    report: Report,
) -> Nats:
    """What part i of n of the windows score, in one process that loads the network; zeros for those of other parts."""
    encoder, texts = Encoder.stored(dataset.tokenizer, storage), heldout_texts(dataset, config, storage)
    with reading(storage, checkpoint.run_id, checkpoint.step):
        model = load_model(config, checkpoint, storage)
    batches = plan_batches(texts, encoder.eos_id, window_length(config), config.evaluation.batch)
    return score_windows(model, batches, pad=encoder.eos_id, part=part, report=report)


def join_parts(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    storage: Storage,
    parts: Sequence[Nats],
    tasks: TaskResults | None,
    *,
    with_tasks: bool = True,
) -> EvaluationManifest:
    """Commit the result of all parts and of the tasks. Raises ValueError as `evaluate` does."""
    encoder, texts = Encoder.stored(dataset.tokenizer, storage), heldout_texts(dataset, config, storage)
    batches = plan_batches(texts, encoder.eos_id, window_length(config), config.evaluation.batch)
    nats = by_document(texts, batches, np.sum(parts, axis=0))
    check_finite({text.source: float(each.sum()) for text, each in zip(texts, nats, strict=True)}, checkpoint)
    return commit(config, dataset, checkpoint, texts, nats, tasks, storage, with_tasks=with_tasks)


def windows(document: Tokens, eos: int, length: int) -> list[Tokens]:
    """Cut [EOS] + document + [EOS] into windows of at most `length` + 1 tokens that overlap by one."""
    row = np.concatenate([[eos], document, [eos]]).astype(np.int64)
    return [row[start : start + length + 1] for start in range(0, len(row) - 1, length)]


def plan_batches(texts: list[HeldoutText], eos: int, length: int, batch: int) -> list[list[Window]]:
    """Which windows go through the network together."""
    batches: list[list[Window]] = []
    for index, text in enumerate(texts):
        cut = [
            Window(index, number, window)
            for number, document in enumerate(text.documents)
            for window in windows(document, eos, length)
        ]
        cut.sort(key=lambda window: len(window.tokens), reverse=True)
        batches += [cut[start : start + batch] for start in range(0, len(cut), batch)]
    return batches


def score(
    model: torch.nn.Module, texts: list[HeldoutText], *, eos: int, length: int, batch: int, report: Report
) -> list[Nats]:
    """The nats of each document, by text; on the ranks of a process group together."""
    batches = plan_batches(texts, eos, length, batch)
    part = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return by_document(texts, batches, score_windows(model, batches, pad=eos, part=part, report=report))


def score_windows(
    model: torch.nn.Module, batches: list[list[Window]], *, pad: int, part: tuple[int, int], report: Report
) -> Nats:
    """Nats of each window, in the batches' order; those of other parts are zero unless a process group adds them up.

    `model(input_ids_BS, labels_N, at_N=..., lengths=...).log_p_N` is the log-probability of each label. Part 0 reports.
    """
    mine, parts = part
    device = next(model.parameters()).device
    sizes = [len(group) for group in batches]
    starts = np.cumsum([0, *sizes])
    nats = torch.zeros(int(starts[-1]), dtype=torch.float64, device=device)
    total = sum(len(window.tokens) - 1 for group in batches for window in group)
    done = counted = 0
    for start in range(0, len(batches), parts):
        turn = start + mine
        if turn < len(batches):
            found = _score(model, batches[turn], pad, device)
            nats[int(starts[turn]) : int(starts[turn + 1])] = found
            counted += sum(len(window.tokens) - 1 for window in batches[turn])
        elif dist.is_initialized():  # nothing left for this rank: keep the others' collectives company
            _score(model, batches[-1], pad, device)
        new = sum(len(window.tokens) - 1 for group in batches[start : start + parts] for window in group)
        done += new
        if mine == 0:
            report(EvaluationProgress(new, done, total, float(nats.sum()) / max(counted, 1)))
    if dist.is_initialized() and parts > 1:
        dist.all_reduce(nats)
    result: Nats = nats.cpu().numpy()
    return result


def by_document(texts: list[HeldoutText], batches: list[list[Window]], nats: Nats) -> list[Nats]:
    """Sums over each document's windows, in the order of the batches."""
    sums = [np.zeros(len(text.documents)) for text in texts]
    for window, value in zip((window for group in batches for window in group), nats.tolist(), strict=True):
        sums[window.text][window.document] += value
    return sums


def _score(model: torch.nn.Module, group: list[Window], pad: int, device: torch.device) -> torch.Tensor:
    """Nats of each window, [B] fp64."""
    lengths = [len(window.tokens) - 1 for window in group]
    width = max(lengths)
    inputs_BS = torch.full((len(group), width), pad)
    for row, window in enumerate(group):
        inputs_BS[row, : lengths[row]] = torch.from_numpy(window.tokens[:-1])
    at_N = torch.cat([row * width + torch.arange(length) for row, length in enumerate(lengths)])
    labels_N = torch.from_numpy(np.concatenate([window.tokens[1:] for window in group]))
    with torch.no_grad():
        scores = model(inputs_BS.to(device), labels_N.to(device), at_N=at_N.to(device), lengths=lengths)
    return torch.stack([-part.sum() for part in scores.log_p_N.double().split(lengths)])


def check_finite(nats: dict[str, float], checkpoint: CheckpointManifest) -> None:
    """Raises ValueError for sums that are no numbers: no comparison with another model, or with a limit, would notice."""
    bad = [source for source, total in nats.items() if not isfinite(total)]
    if bad:
        raise ValueError(
            f"checkpoint of step {checkpoint.step}: the held-out loss of source {bad[0]!r} is {nats[bad[0]]}, so its weights are "
            "damaged or have diverged; evaluate an earlier one (evaluation.checkpoint)"
        )
