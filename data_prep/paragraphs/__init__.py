"""Paragraphs, or lines, that several documents have: hashes of them in the unit's task (parts.py), which document keeps its own by ranges of
hashes (find.py), and documents without those of others while they are packed (apply.py)."""

PARAGRAPHS_VERSION = 1  # raise when the same texts and settings would give other parts
