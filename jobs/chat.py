"""A conversation with a published model, in a terminal.

    python -m jobs.chat FOLDER [--system "Be brief."] [--temperature 0.7 --top-p 0.95 --seed 1] [--tokens 400]
    python -m jobs.chat s3://bucket/models/moonlight/step-00000400-1a2b3c4d

Of a model with a chat template each line is a message, and the whole conversation is laid out by the template. A base model has none, or
has never seen it used: with --base, or without a template, each line is text to go on from. An empty line or the end of the input ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs.cli import program
from jobs.views.chat import talk


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog=program("chat"), description="A conversation with a published model.")
    made.add_argument("folder", help="a published folder: a path or s3:// URI")
    made.add_argument("--system", help="what the model is told first, where it has a chat template")
    made.add_argument("--base", action="store_true", help="go on from each line by itself, as base models do")
    made.add_argument("--tokens", type=int, default=400, help="of an answer, at most")
    made.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token; 1: as the model says")
    made.add_argument("--top-p", type=float, default=0.95, help="draw from the fewest tokens with this probability")
    made.add_argument("--seed", type=int, default=0, help="the same seed, the same answers")
    made.add_argument("--endpoint-url", help="of an S3 server that is not AWS's")
    return talk(**vars(made.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
