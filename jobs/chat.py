"""A conversation with a published model, in a terminal.

    python -m jobs.chat FOLDER [--system "Be brief."] [--temperature 0.7 --top-p 0.95 --seed 1] [--tokens 400]
    python -m jobs.chat s3://bucket/models/moonlight/step-00000400-1a2b3c4d

Of a model with a chat template each line is a message, and the whole conversation is laid out by the template. A base model has none, or
has never seen it used: with --base, or without a template, each line is text to go on from. An empty line or the end of the input ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.chat import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
