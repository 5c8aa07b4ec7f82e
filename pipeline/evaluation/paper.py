"""The figures of the Moonlight paper (arXiv 2502.16982, table 5: the final model; table 4: after 1.2 T tokens) beside ours.

Only where the task is the same: lm-eval's task of that benchmark, the metric that the paper means, and as many examples as it
says. It says none for MATH and CMath, and HumanEval and MBPP run code that the model wrote, which is not done here: these have no
figure beside ours. The harness differs all the same (prompts, how answers are cut out), so a point or two mean little.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.manifest import EvaluationManifest, TaskMetric


@dataclass(frozen=True)
class Figure:
    """Percent."""

    name: str  # the paper's
    metric: str
    filter: str
    few_shot: int
    final: float  # after 5.7 T tokens
    early: float | None  # after 1.2 T tokens, the rate not decayed


FIGURES = {  # by lm-eval's task
    "mmlu": Figure("MMLU", "acc", "none", 5, 70.0, 60.4),
    "mmlu_pro": Figure("MMLU-pro", "exact_match", "custom-extract", 5, 42.4, 28.1),
    "bbh_cot_fewshot": Figure("BBH", "exact_match", "get-answer", 3, 65.2, 43.2),
    "triviaqa": Figure("TriviaQA", "exact_match", "remove_whitespace", 5, 66.3, 58.1),
    "gsm8k": Figure("GSM8K", "exact_match", "flexible-extract", 4, 77.4, 45.0),
    "ceval-valid": Figure("C-Eval", "acc", "none", 5, 77.2, 59.9),
    "cmmlu": Figure("CMMLU", "acc", "none", 5, 78.2, 58.8),
}


def figure_of(evaluation: EvaluationManifest, name: str, metric: TaskMetric) -> Figure | None:
    """The paper's figure of this very task, metric and number of examples, if there is one."""
    found = FIGURES.get(name)
    if found is None or (metric.name, metric.filter) != (found.metric, found.filter):
        return None
    return found if shots_of(evaluation, name) == {found.few_shot} else None


def shots_of(evaluation: EvaluationManifest, name: str) -> set[int | None]:
    """The numbers of examples of a task, or of all tasks that a group averages."""
    score = evaluation.tasks[name]
    members = [member for member, each in evaluation.tasks.items() if each.group == name]
    if score.few_shot is not None or not members:
        return {score.few_shot}
    return {shots for member in members for shots in shots_of(evaluation, member)}


def beside(evaluation: EvaluationManifest) -> list[tuple[Figure, TaskMetric]]:
    """Every figure that there is one of ours for."""
    return [
        (figure, metric)
        for name, score in evaluation.tasks.items()
        for metric in score.metrics
        if (figure := figure_of(evaluation, name, metric)) is not None and metric.value is not None
    ]
