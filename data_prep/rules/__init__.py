"""Rules over whole documents: what is dropped, what is changed, and under which name it is counted (apply.py)."""

RULES_VERSION = 1  # raise when the same texts and settings would give other verdicts or texts
