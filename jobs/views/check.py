"""What `moonlight check` says: the network, the data as prepare will see it, the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.look import Look, look
from data_prep.tokenizer_stage import find_tokenizer
from jobs.stages.records import Records
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder

SHOWN_TOKENS = 60


def lines(config: RunConfig, storage: Storage, records: Records, *, document: bool) -> Iterator[str]:
    """All that is known before anything is started; with `document` one document with its tokens. Raises ConfigError."""
    from pipeline.planner.estimate import (  # here: it builds the network on the meta device, hence torch
        Hardware,
        estimate,
    )

    found = estimate(config, Hardware())
    yield (
        f"network: {found.parameters.total:,} parameters, {found.parameters.active:,} used by a token; {found.steps:,} steps, "
        f"{found.checkpoint_bytes / 1e9:,.1f} GB a checkpoint"
    )
    _check_disk(storage, found.checkpoint_bytes * (config.checkpoint.keep + 1))
    if records.done("prepare"):
        yield "data: prepared"
        return
    listings = records.corpus(config)
    looks = [look(source, index, listings[source.name], config) for index, source in enumerate(config.corpus.sources)]
    manifest = find_tokenizer(config, storage, listings)
    encoder = None if manifest is None else Encoder.load(manifest.folder, storage)
    for each in looks:
        yield from each.lines()
        yield from _tokens(each, encoder)
    if document:
        yield from _document(looks, encoder)


def _tokens(seen: Look, encoder: Encoder | None) -> Iterator[str]:
    size = sum(len(record.text) for record in seen.kept)
    if encoder is None:
        yield f"  {size:,} bytes of text in them; their tokens are known once the tokenizer is trained"
    elif size:
        tokens = len(encoder.encode([record.text for record in seen.kept])[0])
        yield f"  {size:,} bytes of text in them, {tokens:,} tokens: about {seen.bytes * tokens // size:,} in the source, if uncompressed"


def _document(looks: list[Look], encoder: Encoder | None) -> Iterator[str]:
    record = next((each.kept[0] for each in looks if each.kept), None)
    if record is None:
        return
    text = record.text.decode()
    yield f"--- {record.location}"
    yield text[:2000] + (" ..." if len(text) > 2000 else "")
    if encoder is not None:
        ids = encoder.encode([record.text])[0][:SHOWN_TOKENS]
        yield "--- " + " | ".join(repr(encoder.decode([int(token)]))[1:-1] for token in ids)


def _check_disk(storage: Storage, wanted: int) -> None:
    if storage.config.is_s3:
        return
    folder = next(parent for parent in (Path(storage.root), *Path(storage.root).parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ConfigError(
            f"storage.root: {storage.root} has {free / 1e9:,.1f} GB free, and the checkpoints alone want {wanted / 1e9:,.1f}; "
            "lower checkpoint.keep or choose another folder"
        )
