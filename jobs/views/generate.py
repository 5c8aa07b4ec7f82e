"""Text from a published model, piece by piece on the standard output."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import program


def command(arguments: Sequence[str] | None) -> int:
    """`jobs.generate`. Returns the exit code."""
    made = argparse.ArgumentParser(prog=program("generate"), description="What a published model says after a prompt.")
    made.add_argument("folder", help="a published folder: a path or s3:// URI")
    prompt = made.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to go on from")
    prompt.add_argument("--file", help="a file that holds it; - for the standard input")
    made.add_argument("--tokens", type=int, default=200, help="how many new tokens at most")
    made.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; 1: as the model says")
    made.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens with this probability")
    made.add_argument("--seed", type=int, default=0, help="the same seed, the same text")
    made.add_argument("--endpoint-url", help="of an S3 server that is not AWS's")
    return write(**vars(made.parse_args(arguments)))


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
