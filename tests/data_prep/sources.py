"""Files of raw text for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def write_in_three(folder: Path, name: str, texts: Sequence[str]) -> None:
    """<folder>/<name>/0.jsonl, 1.jsonl and 2.jsonl, each every third text with its own id."""
    (folder / name).mkdir(parents=True)
    for part in range(3):
        lines = [json.dumps({"text": text, "id": f"{name}-{n}"}) for n, text in enumerate(texts) if n % 3 == part]
        (folder / name / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
