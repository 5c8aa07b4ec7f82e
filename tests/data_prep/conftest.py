"""Small corpora of real text and run configurations over them."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """120 modules of the standard library: about 1.5 MB of real text."""
    paths = sorted(path for path in STDLIB.glob("*.py") if 2_000 < path.stat().st_size < 40_000)
    return [path.read_text() for path in paths[:120]]


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    """A source of four JSONL files with 30 documents each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(4):
        lines = [
            json.dumps({"text": text, "id": f"{part}-{i}"}) for i, text in enumerate(texts[part * 30 : part * 30 + 30])
        ]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """run_config(source path, key=value, ...): one source, small everything. `__` stands for '.'."""

    def make(path: Path | str, **changes: Any) -> RunConfig:
        source = {"name": "main", "path": str(path), **changes.pop("source", {})}
        overrides = {
            "storage.root": str(tmp_path / "root"),
            "tokenizer": json.dumps({"vocab_size": 600, "training_bytes": 200_000}),
            "model.vocab_size": 600,
            "corpus": json.dumps(
                {"sources": [source], "unit_bytes": 300_000, "heldout_fraction": 0.1, "heldout_max_documents": 5}
            ),
            "data.sequence_length": 512,
            "data.rows_per_group": 4,
            "data.max_padding": 1.0,  # units of a few rows, the last of each half empty
            "data.groups_per_file": 8,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return load_config("debug", [f"{key}={value}" for key, value in overrides.items()])

    return make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, without a dashboard."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    yield
    ray.shutdown()
