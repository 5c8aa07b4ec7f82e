"""Fine-tuning: the loss of the answers alone is transformers' with every other label masked."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.dataset.loader import Batch
from pipeline.model.loss import IGNORE
from pipeline.tokenizer.chat import AnswerMarks
from pipeline.training.batches import read_step
from tests.model.oracle import oracle_of, random_model, small_config

MARKS = AnswerMarks((5, 20, 6), 7)  # <assistant> "assistant" <middle>, <end>
EOS = 1


def conversation(rng: np.random.Generator, *answers: int) -> list[int]:
    """Questions of 4 tokens and answers of so many."""
    found: list[int] = []
    for length in answers:
        found += [
            4,
            21,
            6,
            *rng.integers(30, 96, 4).tolist(),
            7,
            *MARKS.begin,
            *rng.integers(30, 96, length).tolist(),
            7,
        ]
    return [*found, EOS]


def masked(tokens: list[int]) -> list[int]:
    """As fine-tuning with transformers does it: -100 for all but the answers and what ends them, found turn by turn."""
    labels, at = [-100] * len(tokens), 0
    while at < len(tokens):
        if tuple(tokens[at : at + 3]) == MARKS.begin:
            end = tokens.index(MARKS.end, at)
            labels[at + 3 : end + 1] = tokens[at + 3 : end + 1]
            at = end
        at += 1
    return labels


class Rows:
    """A loader of given rows."""

    world = 1

    def __init__(self, tokens: list[list[int]], doc_lens: list[list[int]]) -> None:
        self._batch = Batch(torch.tensor(tokens), doc_lens, np.arange(len(tokens)))

    def batch(self, first: int, sequences: int) -> Batch:
        return self._batch


def test_the_loss_is_transformers_on_masked_labels():
    rng = np.random.default_rng(0)
    rows = [[conversation(rng, 3, 5), conversation(rng, 1)], [conversation(rng, 6, 2), conversation(rng, 4)]]
    length = max(sum(map(len, row)) for row in rows)
    tokens = [[token for each in row for token in each] for row in rows]
    padded = [row + [EOS] * (length - len(row)) for row in tokens]
    loader = Rows(padded, [[len(each) for each in row] for row in rows])
    step = read_step(loader, 0, 2, 2, True, MARKS)  # type: ignore[arg-type]
    (micro,) = step.micro_batches

    model = random_model(small_config())
    oracle = oracle_of(model)
    total, count = 0.0, 0
    for row in rows:
        for each in row:
            labels = torch.tensor([masked(each)])
            number = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                total += float(oracle(torch.tensor([each]), labels=labels).loss) * number
            count += number
    assert step.labels == count == int((micro.labels_BS != IGNORE).sum())
    with torch.no_grad():
        out = model(micro.tokens_BS, micro.labels_BS, micro.doc_lens, lengths=micro.lengths)
    assert abs(float(out.loss_sum) - total) < 1e-3 * total
    everything = read_step(loader, 0, 2, 2, True)  # type: ignore[arg-type]
    assert everything.labels > 2 * count


def test_an_answer_as_long_as_the_row_and_none():
    row = [*MARKS.begin, 40, 41, 42, 7, EOS]
    step = read_step(Rows([row, [9] * 7 + [EOS]], [[8], [8]]), 0, 2, 1, True, MARKS)  # type: ignore[arg-type]
    first, second = (micro.labels_BS[0].tolist() for micro in step.micro_batches)
    assert first == [-100, -100, 40, 41, 42, 7, -100, -100]
    assert second == [-100] * 8
    assert step.labels == 4
