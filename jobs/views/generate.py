"""Text from a published model, piece by piece on the standard output."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import program
from jobs.views.sampling import add_sampling, sampling_of

TOP_P = 1.0


def command(arguments: Sequence[str] | None) -> int:
    """`jobs.generate`. Returns the exit code."""
    made = argparse.ArgumentParser(prog=program("generate"), description="What a published model says after a prompt.")
    made.add_argument("folder", help="a published folder: a path or s3:// URI")
    prompt = made.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to go on from")
    prompt.add_argument("--file", help="a file that holds it; - for the standard input")
    add_sampling(
        made,
        tokens=(200, "how many new tokens at most"),
        temperature=0.0,
        top_p=TOP_P,
        seed="the same seed, the same text",
    )
    return write(**vars(made.parse_args(arguments)))


def write(
    folder: str,
    prompt: str | None,
    file: str | None,
    tokens: int,
    temperature: float,
    top_p: float | None,
    seed: int | None,
    endpoint_url: str | None,
) -> int:
    """Returns the exit code: 2 for wrong settings or a wrong folder, told in one line."""
    from pipeline.generation.published import load_published  # here: --help needs no torch

    try:
        sampling = sampling_of(tokens, temperature, top_p, seed, usual_top_p=TOP_P)
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
