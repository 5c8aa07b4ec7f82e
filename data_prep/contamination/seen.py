"""How many documents of a unit each question was found in.

datasets/documents/ab/<unit>.seen         SEEN, ascending: numbers of questions in the file of questions
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

SEEN = np.dtype([("question", "<u4"), ("documents", "<u4")])


def seen_bytes(documents: Mapping[int, int]) -> bytes:
    """Of documents by question."""
    return np.array(sorted(documents.items()), SEEN).tobytes()
