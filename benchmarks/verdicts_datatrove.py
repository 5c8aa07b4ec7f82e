"""datatrove's side of benchmarks/verdicts.py: a file of JSON lines -> a JSON line. Needs datatrove, spaCy, numpy and xxhash, and this folder's
parent on PYTHONPATH."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path

import xxhash
from datatrove.data import Document
from datatrove.pipeline.filters import (
    c4_filters,
    fineweb_quality_filter,
    gopher_quality_filter,
    gopher_repetition_filter,
)

from data_prep.rules.words import Words


def main(path: Path) -> None:
    """Of every rule by itself: of each document whether it is kept, of C4's the digest of its text, too."""
    texts = [json.loads(line)["text"] for line in path.open()]
    filters = {
        "gopher_repetition": gopher_repetition_filter.GopherRepetitionFilter(),
        "gopher_quality": gopher_quality_filter.GopherQualityFilter(),
        "fineweb": fineweb_quality_filter.FineWebQualityFilter(),
        "c4": c4_filters.C4QualityFilter(),
    }

    def verdict(name: str, text: str) -> str:
        document = Document(text=text, id="")
        try:
            kept = filters[name].filter(document) is True
        except (ZeroDivisionError, ValueError):  # it divides by the number of words
            kept = False
        if not kept:
            return ""
        return xxhash.xxh3_64_hexdigest(document.text.encode()) if name == "c4" else "kept"

    found = {name: [verdict(name, text) for text in texts] for name in filters}
    for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
        module.split_into_words = lru_cache(5)(lambda text, _language: Words([text]).texts(0))
    same_words = {name: [verdict(name, text) for text in texts] for name in filters if name != "c4"}
    print(json.dumps({"with spaCy's words": found, "with our words": same_words}))


if __name__ == "__main__":
    if len(sys.argv) <= 1:
        raise SystemExit("a part of python -m benchmarks.verdicts, which starts it")
    main(Path(sys.argv[1]))
