"""Two published versions side by side: what went in, what came out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.config.gates import HELDOUT_METRICS, GateConfig
from pipeline.manifest import ModelManifest
from pipeline.publishing.ask import scored
from pipeline.publishing.compare import Incomparable, Scored, compare
from pipeline.storage import Storage


def difference(storage: Storage, a: ModelManifest, b: ModelManifest) -> Iterator[str]:
    """From b to a, line by line."""
    yield f"{a.name}: {b.version} -> {a.version}"
    for what in ("run_identity", "checkpoint_digest", "dataset_digest", "tokenizer_sha256", "git_commit"):
        before, after = getattr(b, what), getattr(a, what)
        yield f"{what:<18} {'the same' if before == after else f'{before[:16]} -> {after[:16]}'}"
    changed = list(_changed(b.config, a.config, ""))
    yield f"{'settings':<18} {'the same' if not changed else ''}".rstrip()
    yield from (f"  {line}" for line in changed)
    yield from _scores(storage, a, b)
    yield from _tensors(a, b)


def _changed(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from _changed(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    elif before != after:
        yield f"{path}: {before} -> {after}"


def _scores(storage: Storage, a: ModelManifest, b: ModelManifest) -> Iterator[str]:
    try:
        ours, theirs = scored(storage, a), scored(storage, b)
    except ValueError as error:
        yield f"{'scores':<18} {error}"
        return
    for gate in _subjects(ours, theirs):
        try:
            found = compare(gate, ours, theirs)
        except Incomparable as error:
            yield f"{gate.subject:<18} {error}"
            continue
        by = found.difference
        about = "" if by.stderr is None else f" ± {by.stderr:.4f}"
        yield f"{gate.subject:<18} {found.theirs:.4f} -> {found.ours:.4f}  ({by.value:+.4f}{about}, {found.how})"


def _subjects(ours: Scored, theirs: Scored) -> Iterator[GateConfig]:
    """Everything that both have a score of."""
    for name in HELDOUT_METRICS:
        yield GateConfig(metric=name, worse_by=0.0)
    for source in ours.evaluation.sources:
        if source in theirs.evaluation.sources:
            yield GateConfig(source=source, worse_by=0.0)
    for name, task in ours.evaluation.tasks.items():
        if name in theirs.evaluation.tasks:
            for metric in task.metrics:
                yield GateConfig(task=name, metric=metric.name, filter=metric.filter, worse_by=0.0)


def _tensors(a: ModelManifest, b: ModelManifest) -> Iterator[str]:
    """By the checksums on record: weights are not read."""
    ours, theirs = ({k: v for k, v in each.xxh3.items() if not k.endswith(".safetensors")} for each in (a, b))
    if not ours or not theirs:
        yield f"{'tensors':<18} there are no checksums of one of them"
        return
    same = sum(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())
    alone = len(ours.keys() ^ theirs.keys())
    only = f", {alone} only in one of them" if alone else ""
    yield f"{'tensors':<18} {same} the same, {len(ours.keys() & theirs.keys()) - same} differ{only}"
