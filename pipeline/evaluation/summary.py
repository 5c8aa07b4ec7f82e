"""From what each document scored to the record of an evaluation, with what the scores are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.config.schema import RunConfig
from pipeline.evaluation import documents, result
from pipeline.evaluation.baselines import bits_per_byte, compressed_bits_per_byte, unigram_nats
from pipeline.evaluation.errors import ratio
from pipeline.evaluation.result import identity, window_length
from pipeline.evaluation.texts import HeldoutText, Tokens, decode
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, SourceScore, TaskScore
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder

DECIMALS = 6  # published precision: below it, floating-point sums depend on batch shapes
DOCUMENT_DECIMALS = 3  # of a document's nats: below it, the same

Nats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TaskResults:
    """Scores of tasks, and of single documents of them."""

    harness: str  # name and version
    scores: dict[str, TaskScore]
    documents: list[dict[str, Any]] = field(default_factory=list)  # rows of documents.TASKS


def commit(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    texts: list[HeldoutText],
    nats: list[Nats],
    tasks: TaskResults | None,
    storage: Storage,
    *,
    with_tasks: bool,
) -> EvaluationManifest:
    """Write the record, after what it points to. `nats`: of each document, by text."""
    encoder = Encoder.stored(dataset.tokenizer, storage)
    contents = [decode(text, encoder) for text in texts]
    scored = [np.concatenate([part for doc in text.documents for part in (doc, [encoder.eos_id])]) for text in texts]
    everything, all_tokens = b"".join(part for content in contents for part in content), np.concatenate(scored)
    counts = [np.array([len(tokens) + 1 for tokens in text.documents]) for text in texts]
    sizes = [np.array(text.text_bytes) for text in texts]
    rows = [row for each in zip(texts, contents, counts, sizes, nats, strict=True) for row in _rows(*each)]
    manifest = EvaluationManifest(
        identity=identity(config, dataset, checkpoint, with_tasks=with_tasks),
        checkpoint_digest=checkpoint.digest,
        dataset_digest=dataset.digest,
        step=checkpoint.step,
        sequence_length=window_length(config),
        overall=_score(np.concatenate(nats), np.concatenate(counts), np.concatenate(sizes)),
        sources={text.source: _score(*each) for text, *each in zip(texts, nats, counts, sizes, strict=True)},
        unigram_entropy=round(unigram_nats(all_tokens) / len(all_tokens), DECIMALS),
        baselines=_baselines(everything, all_tokens),
        source_baselines={
            text.source: _baselines(b"".join(content), tokens)
            for text, content, tokens in zip(texts, contents, scored, strict=True)
        },
        harness="" if tasks is None else tasks.harness,
        tasks={} if tasks is None else tasks.scores,
        tokens_seen=checkpoint.tokens_seen,
        tokenizer_sha256=dataset.tokenizer.sha256,
        documents=documents.write(
            storage,
            config.run_id,
            checkpoint.step,
            documents.Documents.of(rows, () if tasks is None else tasks.documents),
        ),
    )
    found = None if with_tasks else result.committed(config, dataset, checkpoint, storage, with_tasks=False)
    if found is not None:  # another evaluator's, perhaps with tasks
        return found
    result.commit(config, checkpoint, manifest, storage)
    return manifest


def _rows(
    text: HeldoutText, content: list[bytes], tokens: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], nats: Nats
) -> list[dict[str, Any]]:
    return [
        {"source": text.source, "key": xxhash.xxh3_128_hexdigest(piece), "tokens": int(n), "bytes": int(size), "nats": round(x, DOCUMENT_DECIMALS)}
        for piece, n, size, x in zip(content, tokens, sizes, nats.tolist(), strict=True)
    ]  # fmt: skip


def _score(nats: Nats, tokens: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> SourceScore:
    loss, bits = ratio(nats, tokens), ratio(nats / math.log(2), sizes)
    return SourceScore(
        documents=len(nats),
        tokens=int(tokens.sum()),
        text_bytes=int(sizes.sum()),
        loss=round(loss.value, DECIMALS),
        bits_per_byte=round(bits.value, DECIMALS),
        stderr=None if loss.stderr is None else round(loss.stderr, DECIMALS),
        bits_stderr=None if bits.stderr is None else round(bits.stderr, DECIMALS),
    )


def _baselines(text: bytes, tokens: Tokens) -> dict[str, float]:
    unigram = {"token frequencies": bits_per_byte(unigram_nats(tokens), len(text))}
    return {name: round(bits, DECIMALS) for name, bits in {**compressed_bits_per_byte(text), **unigram}.items()}
