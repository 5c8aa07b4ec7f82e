"""What a published model says after a prompt.

    python -m jobs.generate FOLDER --prompt "def area(" [--temperature 0.8 --top-p 0.95 --seed 1] [--tokens 200]
    python -m jobs.generate s3://bucket/models/moonlight/step-00000400-1a2b3c4d --file prompt.txt

The text comes on the standard output as it is made, its length and time on the other. Without a temperature the likeliest token is taken:
the text that transformers gives for the folder, where the prompt begins with the end-of-text token as documents do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs.cli import program
from jobs.views.generate import write


def main(arguments: Sequence[str] | None = None) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
