"""What a published model says after a prompt.

    python -m jobs.generate FOLDER --prompt "def area(" [--temperature 0.8 --top-p 0.95 --seed 1] [--tokens 200]
    python -m jobs.generate s3://bucket/models/moonlight/step-00000400-1a2b3c4d --file prompt.txt

The text comes on the standard output as it is made, its length and time on the other. Without a temperature the likeliest token is taken:
the text that transformers gives for the folder, where the prompt begins with the end-of-text token as documents do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.generate import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
