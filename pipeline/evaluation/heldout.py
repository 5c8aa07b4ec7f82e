"""Cross-entropy and bits per byte of a checkpoint on documents it never trained on, per source.

A held-out document of n tokens becomes [EOS] t_1 ... t_n [EOS]: it starts as documents start in training and its end is
predicted, too. That row of n + 2 tokens is cut into windows of S + 1 that overlap by one token, so each of the n + 1
tokens after the first EOS is predicted exactly once, from at most S tokens before it. Short windows are padded on the
right with labels of -100; attention is causal, so padding changes nothing.

    loss (nats per token)  = sum of nats / (n + 1 summed over documents)
    bits per byte          = sum of nats / ln 2 / sum of UTF-8 bytes

The text behind the tokens is recovered by decoding and must have the size that prepare measured; the baselines
(`baselines.py`) are taken on those bytes. Windows are sorted by length within a source and a batch never mixes
sources. Under `torch.distributed` the batches are dealt to the ranks round robin and all ranks run the same number of
forward passes (a sharded model has collectives inside); one all-reduce of the per-source sums ends it.

Cost: one forward pass over the held-out tokens plus `xz -9` over their text.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.evaluation.baselines import bits_per_byte, compressed_bits_per_byte, unigram_nats
from pipeline.evaluation.result import EvaluationProgress, commit, committed, identity, manifest_path, window_length
from pipeline.evaluation.weights import load_model
from pipeline.integrity import DamagedFile, read_checked
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationManifest,
    HeldoutFile,
    SourceManifest,
    SourceScore,
)
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder
from pipeline.training.retention import reading

IGNORED = -100
DECIMALS = 6  # published precision: below it, floating-point sums depend on batch shapes

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldoutText:
    """The held-out documents of one source that are scored."""

    source: str
    documents: list[Tokens]  # without EOS
    text_bytes: list[int]  # UTF-8 bytes of each

    @property
    def scored_tokens(self) -> int:
        return sum(len(tokens) + 1 for tokens in self.documents)


def evaluate(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    storage: Storage,
    *,
    report: Callable[[EvaluationProgress], None],
) -> EvaluationManifest:
    """Score a checkpoint, also on `evaluation.tasks`, and commit the result; one of the same identity is returned as it is.

    Runs in one process (the whole network in fp32) or on every rank of an initialised process group, sharded as in
    training; all ranks return the same, rank 0 reports. Raises ValueError when no held-out document can be scored or a
    score is no finite number, and for tasks that cannot be had (`tasks.check`) or scored.
    """
    found = committed(config, dataset, checkpoint, storage)
    if found is not None:
        return found
    encoder = Encoder.stored(dataset.tokenizer, storage)
    texts = [text for source in dataset.sources if (text := read_heldout(source, dataset, config, storage)).documents]
    if not texts:
        raise ValueError(
            f"corpus.heldout_fraction {config.corpus.heldout_fraction}: dataset {dataset.identity[:8]} holds out no document; "
            "raise the fraction and prepare again"
        )
    first = not dist.is_initialized() or dist.get_rank() == 0
    with reading(storage, checkpoint.run_id, checkpoint.step) if first else nullcontext():
        model = load_model(config, checkpoint, storage)
    nats = score(
        model, texts, eos=encoder.eos_id, length=window_length(config), batch=config.evaluation.batch, report=report
    )
    check_finite(dict(zip((text.source for text in texts), nats)), checkpoint)
    harness, tasks = "", {}
    if config.evaluation.tasks:
        from pipeline.evaluation.harness import harness_version, score_tasks  # lm-eval is an extra

        harness, tasks = harness_version(), score_tasks(config, model, encoder, report)
    if first:
        manifest = _manifest(config, dataset, checkpoint, texts, nats, encoder)
        manifest = manifest.model_copy(update={"harness": harness, "tasks": tasks})
        commit(config, checkpoint, manifest, storage)
    if dist.is_initialized():
        dist.barrier()
    path = manifest_path(config, checkpoint)
    return EvaluationManifest.parse(storage.read(path), storage.uri(path))


def read_heldout(source: SourceManifest, dataset: DatasetManifest, config: RunConfig, storage: Storage) -> HeldoutText:
    """Whole documents in stored order; one that would exceed `evaluation.max_tokens_per_source` is passed over.

    If none fits, the shortest is taken: a finished training run does not fail for the want of a short document.
    """
    dtype = np.dtype(dataset.token_dtype).newbyteorder("<")
    found: list[tuple[Tokens, int]] = []
    for file in source.heldout:
        table = _read_table(storage, file)
        tokens = (np.frombuffer(raw, dtype=dtype).astype(np.int64) for raw in table["tokens"].to_pylist())
        found += zip(tokens, table["n_bytes"].to_pylist())
    budget = config.evaluation.max_tokens_per_source
    kept = []
    for document in found:
        if len(document[0]) + 1 <= budget:
            budget -= len(document[0]) + 1
            kept.append(document)
    if found and not kept:
        kept = [min(found, key=lambda document: len(document[0]))]
    return HeldoutText(source.name, [tokens for tokens, _ in kept], [n_bytes for _, n_bytes in kept])


def _read_table(storage: Storage, file: HeldoutFile) -> pa.Table:
    """A file's tokens and byte counts. Raises DamagedFile, with the row group where a page tells."""
    try:
        data = read_checked(storage, file)
    except DamagedFile as error:
        raise DamagedFile(f"{error}{_damaged_group(storage, file)}") from None
    return pq.read_table(io.BytesIO(data), columns=["tokens", "n_bytes"])


def _damaged_group(storage: Storage, file: HeldoutFile) -> str:
    """`: row group 3`, the first that does not decode with its pages' checksums; '' if the damage is elsewhere."""
    group = -1
    try:
        with storage.open(file.path) as handle:
            parquet = pq.ParquetFile(handle, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, KeyError):  # a damaged footer may name columns in no encoding
        return "" if group < 0 else f": row group {group}"
    return ""


def windows(document: Tokens, eos: int, length: int) -> Iterator[Tokens]:
    """Cut [EOS] + document + [EOS] into windows of at most `length` + 1 tokens that overlap by one."""
    row = np.concatenate([[eos], document, [eos]]).astype(np.int64)
    for start in range(0, len(row) - 1, length):
        yield row[start : start + length + 1]


def score(
    model: torch.nn.Module,
    texts: list[HeldoutText],
    *,
    eos: int,
    length: int,
    batch: int,
    report: Callable[[EvaluationProgress], None],
) -> list[float]:
    """Total nats of each source. `model(input_ids_BS, labels_BS).loss_sum` is the sum over labels that are not -100."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    batches: list[tuple[int, list[Tokens]]] = []
    for index, text in enumerate(texts):
        cut = [window for document in text.documents for window in windows(document, eos, length)]
        cut.sort(key=len, reverse=True)
        batches += [(index, cut[start : start + batch]) for start in range(0, len(cut), batch)]
    nats = torch.zeros(len(texts), dtype=torch.float64, device=device)
    total = sum(text.scored_tokens for text in texts)
    done = mine = 0
    for start in range(0, len(batches), world):
        turn = start + rank
        index, group = batches[min(turn, len(batches) - 1)]
        inputs_BS, labels_BS = _tensors(group, eos, device)
        if turn >= len(batches):  # nothing left for this rank: keep the others' collectives company
            labels_BS.fill_(IGNORED)
        with torch.no_grad():
            nats[index] += model(inputs_BS, labels_BS).loss_sum.double()
        mine += int((labels_BS != IGNORED).sum())
        new = sum(len(window) - 1 for _, others in batches[start : start + world] for window in others)
        done += new
        if rank == 0:
            report(EvaluationProgress(new, done, total, float(nats.sum()) / max(mine, 1)))
    if world > 1:
        dist.all_reduce(nats)
    return nats.tolist()


def _tensors(group: list[Tokens], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(window) for window in group) - 1
    inputs_BS = torch.full((len(group), width), pad)
    labels_BS = torch.full((len(group), width), IGNORED)
    for row, window in enumerate(group):
        inputs_BS[row, : len(window) - 1] = torch.from_numpy(window[:-1])
        labels_BS[row, : len(window) - 1] = torch.from_numpy(window[1:])
    return inputs_BS.to(device), labels_BS.to(device)


def check_finite(nats: dict[str, float], checkpoint: CheckpointManifest) -> None:
    """Raises ValueError for sums that are no numbers: no comparison with another model, or with a limit, would notice."""
    bad = [source for source, total in nats.items() if not isfinite(total)]
    if bad:
        raise ValueError(
            f"checkpoint of step {checkpoint.step}: the held-out loss of source {bad[0]!r} is {nats[bad[0]]}, so its weights are "
            "damaged or have diverged; evaluate an earlier one (evaluation.checkpoint)"
        )


def decode(text: HeldoutText, encoder: Encoder) -> bytes:
    """The UTF-8 text of the documents, one after the other; every size is the one that prepare measured."""
    pieces = []
    for number, (tokens, n_bytes) in enumerate(zip(text.documents, text.text_bytes)):
        piece = encoder.decode(tokens).encode()
        assert len(piece) == n_bytes, (
            f"{text.source} document {number}: decodes to {len(piece)} bytes, stored as {n_bytes}"
        )
        pieces.append(piece)
    return b"".join(pieces)


def _manifest(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    texts: list[HeldoutText],
    nats: list[float],
    encoder: Encoder,
) -> EvaluationManifest:
    contents = [decode(text, encoder) for text in texts]
    scored = [np.concatenate([part for doc in text.documents for part in (doc, [encoder.eos_id])]) for text in texts]
    everything, all_tokens = b"".join(contents), np.concatenate(scored)
    return EvaluationManifest(
        identity=identity(config, dataset, checkpoint),
        checkpoint_digest=checkpoint.digest,
        dataset_digest=dataset.digest,
        step=checkpoint.step,
        sequence_length=window_length(config),
        overall=_score(sum(len(text.documents) for text in texts), len(all_tokens), len(everything), sum(nats)),
        sources={
            text.source: _score(len(text.documents), text.scored_tokens, len(content), total)
            for text, content, total in zip(texts, contents, nats)
        },
        unigram_entropy=round(unigram_nats(all_tokens) / len(all_tokens), DECIMALS),
        baselines=_baselines(everything, all_tokens),
        source_baselines={
            text.source: _baselines(content, tokens) for text, content, tokens in zip(texts, contents, scored)
        },
    )


def _score(documents: int, tokens: int, text_bytes: int, nats: float) -> SourceScore:
    return SourceScore(
        documents=documents,
        tokens=tokens,
        text_bytes=text_bytes,
        loss=round(nats / tokens, DECIMALS),
        bits_per_byte=round(bits_per_byte(nats, text_bytes), DECIMALS),
    )


def _baselines(text: bytes, tokens: Tokens) -> dict[str, float]:
    unigram = {"token frequencies": bits_per_byte(unigram_nats(tokens), len(text))}
    return {name: round(bits, DECIMALS) for name, bits in {**compressed_bits_per_byte(text), **unigram}.items()}
