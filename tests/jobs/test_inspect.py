"""`jobs.inspect`: the documents it names contain the text of the rows; its mixture is what the order draws."""

import json
import re

import numpy as np
import pytest

from jobs import inspect
from pipeline.dataset.order import Order, step_sequences
from pipeline.dataset.provenance import Provenance, row_tokens, sequences
from pipeline.file_index import open_index
from pipeline.tokenizer.encoder import Encoder
from tests.jobs.conftest import Prepared


def run(prepared: Prepared, capsys: pytest.CaptureFixture, *what: str) -> tuple[int, str, str]:
    preset, overrides = prepared.arguments[:2], prepared.arguments[2:]
    words = [word for word in what if "=" not in word]
    code = inspect.main([*preset, *words, *overrides, *what[len(words) :]])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_documents_of_a_step_contain_its_text(prepared: Prepared) -> None:
    """Each piece, decoded, is the named part of the named file: long documents cut over rows, and short ones."""
    order = Order.of_run(prepared.config, prepared.dataset)
    encoder = Encoder.load(prepared.dataset.tokenizer.folder, prepared.storage)
    first, count = step_sequences(prepared.config.schedule, order.sequence_length, 2)
    assert (first, count) == (16, 16)
    pieces = whole = 0
    for found in sequences(order, prepared.storage, range(first, first + 8 * count)):
        doc_lens, ended = check_provenance(prepared, order, encoder, found)
        pieces += len(doc_lens)
        whole += ended
    assert pieces > 128
    assert whole > 3


def test_documents_of_rows_that_were_gathered_from_several_units(prepared: Prepared) -> None:
    order = Order.of_run(prepared.config, prepared.dataset)
    encoder = Encoder.load(prepared.dataset.tokenizer.folder, prepared.storage)
    tails = {
        file["path"]
        for record in prepared.storage.list("datasets/tails")
        for file in json.loads(prepared.storage.read(record.path))["packed"]
    }
    n = np.arange(prepared.dataset.rows)
    location = order.locate(n)
    checked = 0
    for s, files in enumerate(open_index(prepared.storage, prepared.dataset).packed):
        ends = np.cumsum([file.rows for file in files])
        in_tail = np.isin(ends, [end for end, file in zip(ends, files) if file.path in tails])
        rows = (location.source == s) & in_tail[
            np.searchsorted(ends, location.row, side="right").clip(max=len(ends) - 1)
        ]
        for found in sequences(order, prepared.storage, n[rows][:6].tolist()):
            assert found.path in tails
            check_provenance(prepared, order, encoder, found)
            checked += 1
    assert checked > 0


def check_provenance(prepared: Prepared, order: Order, encoder: Encoder, found: Provenance) -> tuple[list[int], int]:
    """Each piece of the row is the named part of the named file. Returns its lengths, and how many are whole documents."""
    location = order.locate(found.number)
    assert found.source == order.source_names[int(location.source)]
    tokens, doc_lens = row_tokens(order, prepared.storage, found.source, int(location.row))
    assert doc_lens == found.doc_lens
    start = whole = 0
    for length, piece in zip(doc_lens, found.pieces, strict=True):
        body = tokens[start : start + length]
        ended = int(body[-1] == encoder.eos_id)
        assert piece.stop - piece.start == length - ended
        expected, _ = encoder.encode([prepared.texts[found.source][piece.document].encode()])
        assert np.array_equal(expected[piece.start : piece.stop], body[: length - ended])
        assert not ended or piece.stop == len(expected)
        start += length
        whole += ended and piece.start == 0
    return doc_lens, whole


def test_shorter_sequences_name_their_part_of_the_row(prepared: Prepared) -> None:
    config = prepared.config
    order = Order(prepared.dataset, config.data, config.corpus, 128, config.seed)
    whole = list(sequences(Order.of_run(config, prepared.dataset), prepared.storage, range(6)))
    parts = list(sequences(order, prepared.storage, range(24)))
    for row in range(6):
        cut = parts[4 * row : 4 * row + 4]
        assert [found.part for found in cut] == [0, 1, 2, 3]
        assert {(found.path, found.row_group, found.row) for found in cut} == {
            (whole[row].path, whole[row].row_group, whole[row].row)
        }
        assert sum(sum(found.doc_lens) for found in cut) == sum(whole[row].doc_lens)
        assert {piece for found in cut for piece in found.pieces} == set(whole[row].pieces)


def test_the_commands_print_lines(prepared: Prepared, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(prepared, capsys, "step", "1")
    assert code == 0
    assert out.startswith("step 1: sequences 0 to 15\n0: ")
    assert len(re.findall(r"^\d+: (even|odd), epoch 0, datasets/packed/", out, re.MULTILINE)) == 16

    code, one, _ = run(prepared, capsys, "sequence", "3")
    assert code == 0
    assert one in out

    code, out, _ = run(prepared, capsys, "mixture")
    assert code == 0
    assert "of every 6 rows of a lane: even 4, odd 2" in out
    order = Order.of_run(prepared.config, prepared.dataset)
    drawn = np.bincount(order.locate(np.arange(960)).source)
    assert re.search(rf"^even +{drawn[0]} .*\nodd +{drawn[1]} ", out, re.MULTILINE)

    code, out, _ = run(prepared, capsys, "row", "odd", "0")
    assert code == 0
    text = out.split("\n", 2)[2].rstrip("\n")
    assert any(text[:200] in document for document in prepared.texts["odd"].values())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (("row", "even", "100000"), r"source 'even' has rows 0 to \d+, not 100000"),
        (("row", "none", "0"), r"no source is named 'none'; sources are \['even', 'odd'\]"),
        (("sequence", "960"), r"sequence 960 is not one of the run's sequences 0 to 959"),
        (("step", "61"), r"step 61 is not one of the run's steps 1 to 60"),
        (("mixture", "training.sequence_length=100"), r"training.sequence_length 100 must divide"),
        (
            ("mixture", "corpus.heldout_fraction=0.5"),
            r"no dataset [0-9a-f]{32} in .*there are: [0-9a-f]{32}; prepare it, or name one",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    prepared: Prepared, capsys: pytest.CaptureFixture, what: tuple[str, ...], message: str
) -> None:
    code, _, error = run(prepared, capsys, *what)
    assert code == 2
    assert re.search(message, error), error
    assert error.count("\n") == 1


def test_a_dataset_by_its_identity(prepared: Prepared, capsys: pytest.CaptureFixture) -> None:
    preset, overrides = prepared.arguments[:2], prepared.arguments[2:]
    name = ["--dataset", prepared.dataset.identity]
    assert inspect.main([*preset, *name, "mixture", *overrides, "corpus.heldout_fraction=0.5"]) == 0
    assert "even" in capsys.readouterr().out
