"""A configuration for someone's data, from a look at it."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.formats import format_of
from data_prep.listing import InputFile, Listing, list_source
from data_prep.look import fields_of, look
from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, read_slice
from data_prep.tokenize_unit import open_input
from jobs.cli import program, refusing
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import SourceConfig, StorageConfig

PRESET = "debug"
IDS = ("id", "doc_id", "document_id", "uid", "uuid", "_id", "url")
TRIED = 20  # records a field is judged by
BYTES_A_TOKEN = 3.0
STEP = 8192  # tokens of a step of the preset
FEWEST, MOST = 40 * STEP, 240 * STEP  # a few minutes to a quarter of an hour on two cores
EPOCHS = 4

TEMPLATE = """\
# Made from {folder}: {files} files, {bytes} bytes. Look before you run:
#   moonlight check --config {name}        what is wrong, and what prepare will see (--document shows one)
#   moonlight run   --config {name}        prepare, train, evaluate, publish
#   moonlight status --config {name}
# Every setting is in pipeline/config/schema.py; what is not given here is the preset's.
preset: {preset} # a network of 7 million parameters, for one machine
run_id: {run_id}
storage: {{root: store}} # beside this file, or s3://bucket/prefix
corpus:
  heldout_fraction: {heldout} # of the documents, to evaluate on
  sources:
    - name: {run_id}
      path: {path}
{fields}      max_epochs: {epochs} # how often a document may be seen
schedule: {{total_tokens: {tokens}}} # {steps} steps; more trains longer, everything else keeps its shape
publishing: {{name: {run_id}, sample_prompts: [{prompt}]}}
"""


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.init`. Returns the exit code."""
    made = argparse.ArgumentParser(
        prog=program("init"), description="Look at a folder of data and write a configuration for it."
    )
    made.add_argument("folder", type=Path, help="of JSON Lines, Parquet, CSV, text ...; or one file")
    made.add_argument("--output", type=Path, default=Path("run.yaml"), help="the configuration (run.yaml)")
    given = made.parse_args(arguments)
    for line in write(given.folder, given.output):
        print(line)
    return 0


def write(folder: Path, output: Path) -> Iterator[str]:
    """Write the configuration, and say what was found. Raises ConfigError if there are no data or the output is there."""
    if output.exists():
        raise ConfigError(f"--output {output} is there already; give another name")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it")
    path = folder.expanduser().resolve()
    name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:30].strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    source = SourceConfig(name=name, path=str(path))
    try:
        files = list_source(source, 0, StorageConfig())
    except ConfigError as error:
        raise ConfigError(str(error).replace("corpus.sources[0].path", "FOLDER")) from None
    source, fields = _with_fields(source, files)
    preset = load_config(PRESET)
    corpus = preset.corpus.model_copy(update={"sources": (source,)})
    seen = look(source, 0, files, preset.model_copy(update={"corpus": corpus}))
    size = files.bytes
    tokens = min(max(round(EPOCHS * size / BYTES_A_TOKEN / STEP) * STEP, FEWEST), MOST)
    epochs = max(EPOCHS, round(4 * tokens * BYTES_A_TOKEN / max(size, 1)))
    prompt = seen.kept[0].text[:200].decode(errors="ignore").strip()[:24] if seen.kept else "The"
    chosen = (
        [f"      text_field: {json.dumps(source.text_field)} # it has {', '.join(fields[:12])}\n"] if fields else []
    )
    chosen += [f"      id_field: {json.dumps(source.id_field)}\n"] if source.id_field else []
    output.write_text(
        TEMPLATE.format(
            folder=path, files=f"{len(files):,}", bytes=f"{size:,}", name=output, preset=PRESET, run_id=name,
            heldout=0.05 if seen.seen >= 100 else 0.2, path=json.dumps(str(path)), fields="".join(chosen), epochs=epochs,
            tokens=tokens, steps=tokens // STEP, prompt=json.dumps(prompt or "The", ensure_ascii=True),
        )
    )  # fmt: skip
    yield from seen.lines()
    yield f"wrote {output}; next: moonlight check --config {output}"


def _with_fields(source: SourceConfig, files: Listing) -> tuple[SourceConfig, list[str]]:
    """The source with the field that holds most text, and the fields of its first file (none: plain text)."""
    file = next(file for file in files if file.bytes)
    with open_input(files.root, file.path, StorageConfig()) as handle:
        fields = fields_of(file.path, handle, format_of(file.path, source.format)) or []
    if not fields:
        return source, []
    sizes = {field: _text_of(source.model_copy(update={"text_field": field}), files.root, file) for field in fields}
    best = max(fields, key=lambda field: (sizes[field], field == "text"))
    if not sizes[best]:
        raise ConfigError(f"FOLDER: no field of {file.path} holds text; it has {', '.join(fields[:30])}")
    chosen: dict[str, str] = {"text_field": best}
    found = next((name for name in IDS if name in fields and name != best), None)
    return source.model_copy(update=chosen | ({"id_field": found} if found else {})), fields


def _text_of(source: SourceConfig, root: str, file: InputFile) -> int:
    """Bytes of text in a field of the first records."""
    reader = ReaderSettings.of(source, 1 << 25)
    with open_input(root, file.path, StorageConfig()) as handle:
        records = itertools.islice(read_slice(Slice(file.path, file.bytes, file.identity), handle, reader), TRIED)
        return sum(len(record.text) for record in records if not record.reason)
