"""What was found of the evaluation's tasks in the corpus, for people: rows and sentences of the run's page and of the model's card."""

from __future__ import annotations

from pipeline.manifest import Contamination

HEAD = ["task", "questions", "looked for", "in the corpus", "documents with them"]
DONE = {
    "drop": "These documents were left out of the training data.",
    "cut": "The places were cut out of these documents, with the text around them.",
    "report": "They were left in: nothing was done about them.",
}
RULES = {
    "ngram": "if one of its {n}-grams of normalised words does (a shorter one as a whole)",
    "span": "if most of its words lie in {n}-grams that the document has, too",
}


def rows(found: Contamination) -> list[list[str]]:
    """A row a task, under HEAD."""
    return [
        [name, f"{task.questions:,}", f"{task.looked_for:,}", f"{task.seen:,}", f"{task.documents:,}"]
        for name, task in found.tasks.items()
    ]


def sentence(found: Contamination) -> str:
    """How they were looked for, and what was done."""
    rule = RULES[found.rule].format(n=found.ngram)
    return f"A question of a task counts as in the corpus {rule}; questions of a few words are not looked for. {DONE[found.action]}"
