"""What a model has to hold before it is published (pipeline/publishing/gate.py says how it is judged)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section
from pipeline.config.values import NonNegativeFloat

HELDOUT_METRICS = ("loss", "bits_per_byte")  # of all held-out text, or of one source


class GateConfig(Section):
    """One comparison. Exactly one of `at_most`, `at_least` (a fixed limit) and `worse_by` (than the promoted model; 0: it
    must not regress)."""

    metric: str = "loss"  # or bits_per_byte; with `task` one of the task's: acc, exact_match, ...
    source: str | None = None  # of the corpus; None: all held-out text
    task: str | None = None  # of lm-eval, or a group of tasks
    filter: str | None = None  # of the task's answers; None: the only one of the metric
    at_most: float | None = None
    at_least: float | None = None
    worse_by: NonNegativeFloat | None = None
    # Granted to the model: so many standard errors of the difference. Negative: it has to be better by them. None: 0 with a
    # fixed limit, 2 beside the promoted model
    standard_errors: Annotated[float, Field(ge=-10, le=10)] | None = None

    @property
    def kind(self) -> Literal["at_most", "at_least", "worse_by"]:
        if self.worse_by is not None:
            return "worse_by"
        return "at_most" if self.at_most is not None else "at_least"

    @property
    def granted(self) -> float:
        return (2.0 if self.worse_by is not None else 0.0) if self.standard_errors is None else self.standard_errors

    @property
    def subject(self) -> str:
        """`loss`, `loss of source code`, `mmlu acc`"""
        if self.task is not None:
            cut = "" if self.filter is None else f" ({self.filter})"
            return f"{self.task} {self.metric}{cut}"
        return self.metric if self.source is None else f"{self.metric} of source {self.source}"

    @property
    def demand(self) -> str:
        words = {"at_most": "at most", "at_least": "at least", "worse_by": "worse by at most"}
        value = {"at_most": self.at_most, "at_least": self.at_least, "worse_by": self.worse_by}[self.kind]
        margin = f" and {self.granted:g} standard errors" if self.granted else ""
        return f"{words[self.kind]} {value:g}{margin}"

    @model_validator(mode="after")
    def _is_one_comparison(self) -> GateConfig:
        limits = [name for name in ("at_most", "at_least", "worse_by") if getattr(self, name) is not None]
        if len(limits) != 1:
            given = f"got {' and '.join(limits)}" if limits else "got none"
            raise ValueError(f"a gate has one of at_most, at_least and worse_by, {given}")
        if self.source is not None and self.task is not None:
            raise ValueError(f"source {self.source!r} and task {self.task!r}: a gate is about one of them")
        if self.task is None:
            if self.metric not in HELDOUT_METRICS:
                raise ValueError(
                    f"metric {self.metric!r}: held-out text has {' and '.join(HELDOUT_METRICS)}; name the task of another metric"
                )
            if self.filter is not None:
                raise ValueError(f"filter {self.filter!r} belongs to a task; name the task or leave it out")
            if self.at_least is not None:
                raise ValueError(f"at_least: {self.metric} is better when it is lower; use at_most")
        return self
