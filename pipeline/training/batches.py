"""From the closed-form data order to the micro-batches of a step.

Step t trains on the `global_batch` training sequences after `next_sequence`, whatever the number of ranks; rank r gets
those with n % world == r (pipeline/dataset/loader.py, which also reads ahead). Here they get their labels: the next
token of the row, and -100 (no loss) at the row's end, in padding and right before it, and with document masks at each
document's last token. With `training.loss_on: answers` the next token is a label only inside an answer of a conversation, the
token that ends it included (tokenizer/chat.py).

Legend: B rows, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.dataset.loader import Loader
from pipeline.model.loss import IGNORE
from pipeline.tokenizer.chat import AnswerMarks


@dataclass(frozen=True)
class MicroBatch:
    tokens_BS: Tensor  # int64
    labels_BS: Tensor  # int64, -100: no loss
    lengths: list[int]  # tokens of text in each row; the rest is padding
    doc_lens: list[list[int]] | None  # None: plain causal attention

    @property
    def sequences(self) -> int:
        """Rows that hold text."""
        return sum(length > 0 for length in self.lengths)


@dataclass(frozen=True)
class StepBatch:
    """This rank's share of one step."""

    micro_batches: list[MicroBatch]
    labels: int  # that count, on this rank


def labels_of(tokens_BS: Tensor, doc_lens: list[list[int]], document_mask: bool) -> Tensor:
    labels_BS = torch.full_like(tokens_BS, IGNORE)
    labels_BS[:, :-1] = tokens_BS[:, 1:]
    for row, lengths in enumerate(doc_lens):
        ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        used = int(ends[-1]) if lengths else 0
        labels_BS[row, max(used - 1, 0) :] = IGNORE
        if document_mask:
            labels_BS[row, ends - 1] = IGNORE
    return labels_BS


def answers_of(tokens_BS: Tensor, marks: AnswerMarks) -> Tensor:
    """Which tokens are part of an answer, bool [B, S]: those after `marks.begin` up to the next `marks.end`, it included."""
    B, S = tokens_BS.shape
    width = len(marks.begin)
    opened_BS = torch.zeros(B, S, dtype=torch.bool)  # at the last token of what stands before an answer
    if width <= S:
        windows = tokens_BS.unfold(1, width, 1)
        opened_BS[:, width - 1 :] = (windows == torch.tensor(marks.begin)).all(-1)
    event_BS = opened_BS | (tokens_BS == marks.end)
    last_BS = torch.where(event_BS, torch.arange(S), -1).cummax(1).values
    before_BS = torch.cat([torch.full((B, 1), -1), last_BS[:, :-1]], dim=1)  # the last event before each token
    return opened_BS.gather(1, before_BS.clamp(min=0)) & (before_BS >= 0)


def read_step(
    loader: Loader,
    first: int,
    sequences: int,
    micro_batch: int,
    document_mask: bool,
    answers: AnswerMarks | None = None,
) -> StepBatch:
    """This rank's rows of training sequences [first, first + sequences), cut into micro-batches. `answers`: labels only there."""
    batch = loader.batch(first, sequences)
    rows = len(batch.doc_lens)
    assert rows * loader.world == sequences, (rows, loader.world, sequences)  # the configuration makes batches divide
    labels_BS = labels_of(batch.tokens_BS, batch.doc_lens, document_mask)
    if answers is not None:
        inside_BS = answers_of(batch.tokens_BS, answers)
        labels_BS[:, :-1].masked_fill_(~inside_BS[:, 1:], IGNORE)
    micro_batches = [
        MicroBatch(
            batch.tokens_BS[row : row + micro_batch],
            labels_BS[row : row + micro_batch],
            [sum(lengths) for lengths in batch.doc_lens[row : row + micro_batch]],
            batch.doc_lens[row : row + micro_batch] if document_mask else None,
        )
        for row in range(0, rows, micro_batch)
    ]
    return StepBatch(micro_batches, int((labels_BS != IGNORE).sum()))
