"""What a gate decides, with every number computed by hand or by statsmodels' way of weighing, not by the code under test."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config.gates import GateConfig
from pipeline.config.outcome import PublishingConfig
from pipeline.evaluation.documents import Documents
from pipeline.evaluation.errors import Estimate, independent, paired, ratio
from pipeline.manifest import EvaluationManifest, SourceScore, TaskMetric, TaskScore
from pipeline.publishing.compare import Scored
from pipeline.publishing.gate import Answer, GateError, judge

# Three documents of 10, 20 and 30 tokens that cost 20, 50 and 110 nats: 180 / 60 = 3 nats a token. Residuals x - 3 n:
# -10, -10, 20; their squares add up to 600. SE = sqrt(3/2 * 600) / 60 = 30 / 60 = 0.5.
TOKENS = np.array([10.0, 20.0, 30.0])
OURS = np.array([20.0, 50.0, 110.0])
# A model that costs 1, 3 and 5 nats less: 9 / 60 = 0.15 better. Residuals of the differences 1 - 0.15 * 10 = -0.5, 3 - 3 = 0,
# 5 - 4.5 = 0.5; squares 0.5. SE = sqrt(1.5 * 0.5) / 60 = 0.0144338: a thirtieth of the error of one score.
THEIRS = OURS - np.array([1.0, 3.0, 5.0])
PAIRED_SE = math.sqrt(0.75) / 60


def test_a_ratios_standard_error_by_hand():
    assert ratio(OURS, TOKENS) == Estimate(3.0, pytest.approx(0.5))
    found = paired(OURS, THEIRS, TOKENS)
    assert found.value == pytest.approx(0.15)
    assert found.stderr == pytest.approx(PAIRED_SE)
    assert independent(Estimate(3.0, 0.3), Estimate(2.0, 0.4)) == Estimate(1.0, pytest.approx(0.5))
    assert ratio(OURS[:1], TOKENS[:1]) == Estimate(2.0, None)
    assert independent(Estimate(3.0, None), Estimate(2.0, 0.4)).stderr is None


def test_of_equal_documents_it_is_the_standard_error_of_the_mean():
    values = np.random.default_rng(0).normal(size=50)
    assert ratio(values, np.ones(50)).stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_it_is_what_repeated_draws_show():
    """Of documents of very different length, where the error of a mean over tokens would be far off."""
    rng = np.random.default_rng(0)
    losses, errors = [], []
    for _ in range(2000):
        n = rng.geometric(1 / 80, size=60).astype(float)
        x = n * rng.normal(3.0, 0.4, size=60)  # a document's own level: its tokens are alike
        found = ratio(x, n)
        losses.append(found.value)
        errors.append(found.stderr)
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.05)


def scored(nats: np.ndarray, name: str = "m 1", **changes: Any) -> Scored:
    """Documents of two sources: the first two of `a`, the last of `b`."""
    rows = [
        {"source": "ab"[i == 2], "key": str(i), "tokens": int(n), "bytes": 4 * int(n), "nats": float(x)}
        for i, (n, x) in enumerate(zip(TOKENS, nats, strict=True))
    ]

    def score(rows: list[dict[str, Any]]) -> SourceScore:
        x, n = (np.array([row[key] for row in rows], float) for key in ("nats", "tokens"))
        loss, bits = ratio(x, n), ratio(x / math.log(2), 4 * n)
        return SourceScore(
            documents=len(rows), tokens=int(n.sum()), text_bytes=int(4 * n.sum()), loss=loss.value,
            bits_per_byte=bits.value, stderr=loss.stderr, bits_stderr=bits.stderr,
        )  # fmt: skip

    fields = {
        "identity": "i", "checkpoint_digest": "c", "dataset_digest": "d", "step": 1, "sequence_length": 8,
        "overall": score(rows), "sources": {"a": score(rows[:2]), "b": score(rows[2:])}, "unigram_entropy": 4.0,
        "baselines": {}, "source_baselines": {}, "tokenizer_sha256": "t",
    }  # fmt: skip
    return Scored(name, EvaluationManifest.model_validate(fields | changes), Documents.of(rows))


def ask(model: Scored, promoted: Scored | None, *gates: dict[str, Any], **settings: Any) -> Answer:
    return judge(PublishingConfig(gates=tuple(GateConfig(**gate) for gate in gates), **settings), model, promoted)


@pytest.mark.parametrize(
    ("gate", "is_open"),
    [
        ({"at_most": 3.0}, True),
        ({"at_most": 2.99}, False),
        ({"at_most": 2.6, "standard_errors": 1}, True),  # 0.4 <= 0.5
        ({"at_most": 2.4, "standard_errors": 1}, False),  # 0.6 > 0.5
        ({"at_most": 3.4, "standard_errors": -1}, False),  # has to be better by 0.5
        ({"at_most": 3.6, "standard_errors": -1}, True),
        ({"source": "a", "at_most": 70 / 30}, True),
        ({"source": "a", "at_most": 2.33}, False),
        ({"source": "b", "at_most": 3.6, "standard_errors": -1}, False),  # one document has no standard error
        ({"metric": "bits_per_byte", "at_most": 3 / math.log(2) / 4 + 1e-9}, True),
        ({"metric": "bits_per_byte", "at_most": 1.08}, False),
    ],
)
def test_fixed_limits(gate: dict[str, Any], is_open: bool):
    assert ask(scored(OURS), None, gate).open is is_open


@pytest.mark.parametrize(
    ("gate", "is_open"),
    [  # ours is 0.15 nats worse, give or take 0.0144
        ({"worse_by": 0.0}, False),
        ({"worse_by": 0.12}, False),  # 0.03 > 2 x 0.0144
        ({"worse_by": 0.13}, True),  # 0.02 <= 2 x 0.0144
        ({"worse_by": 0.149, "standard_errors": 0}, False),
        ({"worse_by": 0.151, "standard_errors": 0}, True),
        ({"worse_by": 0.16, "standard_errors": -1}, False),  # 0.01 better than the tolerance, and 0.0144 are asked for
        ({"worse_by": 0.17, "standard_errors": -1}, True),
        ({"source": "a", "worse_by": 4 / 30 - 0.001, "standard_errors": 0}, False),
        ({"source": "a", "worse_by": 4 / 30 + 0.001, "standard_errors": 0}, True),
    ],
)
def test_beside_the_promoted_model_on_the_same_documents(gate: dict[str, Any], is_open: bool):
    answer = ask(scored(OURS), scored(THEIRS), gate)
    assert answer.open is is_open
    if "source" not in gate:
        verdict = answer.verdicts[0]
        assert (verdict.value, verdict.stderr) == (pytest.approx(3.0), pytest.approx(PAIRED_SE))
        assert verdict.excess == pytest.approx(0.15 - gate["worse_by"])
        assert verdict.note == "beside m 1, paired over 3 documents"


def test_on_other_documents_the_errors_add_up():
    """0.15 worse, and the error of the difference is sqrt(0.5^2 + SE^2) or so: no evidence of anything."""
    other = scored(THEIRS)
    for elsewhere in (Scored("m 1", other.evaluation, None), scored_elsewhere(other)):
        verdict = ask(scored(OURS), elsewhere, {"worse_by": 0.0}).verdicts[0]
        theirs = other.evaluation.overall.stderr
        assert theirs is not None
        assert verdict.stderr == pytest.approx(math.hypot(0.5, theirs))
        assert not verdict.closed
        assert "on different documents" in verdict.note


def scored_elsewhere(model: Scored) -> Scored:
    assert model.documents is not None
    rows = [row | {"key": f"other {row['key']}"} for row in model.documents.heldout.to_pylist()]
    return Scored(model.name, model.evaluation, Documents.of(rows))


def test_of_documents_that_partly_differ_the_shared_ones_count():
    """Documents 1 and 2 are shared: 160 nats beside 152 over 50 tokens."""
    model = scored(OURS)
    assert model.documents is not None
    rows = model.documents.heldout.to_pylist()
    changed = Scored("m 2", model.evaluation, Documents.of([rows[0] | {"key": "new", "nats": 1e6}, *rows[1:]]))
    verdict = ask(changed, scored(THEIRS), {"worse_by": 0.0}).verdicts[0]
    assert verdict.value == pytest.approx(160 / 50)
    assert verdict.excess == pytest.approx(8 / 50)
    assert verdict.note == "beside m 1, paired over 2 documents that both were asked, of 3 and 3"


def test_another_tokenizer_compares_by_bytes_only():
    other = scored(THEIRS, tokenizer_sha256="u")
    answer = ask(scored(OURS), other, {"worse_by": 9.0}, {"metric": "bits_per_byte", "worse_by": 9.0})
    assert [bool(verdict.closed) for verdict in answer.verdicts[:2]] == [True, False]
    assert "m 1 has another tokenizer" in answer.why
    assert "use metric: bits_per_byte" in answer.why


def test_before_the_first_promotion_there_is_nothing_to_regress_from():
    answer = ask(scored(OURS), None, {"worse_by": 0.0})
    assert answer.open
    assert "nothing is promoted yet" in answer.table()


def test_a_refusal_names_every_gate_and_ends_in_the_table():
    answer = ask(
        scored(OURS), scored(THEIRS), {"worse_by": 0.0}, {"source": "a", "at_most": 2.0}, {"at_most": 9.0}, max_loss=2.5
    )
    with pytest.raises(GateError) as refused:
        answer.require()
    first, *table = str(refused.value).splitlines()
    assert first.startswith("publishing.max_loss: the held-out loss 3.0000 is over 2.5 nats per token.")
    assert (
        "gate loss, worse by at most 0 and 2 standard errors: 3.0000 is 0.1500 worse than 2.8500, 0.0289 granted"
        in first
    )
    assert "gate loss of source a, at most 2: 2.3333 is 0.3333 worse than 2.0000" in first
    assert first.endswith("nothing was published or promoted")
    assert table[0].split() == ["gate", "demand", "value", "limit", "worse", "by", "std", "error"]
    assert [row.split()[-1] for row in table[1:6]] == ["CLOSED", "CLOSED", "CLOSED", "open", "open"]
    assert table[-1] == "loss: beside m 1, paired over 3 documents"


# -- token frequencies -------------------------------------------------------------------------------------------------


def test_a_model_that_is_worse_than_token_frequencies_is_never_promoted_silently():
    worse = scored(OURS, unigram_entropy=2.99)
    answer = ask(worse, None)
    assert not answer.open
    assert "the held-out loss 3.0000 is over 2.9900, the entropy of the same tokens" in answer.why
    assert ask(worse, None, promote=False).open
    assert ask(worse, None, beats_frequencies=False).open
    assert ask(scored(OURS, unigram_entropy=3.01), None).open


# -- tasks -------------------------------------------------------------------------------------------------------------


def answered(right: list[int], name: str = "m 1", **changes: Any) -> Scored:
    """A task of as many questions, of which these were answered right, and a metric that is no mean over questions."""
    values = np.array([int(i in right) for i in range(20)], float)
    metrics = (
        TaskMetric(name="acc", filter="none", value=values.mean(), stderr=values.std(ddof=1) / math.sqrt(20), higher_is_better=True),
        TaskMetric(name="word_perplexity", filter="none", value=9.0, stderr=0.5, higher_is_better=False),
        TaskMetric(name="em", filter="strict", value=0.5, stderr=None, higher_is_better=True),
        TaskMetric(name="em", filter="flexible", value=0.6, stderr=None, higher_is_better=True),
        TaskMetric(name="odd", filter="none", value=None, stderr=None, higher_is_better=None),
    )  # fmt: skip
    task = TaskScore(version="1.0", few_shot=5, documents=20, group=None, metrics=metrics).model_copy(update=changes)
    rows = [{"task": "t", "filter": "none", "metric": "acc", "key": str(i), "value": x} for i, x in enumerate(values)]
    model = scored(OURS, name, tasks={"t": task})
    assert model.documents is not None
    return Scored(name, model.evaluation, Documents.of(model.documents.heldout.to_pylist(), rows))


def test_tasks_are_compared_question_by_question():
    """12 of 20 beside 13: one question more, two that only the other answers. Differences -1, -1, +1 and 17 zeros: mean -0.05,
    SE = sqrt((3 - 20 * 0.05^2) / 19 / 20) = 0.0881; as independent scores it would be 0.157."""
    ours, theirs = answered([*range(11), 13]), answered([*range(13)])
    verdict = ask(ours, theirs, {"task": "t", "metric": "acc", "worse_by": 0.0}).verdicts[0]
    assert (verdict.value, verdict.limit) == (0.6, 0.65)
    assert verdict.excess == pytest.approx(0.05)
    assert verdict.stderr == pytest.approx(math.sqrt((3 - 20 * 0.05**2) / 19 / 20))
    assert not verdict.closed  # 0.05 <= 2 x 0.088
    assert verdict.note == "beside m 1, paired over 20 questions"
    assert ask(ours, theirs, {"task": "t", "metric": "acc", "worse_by": 0.04, "standard_errors": 0}).why
    assert ask(ours, theirs, {"task": "t", "metric": "acc", "worse_by": 0.06, "standard_errors": 0}).open


def test_what_is_no_mean_over_questions_is_compared_as_independent():
    verdict = ask(answered([1]), answered([1]), {"task": "t", "metric": "word_perplexity", "worse_by": 0.0}).verdicts[0]
    assert verdict.stderr == pytest.approx(math.hypot(0.5, 0.5))
    assert "as independent scores" in verdict.note


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ({"task": "u", "metric": "acc", "at_least": 0.1}, "nobody computed task u for m 1; it has t"),
        ({"task": "t", "metric": "f1", "at_least": 0.1}, "the task has no such metric; it has acc, word_perplexity, em (strict), em (flexible), odd"),
        ({"task": "t", "metric": "em", "at_least": 0.1}, "its answers were cut in 2 ways: name the filter; there are"),
        ({"task": "t", "metric": "odd", "at_least": 0.1}, "it is no finite number"),
        ({"task": "t", "metric": "acc", "at_least": 0.7}, "0.6000 is 0.1000 worse than 0.7000"),
    ],
)  # fmt: skip
def test_a_gate_on_what_nobody_computed_is_closed(gate: dict[str, Any], why: str):
    answer = ask(answered([*range(12)]), None, gate)
    assert why in answer.why
    assert ask(answered([*range(12)]), None, {"task": "t", "metric": "em", "filter": "strict", "at_least": 0.5}).open


def test_scores_of_different_versions_or_shots_do_not_compare():
    gate = {"task": "t", "metric": "acc", "worse_by": 1.0}
    assert (
        "was asked version 2 with 5 examples, this one version 1.0 with 5"
        in ask(answered([1]), answered([1], version="2"), gate).why
    )
    assert "with 0 examples" in ask(answered([1]), answered([1], few_shot=0), gate).why


# -- bad settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ({}, "a gate has one of at_most, at_least and worse_by, got none"),
        ({"at_most": 1.0, "worse_by": 0.0}, "got at_most and worse_by"),
        ({"metric": "acc", "at_most": 1.0}, "metric 'acc': held-out text has loss and bits_per_byte; name the task"),
        ({"at_least": 1.0}, "at_least: loss is better when it is lower; use at_most"),
        ({"source": "a", "task": "t", "at_most": 1.0}, "a gate is about one of them"),
        ({"filter": "none", "at_most": 1.0}, "filter 'none' belongs to a task"),
        ({"worse_by": -1.0}, "greater than or equal to 0"),
    ],
)
def test_bad_gates(gate: dict[str, Any], why: str):
    with pytest.raises(ValidationError, match=why):
        GateConfig(**gate)


def test_the_documents_survive_their_file():
    model = answered([1, 2])
    assert model.documents is not None
    again = Documents.parse(model.documents.to_bytes())
    assert again.heldout.equals(model.documents.heldout)
    assert again.tasks.equals(model.documents.tasks)
