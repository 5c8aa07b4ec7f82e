"""Questions to a network on several ranks: the same passes everywhere, the same answers as from one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.evaluation.forward import Forward
from pipeline.evaluation.result import EvaluationProgress
from pipeline.model.cache import CachedPass
from pipeline.model.loss import TokenScores
from tests.distributed import run_distributed

CPU = torch.device("cpu")


class Counting(torch.nn.Module):
    """Says the last token plus one, as likely as the token's number says, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.passes = self.tokens = 0

    def forward(
        self,
        inputs_BS: torch.Tensor,
        labels_N: torch.Tensor | None = None,
        *,
        at_N: torch.Tensor,
        cached: CachedPass | None = None,
        lengths: list[int] | None = None,
    ) -> TokenScores | torch.Tensor:
        self.passes += 1
        self.tokens += inputs_BS.numel()
        if cached is not None:
            cached.layout(inputs_BS.shape[1], 8, 1e4, CPU)
            cached.layer(0).new_BSX = inputs_BS.unsqueeze(-1).float()
            cached.finish()
        next_N = inputs_BS.flatten()[at_N] + 1
        if labels_N is None:
            return torch.nn.functional.one_hot(next_N, 12).float()
        return TokenScores(-labels_N.float() + self.weight, next_N)


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
        [([1, 2, 3], 2), ([1, 2, 4], 1), ([5, 6], 1), ([5, 6, 7, 8], 1), ([4, 4, 4], 2)], "x"
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
    assert scores == [(-5.0, True), (-4.0, False), (-6.0, True), (-8.0, True), (-8.0, False)]  # two share their inputs
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


def shared_answers() -> tuple[Any, int]:
    """Four questions after twenty examples, each with answers of one and of two tokens; then texts after the same examples."""
    model = Counting()
    forward = Forward(model, Digits(), batch=4, report=ignore)
    if forward.rank > 0:
        return forward.follow(), model.tokens
    examples, answers = [3, 5] * 40, [[2], [4], [6, 7], [6, 8]]
    scores = forward.log_likelihoods(
        [([*examples, *[n] * 30, *tail], len(tail)) for n in range(4) for tail in answers], "x"
    )
    texts = forward.greedy([[*examples, n] for n in range(4)], (), 3, "y")
    forward.end((scores, texts))
    return (scores, texts), model.tokens


def test_what_questions_share_runs_once():
    (scores, texts), tokens = shared_answers()
    assert scores == [
        score for n in range(4) for score in ((-2.0, n == 1), (-4.0, n == 3), (-13.0, n == 5), (-14.0, False))
    ]
    assert texts == ["123", "234", "345", "456"]
    assert tokens == 80 + 8 * 31 + 80 + 4 + 4 * 2  # 8 rows of 111 and 4 of 81 to 83 without sharing
    two = run_distributed(shared_answers, 2)
    assert [answers for answers, _ in two] == [(scores, texts)] * 2


def test_an_answer_without_tokens_is_no_perfect_one():
    with pytest.raises(AssertionError):
        Forward(Counting(), Digits(), batch=2, report=ignore).log_likelihoods([([5, 6], 0)], "x")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_network_without_numbers_scores_nothing(value: float):
    model = Counting()
    torch.nn.init.constant_(model.weight, value)
    with pytest.raises(ValueError, match=r"2 of 2 log-likelihoods are not finite numbers.*evaluation\.checkpoint"):
        Forward(model, Digits(), batch=2, report=ignore).log_likelihoods([([5, 6], 1), ([5, 7], 1)], "x")
