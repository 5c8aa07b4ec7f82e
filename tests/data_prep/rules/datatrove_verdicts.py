"""datatrove's verdicts of `documents()`, into the table that the tests compare with. Run under an interpreter that has datatrove and spaCy:

PYTHONPATH=. /path/to/venv/bin/python -m tests.data_prep.rules.datatrove_verdicts
"""

from __future__ import annotations

import importlib.metadata
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from data_prep.rules.words import Words
from tests.data_prep.rules.documents import documents

TABLE = Path(__file__).with_name("datatrove_verdicts.json")


def verdicts(words: str, rule: str) -> list[list[str]]:
    """Of each document datatrove's name of what it fails first, or ''; of a text that C4 keeps its digest, too."""
    table = json.loads(TABLE.read_text())
    return [[table["names"][first], *rest] for first, *rest in table[words][rule]]


def main() -> None:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        c4_filters,
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    modules = (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter)
    filters: dict[str, Any] = {
        "gopher_quality": gopher_quality_filter.GopherQualityFilter(),
        "gopher_repetition": gopher_repetition_filter.GopherRepetitionFilter(),
        "fineweb": fineweb_quality_filter.FineWebQualityFilter(),
        "c4": c4_filters.C4QualityFilter(),
    }

    def verdict(name: str, text: str) -> list[str]:
        document = Document(text=text, id="")
        try:
            kept = filters[name].filter(document)
        except (ZeroDivisionError, ValueError):  # it divides by the number of words, or of lines
            return ["raises"]
        left = [xxhash.xxh3_64_hexdigest(document.text.encode())[:8]] if name == "c4" and kept is True else []
        return ["" if kept is True else kept[1], *left]

    own = {name: [verdict(name, text) for text in documents()] for name in filters}
    for module in modules:
        module.split_into_words = lru_cache(5)(lambda text, _language: Words([text]).texts(0))
    ours = {name: [verdict(name, text) for text in documents()] for name in filters if name != "c4"}
    names = sorted({first for table in (own, ours) for verdicts in table.values() for first, *_ in verdicts})
    for table in (own, ours):
        for verdicts in table.values():
            for found in verdicts:
                found[0] = names.index(found[0])
    versions = {name: importlib.metadata.version(name) for name in ("datatrove", "spacy")}
    table = {"versions": versions, "names": names, "with spaCy's words": own, "with our words": ours}
    TABLE.write_text(json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
