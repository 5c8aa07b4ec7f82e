"""One measured run of `data_prep.prepare` for benchmarks/prepare.py: folder, format, tokenizer, round -> a JSON line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks.prepare import Meter
from data_prep.prepare import prepare
from data_prep.tokenizer_stage import ensure_tokenizer
from pipeline.config.load import load_config
from pipeline.storage import open_storage


def main(folder: Path, name: str, tokenizer: Path) -> None:
    root = folder / f"ours-{name.partition('.')[0]}"
    shutil.rmtree(root, ignore_errors=True)
    vocab_size = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"][-1]["id"] + 1
    sources = [{"name": "text", "path": str(folder / name), "max_epochs": 1}]
    corpus = {"sources": sources, "heldout_fraction": 0.001, "unit_bytes": 500_000_000}
    overrides = {
        "storage.root": root,
        "tokenizer": json.dumps({"path": str(tokenizer)}),
        "model.vocab_size": vocab_size,
        "corpus": json.dumps(corpus),
        "data": json.dumps({"sequence_length": 4096}),
    }
    config = load_config("debug", [f"{key}={value}" for key, value in overrides.items()])
    storage = open_storage(config.storage)
    ensure_tokenizer(config, storage, {})  # once for any number of terabytes: not measured
    meter = Meter()
    dataset = prepare(config, storage)
    counts = dataset.sources[0].counts
    assert counts.docs_in == counts.docs_out + counts.heldout, counts
    heldout = dataset.sources[0].heldout
    text_bytes = dataset.sources[0].text_bytes + sum(file.text_bytes for file in heldout)
    print(json.dumps(meter.result(text_bytes, dataset.tokens)))


if __name__ == "__main__":
    if len(sys.argv) <= 3:
        raise SystemExit("a part of python -m benchmarks.prepare, which starts it")
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
