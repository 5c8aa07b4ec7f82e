"""Text from a published model, piece by piece on the standard output."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def write(
    folder: str,
    prompt: str | None,
    file: str | None,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    endpoint_url: str | None,
) -> int:
    """Returns the exit code: 2 for wrong settings or a wrong folder, told in one line."""
    from pipeline.generation.published import load_published  # here: --help needs no torch
    from pipeline.generation.sample import Sampling

    try:
        if tokens < 1:
            raise ValueError(f"--tokens {tokens}: give a number from 1 on")
        sampling = Sampling(temperature, top_p, seed)
        if prompt is None:
            assert file is not None
            prompt = sys.stdin.read() if file == "-" else Path(file).read_text()
        published = load_published(folder, endpoint_url=endpoint_url)
        start = time.monotonic()
        (text,) = published.continuations([prompt], [sampling], tokens, _show)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(flush=True)
    print(f"{len(text):,} characters in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return 0


def _show(row: int, piece: str) -> None:
    print(piece, end="", flush=True)
