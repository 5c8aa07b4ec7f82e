"""What was found over all sources is verified: near-duplicates, questions of tasks, and the files of units behind both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_prep.contamination.questions import to_bytes, write_questions
from data_prep.prepare import prepare
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.dataset.verify import verify
from pipeline.storage import open_storage


@pytest.mark.parametrize(
    "pattern", ["near-*.duplicates", "near-*.clusters", "seen.parquet", "questions/*/*.parquet", "*.bands", "*.seen", "*.index"]
)  # fmt: skip
def test_a_flip_and_a_loss_are_found(searched: Path, pattern: str) -> None:
    config = RunConfig.model_validate_json((searched / "config.json").read_bytes())
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    path = max(Path(storage.root).rglob(pattern), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    assert data
    name = str(path.relative_to(storage.root))
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert any(name in str(finding) and "SHA-256" in str(finding) for finding in verify(dataset, storage).findings)
    path.unlink()
    assert any(name in str(finding) and "missing" in str(finding) for finding in verify(dataset, storage).findings)
    path.write_bytes(data)
    assert verify(dataset, storage).findings == ()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A dataset with near-duplicates and questions in it, and its configuration beside it."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "corpus").mkdir()
    some = [*texts[:20], *(text + "\nand a line more" for text in texts[:5])]
    (folder / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    asked = {"exam": [(str(number), [text[300:600]]) for number, text in enumerate(texts[:30:3])]}
    return made(folder, asked)


def made(folder: Path, asked: dict[str, list[tuple[str, list[str]]]]) -> Path:

    corpus = {
        "sources": [{"name": "main", "path": str(folder / "corpus")}],
        "near_duplicates": {},
        "decontamination": {"action": "report", "questions": hashlib.sha256(to_bytes(asked)).hexdigest()},
    }
    settings = [
        f"storage.root={folder / 'root'}",
        'tokenizer={"vocab_size": 600, "training_bytes": 100000}',
        "model.vocab_size=600",
        "corpus=" + json.dumps(corpus),
        "data.max_padding=1.0",
    ]
    config = load_config("debug", settings)
    storage = open_storage(config.storage)
    write_questions(storage, asked)
    dataset = prepare(config, storage)
    assert dataset.near_duplicates is not None
    assert dataset.near_duplicates.count
    assert dataset.contamination is not None
    assert dataset.contamination.tasks["exam"].seen
    (folder / "config.json").write_text(config.model_dump_json())
    return folder
