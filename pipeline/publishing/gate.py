"""The gate in front of publishing: what the workflow's gate and the publish stage both ask. No torch in here."""

from __future__ import annotations

from math import isfinite

from pipeline.manifest import EvaluationManifest, SourceScore


def refusal(evaluation: EvaluationManifest, max_loss: float | None) -> str | None:
    """Why a model with this evaluation is not published; None if it may be.

    A comparison with NaN is false either way, and a mean over nothing is no score: both close the gate, whatever the limit.
    """
    scores = {"": evaluation.overall, **{f" of source {name!r}": score for name, score in evaluation.sources.items()}}
    for name, score in scores.items():
        if not _is_score(score):
            return (
                f"the held-out loss{name} is {score.loss:g} over {score.tokens:,} tokens, {score.bits_per_byte:g} bits per byte: "
                "no score of a sound model. Train again from an earlier checkpoint"
            )
    if max_loss is not None and not evaluation.overall.loss <= max_loss:
        return (
            f"publishing.max_loss: the held-out loss {evaluation.overall.loss:.4f} is over {max_loss:g} nats per token. "
            "Train longer, or raise the limit"
        )
    return None


def _is_score(score: SourceScore) -> bool:
    return score.tokens > 0 and isfinite(score.loss) and isfinite(score.bits_per_byte)
