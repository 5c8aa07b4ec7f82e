"""Questions of the evaluation's tasks that stand in the corpus: what is looked for (questions.py), where it is found (finder.py), what
becomes of the document (apply.py), which questions a unit (seen.py) and a dataset version (of_dataset.py) hold."""

CONTAMINATION_VERSION = 1  # raise when the same texts, questions and settings would give other verdicts or texts
