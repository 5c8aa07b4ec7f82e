"""Questions to a network on several ranks: the same passes everywhere, the same answers as from one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.evaluation.forward import Forward
from pipeline.evaluation.result import EvaluationProgress
from pipeline.model.loss import TokenScores
from tests.distributed import run_distributed


class Counting(torch.nn.Module):
    """Says the last token plus one, as likely as the token's number says, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.passes = 0

    def forward(self, inputs_BS: torch.Tensor, labels_N: torch.Tensor, *, at_N: torch.Tensor) -> TokenScores:
        self.passes += 1
        return TokenScores(-labels_N.float(), inputs_BS.flatten()[at_N] + 1)


class Digits:
    """Token 9 is the EOS, 8 is special, the others are digits."""

    eos_id = 9
    special_tokens = {"[EOS]": 9, "[PAD]": 8}

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(str, tokens))


def ignore(_: object) -> None:
    pass


def rank_answers() -> Any:
    model = Counting()
    reports: list[EvaluationProgress] = []
    forward = Forward(model, Digits(), batch=2, report=reports.append)
    if forward.rank > 0:
        return forward.follow(), model.passes, len(reports)
    scores = forward.log_likelihoods(
        [([1, 2, 3], 2), ([1, 2, 4], 1), ([5, 6], 1), ([5, 6, 7, 8], 0), ([4, 4, 4], 2)], "x"
    )
    texts = forward.greedy([[1], [2, 3], [6], [4, 5], [7]], ("56", ""), 5, "y")
    forward.end((scores, texts))
    assert [(at.done_tokens, at.total_tokens) for at in reports if at.doing == "x"][-1] == (8, 8)
    assert reports[-1].done_tokens == reports[-1].total_tokens == 5 + 3 + 3 + 4 + 2
    assert sum(at.new_tokens for at in reports if at.doing == "y") == reports[-1].done_tokens
    return (scores, texts), model.passes, 0


def answers_and_failure() -> tuple[Any, str]:
    """Of one process group: what came of questions, and what a rank learns when rank 0 cannot ask any more."""
    answers = rank_answers()
    forward = Forward(Counting(), Digits(), batch=1, report=ignore)
    if forward.rank == 0:
        forward.end(error=ValueError("no room"))
        return answers, ""
    with pytest.raises(RuntimeError) as failed:
        forward.follow()
    return answers, str(failed.value)


def test_ranks_run_the_same_passes_and_all_learn_the_answers():
    (scores, texts), passes, _ = rank_answers()
    assert scores == [(-5.0, True), (-4.0, False), (-6.0, True), (0.0, True), (-8.0, False)]  # two share their inputs
    assert texts == [
        "23456",
        "456",
        "7",
        "67",
        "",
    ]  # enough; a stop; EOS after a special token; no stop with the prompt's 5
    two = run_distributed(answers_and_failure, 2)
    assert [answers for (answers, _, _), _ in two] == [(scores, texts)] * 2
    assert two[0][0][1] == two[1][0][1] < passes
    assert two[1][0][2] == 0  # rank 0 reports
    assert [failure for _, failure in two] == ["", "rank 0 failed: ValueError: no room"]
