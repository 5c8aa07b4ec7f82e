"""Settings of a classifier of one's own, as a rule of a source."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.section import Section
from pipeline.config.values import Count


class Classifier(Section):
    """A function that scores texts: `module:function`, a list of `batch_size` texts and less -> a number for each, in order. It is to give
    the same texts the same scores, for a unit that is done again must have the same bytes."""

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=200)]  # package.module:name
    version: Annotated[str, Field(min_length=1, max_length=100)]  # of its code and weights: another one scores again
    min_score: float | None = None  # documents under it are dropped
    max_score: float | None = None  # and those over it
    batch_size: Count = 64  # texts of a call

    @model_validator(mode="after")
    def _something_is_dropped_and_something_stays(self) -> Classifier:
        if self.min_score is None and self.max_score is None:
            raise ValueError(
                "min_score and max_score are not set: scores would decide nothing; set one, or leave the rule out"
            )
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(
                f"min_score {self.min_score:g} is over max_score {self.max_score:g}: nothing would be kept"
            )
        return self
