"""Conversations through prepare: laid out by the template, never cut, and each one that is left out counted by its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.identity import list_corpus
from data_prep.look import look
from data_prep.prepare import prepare
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig, TokenizerConfig
from pipeline.dataset.verify import verify
from pipeline.file_index import open_index
from pipeline.storage import open_storage
from pipeline.tokenizer import Encoder, train_tokenizer
from tests.data_prep.test_prepare import packed_documents
from tests.tokenizer.test_chat import SPECIAL

Make = Callable[..., RunConfig]


def said(*pairs: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


GOOD = [said(("user", f"What is {n} times 2?"), ("assistant", f"It is {2 * n}. " * (1 + n % 5))) for n in range(40)]
BAD: list[dict[str, object]] = [
    said(("user", "Is anybody there?")),
    said(("user", "Hello?"), ("assistant", "")),
    {"messages": "user: hi"},
    {"messages": [{"role": "user"}]},
    {"text": "no messages"},
    said(("user", "Write a lot."), ("assistant", "word " * 400)),
]


@pytest.fixture
def tokenizer(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, data in train_tokenizer(texts[:20], TokenizerConfig(vocab_size=600, special_tokens=SPECIAL)).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, [*GOOD[:25], *BAD])))
    (folder / "b.json").write_text(json.dumps(GOOD[25:], indent=1))
    return folder


def config_of(run_config: Make, chats: Path, folder: Path, **changes: object) -> RunConfig:
    source = {"text_field": "messages", "conversations": True, **changes.pop("source", {})}
    given = {"tokenizer": json.dumps({"path": str(folder)}), "data__packing": "whole", "data__sequence_length": 128}
    given |= {"training__sequence_length": 128, "data__rows_per_group": 1}
    return run_config(chats, source=source, **given | changes)


def test_every_conversation_is_whole_or_counted(chats: Path, tokenizer: Path, run_config: Make) -> None:
    config = config_of(run_config, chats, tokenizer, corpus__keep_rejected="true")
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    assert verify(dataset, storage).findings == ()
    reasons = [
        pq.read_table(storage.open(file.path))["reason"].to_pylist()
        for file in open_index(storage, dataset).rejected[0]
    ]
    assert any("longer_than_a_row" in found for found in reasons)
    counts = dataset.sources[0].counts
    assert counts.docs_in == len(GOOD) + len(BAD)
    assert counts.filtered == {"longer_than_a_row": 1, "no_answer": 2}
    assert counts.quarantined == {"missing_field": 1, "not_messages": 2}
    assert counts.docs_out + counts.heldout == len(GOOD)

    encoder = Encoder.load(tokenizer)
    expected, offsets, _ = encoder.chat.encode([json.dumps(each["messages"]).encode() for each in GOOD], encoder)
    whole = {tuple(expected[a:b].tolist()) for a, b in zip(offsets, offsets[1:])}
    trained = packed_documents(storage, dataset)
    assert len(trained) == counts.docs_out
    assert {tuple(piece[:-1]) for piece in trained} <= whole
    assert all(piece[-1] == dataset.tokenizer.eos_id for piece in trained)
    assert max(map(len, trained)) <= 128
    assert np.dtype(dataset.token_dtype).itemsize == 2


def test_filters_judge_what_is_said(tmp_path: Path, tokenizer: Path, run_config: Make) -> None:
    """As JSON the first has 66 characters, the second a single line, and the third mostly letters."""
    bad = [
        said(("user", "Hi"), ("assistant", "Yo")),
        said(("user", "Say it four times, please, each on a line."), ("assistant", "Again and again.\n" * 4)),
        said(("user", "What?"), ("assistant", "-=" * 40)),
    ]
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.jsonl").write_text("\n".join(map(json.dumps, [*GOOD, *bad])))
    filters = {"min_characters": 25, "max_repeated_line_fraction": 0.5, "min_alphanumeric_fraction": 0.4}
    config = config_of(run_config, tmp_path / "chats", tokenizer, source={"filters": filters})
    expected = {"min_characters": 1, "max_repeated_line_fraction": 1, "min_alphanumeric_fraction": 1}
    seen = look(config.corpus.sources[0], 0, list_corpus(config)["main"], config)
    assert seen.filtered == expected
    assert prepare(config, open_storage(config.storage)).sources[0].counts.filtered == expected


def test_other_files_are_no_conversations(tmp_path: Path, tokenizer: Path, run_config: Make) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("messages\nhello\n")
    config = config_of(run_config, tmp_path / "texts", tokenizer)
    with pytest.raises(ValueError, match="not_messages 1"):
        prepare(config, open_storage(config.storage))


def test_a_tokenizer_without_a_template_is_refused_before_any_unit(
    chats: Path, tmp_path: Path, run_config: Make
) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for name, data in train_tokenizer(["some text"] * 9, TokenizerConfig(vocab_size=300)).items():
        (folder / name).write_bytes(data)
    config = config_of(run_config, chats, folder)
    with pytest.raises(ValueError, match="no chat template"):
        prepare(config, open_storage(config.storage))
    assert not open_storage(config.storage).list("datasets/units")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__packing": "best_fit"}, "data.packing best_fit: source 'main' holds conversations"),
        ({"tokenizer": '{"vocab_size": 600}'}, "a tokenizer is not trained on conversations"),
        ({"source": {"format": "parquet"}}, "conversations are read from JSON and JSON lines, and format is 'parquet'"),
        (
            {"training__loss_on": "answers", "source": {"conversations": False}},
            "training.loss_on answers: every source has to hold conversations",
        ),
        (
            {"training__loss_on": "answers", "training__sequence_length": 64},
            "training.sequence_length 64 must be data.sequence_length 128 with training.loss_on answers",
        ),
    ],
)
def test_settings_that_make_no_sense(
    chats: Path, tokenizer: Path, run_config: Make, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(run_config, chats, tokenizer, **changes)
