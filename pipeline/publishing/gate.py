"""The gates in front of publishing: what the workflow's gate and the publish stage both ask. No torch in here.

A gate is about one number of the evaluation, and closed where that number is worse than its limit by more than is granted:

    excess = how much worse the number is than the limit        limit: fixed, or the promoted model's number and a tolerance
    open   if excess <= granted * SE

SE is the standard error of what is compared: with a fixed limit that of the number; beside the promoted model that of the
difference, paired where both scored the same documents (evaluation/errors.py). Without a standard error on record it counts
as 0, and a gate that asks for a negative number of them is closed.

Two more are always there. A score that is no finite number is none. And a model that is worse than token frequencies is not
promoted: the bar is the entropy of the scored tokens under their own frequencies, which no model without context can beat on
that text, whatever text its frequencies are of (Gibbs' inequality).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from pipeline.config.gates import GateConfig
from pipeline.config.outcome import PublishingConfig
from pipeline.evaluation.errors import Estimate
from pipeline.manifest import EvaluationManifest, SourceScore
from pipeline.publishing.compare import Incomparable, Scored, compare, measure

HEAD = ("gate", "demand", "value", "limit", "worse by", "std error", "")


class GateError(ValueError):
    """The model is not good enough to be published; the message says which gate is closed by how much, and ends in the table."""


@dataclass(frozen=True)
class Verdict:
    """One gate's answer. Numbers are None where there is nothing to compare."""

    gate: str
    demand: str
    closed: str  # why; '' if it is open
    value: float | None = None
    limit: float | None = None
    excess: float | None = None  # how much worse than the limit; negative: better
    stderr: float | None = None
    note: str = ""  # how it was compared

    @property
    def cells(self) -> list[str]:
        numbers = ["" if number is None else f"{number:.4f}" for number in (self.value, self.limit)]
        errors = ["" if number is None else f"{number:.2g}" for number in (self.excess, self.stderr)]
        return [self.gate, self.demand, *numbers, *errors, "CLOSED" if self.closed else "open"]


@dataclass(frozen=True)
class Answer:
    """Of all gates."""

    verdicts: tuple[Verdict, ...]

    @property
    def open(self) -> bool:
        return not any(verdict.closed for verdict in self.verdicts)

    @property
    def why(self) -> str:
        """One line: every closed gate."""
        return "; ".join(verdict.closed for verdict in self.verdicts if verdict.closed)

    def table(self) -> str:
        rows = [list(HEAD), *(verdict.cells for verdict in self.verdicts)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        notes = dict.fromkeys(f"{verdict.gate}: {verdict.note}" for verdict in self.verdicts if verdict.note)
        return "\n".join([*lines, *notes])

    def require(self, done: str = "nothing was published or promoted") -> None:
        """Raises GateError if a gate is closed."""
        if not self.open:
            raise GateError(f"{self.why}; {done}\n{self.table()}")


def judge(settings: PublishingConfig, model: Scored, promoted: Scored | None) -> Answer:
    """All gates of the settings. `promoted`: the model in use, None before the first."""
    bad = not_a_score(model.evaluation)
    if bad is not None:
        return Answer((Verdict("score", "a finite number", bad),))
    found = [_limit(settings.max_loss, model)] if settings.max_loss is not None else []
    found += [_judge(gate, model, promoted) for gate in settings.gates]
    if settings.promote and settings.beats_frequencies:
        found.append(frequencies(model.evaluation))
    return Answer(tuple(found))


def frequencies(evaluation: EvaluationManifest) -> Verdict:
    """Is the model better than the frequencies of the very tokens that it is scored on?"""
    loss, bar = evaluation.overall.loss, evaluation.unigram_entropy
    why = (
        f"the held-out loss {loss:.4f} is over {bar:.4f}, the entropy of the same tokens under their own frequencies: the model has "
        "learnt less than how often each token occurs. Train longer, look at the run's loss, or set publishing.beats_frequencies=false"
    )
    closed = why if loss > bar else ""
    return Verdict(
        "token frequencies", "at most their entropy", closed, loss, bar, loss - bar, evaluation.overall.stderr
    )


def not_a_score(evaluation: EvaluationManifest) -> str | None:
    """Why an evaluation says nothing. A comparison with NaN is false either way, and a mean over nothing is no score."""
    scores = {"": evaluation.overall, **{f" of source {name!r}": score for name, score in evaluation.sources.items()}}
    for name, score in scores.items():
        if not _is_score(score):
            return (
                f"the held-out loss{name} is {score.loss:g} over {score.tokens:,} tokens, {score.bits_per_byte:g} bits per byte: "
                "no score of a sound model. Train again from an earlier checkpoint"
            )
    return None


def require_score(evaluation: EvaluationManifest) -> None:
    """Raises GateError for an evaluation that says nothing; a record with such numbers has no digest either."""
    bad = not_a_score(evaluation)
    if bad is not None:
        raise GateError(f"{bad}; nothing was published or promoted")


def _is_score(score: SourceScore) -> bool:
    return score.tokens > 0 and isfinite(score.loss) and isfinite(score.bits_per_byte)


def _limit(max_loss: float, model: Scored) -> Verdict:
    overall = model.evaluation.overall
    closed = (
        f"publishing.max_loss: the held-out loss {overall.loss:.4f} is over {max_loss:g} nats per token. "
        "Train longer, or raise the limit"
    )
    excess = overall.loss - max_loss
    return Verdict(
        "loss (max_loss)", f"at most {max_loss:g}", closed if excess > 0 else "", overall.loss, max_loss, excess, overall.stderr
    )  # fmt: skip


def _judge(gate: GateConfig, model: Scored, promoted: Scored | None) -> Verdict:
    try:
        return _fixed(gate, model) if gate.worse_by is None else _beside(gate, model, promoted)
    except Incomparable as error:
        return Verdict(gate.subject, gate.demand, f"gate {gate.subject}, {gate.demand}: {error}")


def _fixed(gate: GateConfig, model: Scored) -> Verdict:
    found = measure(gate, model)
    limit = gate.at_most if gate.at_most is not None else gate.at_least
    assert limit is not None
    excess = found.value - limit if gate.at_most is not None else limit - found.value
    return _verdict(gate, found.value, limit, Estimate(excess, found.stderr), "")


def _beside(gate: GateConfig, model: Scored, promoted: Scored | None) -> Verdict:
    if promoted is None:
        return Verdict(gate.subject, gate.demand, "", measure(gate, model).value, note="nothing is promoted yet")
    assert gate.worse_by is not None
    found = compare(gate, model, promoted)
    worse = found.difference.value if found.lower_is_better else -found.difference.value
    limit = found.theirs + gate.worse_by if found.lower_is_better else found.theirs - gate.worse_by
    excess = Estimate(worse - gate.worse_by, found.difference.stderr)
    return _verdict(gate, found.ours, limit, excess, f"beside {promoted.name}, {found.how}")


def _verdict(gate: GateConfig, value: float, limit: float, excess: Estimate, note: str) -> Verdict:
    if excess.stderr is None and gate.granted < 0:
        raise Incomparable("there is no standard error on record")
    granted = gate.granted * (excess.stderr or 0.0)
    closed = ""
    if not excess.value <= granted:
        by = f", {granted:.4f} granted" if granted else ""
        closed = f"gate {gate.subject}, {gate.demand}: {value:.4f} is {excess.value:.4f} worse than {limit:.4f}{by}"
    return Verdict(gate.subject, gate.demand, closed, value, limit, excess.value, excess.stderr, note)
