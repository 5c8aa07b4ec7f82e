"""Settings of the search for the evaluation's own questions in the corpus."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section
from pipeline.config.values import Count, Fraction

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
CUT_DEFAULTS = {"window": 200, "min_piece": 200, "max_pieces": 10}
NGRAM = {"ngram": 13, "span": 8}  # Brown et al. 2020; Llama 3 and PaLM
MIN_COVERED = 0.7


class Decontamination(Section):
    """A document holds a question of `evaluation.tasks` (or of `tasks` besides) by one of two published rules, over normalised words.

    ngram   Brown et al. 2020 (GPT-3, arXiv 2005.14165), appendix C: one of the question's 13-grams is in the document. A question of 8
            to 12 words has to be there as a whole
    span    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 8, and Grattafiori et al. 2024 (Llama 3, arXiv 2407.21783), section
            5.1.4: at least `min_covered` of the question's words lie in 8-grams that the document has, too
    """

    tasks: tuple[str, ...] = ()  # of lm-eval besides evaluation.tasks: names of tasks, groups or tags
    rule: Literal["ngram", "span"] = "ngram"
    ngram: Annotated[int, Field(ge=4, le=100)] | None = None  # words; None: 13, and 8 with rule span
    min_covered: Fraction | None = None  # of rule span; None: 0.7
    min_words: Annotated[int, Field(ge=4, le=100)] = 8  # shorter questions are not looked for, only counted
    max_questions: Count = 10  # an n-gram of more questions than that is a phrase of the task: ignored
    action: Literal["drop", "cut", "report"] = "drop"  # the document; the place; nothing but the count
    window: Annotated[int, Field(ge=0)] | None = None  # characters cut on either side; None: 200, as GPT-3's
    min_piece: Annotated[int, Field(ge=0)] | None = None  # characters; shorter rests of a cut document go; None: 200
    max_pieces: Count | None = None  # a document that would fall into more is dropped; None: 10
    questions: Sha256 | None = None  # of those looked for before (datasets/questions/); None: the harness is asked once

    @property
    def n(self) -> int:
        return self.ngram or NGRAM[self.rule]

    @property
    def least_covered(self) -> float:
        return MIN_COVERED if self.min_covered is None else self.min_covered

    def cut(self, name: str) -> int:
        """`window`, `min_piece` or `max_pieces`."""
        value: int | None = getattr(self, name)
        return CUT_DEFAULTS[name] if value is None else value

    @model_validator(mode="after")
    def _do_not_contradict(self) -> Decontamination:
        if self.rule == "ngram" and self.min_covered is not None:
            raise ValueError(
                f"min_covered {self.min_covered:g} belongs to rule span, and rule is ngram, of which one n-gram is enough; set rule to "
                "span, or leave it out"
            )
        given = [name for name in CUT_DEFAULTS if getattr(self, name) is not None]
        if given and self.action != "cut":
            raise ValueError(f"{given[0]} belongs to action cut, and action is {self.action}; set one of them")
        if self.rule == "ngram" and self.min_words > self.n:
            raise ValueError(
                f"min_words {self.min_words} is over ngram {self.n}: questions that have an n-gram would not be looked for; lower it"
            )
        if self.min_covered == 0:
            raise ValueError("min_covered 0: every document would hold every question")
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {twice[0]!r} is named twice")
        return self
