"""Line by line: what is typed, and what a published model answers, piece by piece on the standard output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from jobs.cli import program
from jobs.views.sampling import add_sampling, sampling_of

TOP_P = 0.95


def command(arguments: Sequence[str] | None) -> int:
    """`jobs.chat`. Returns the exit code."""
    made = argparse.ArgumentParser(prog=program("chat"), description="A conversation with a published model.")
    made.add_argument("folder", help="a published folder: a path or s3:// URI")
    made.add_argument("--system", help="what the model is told first, where it has a chat template")
    made.add_argument("--base", action="store_true", help="go on from each line by itself, as base models do")
    add_sampling(
        made,
        tokens=(400, "of an answer, at most"),
        temperature=0.7,
        top_p=TOP_P,
        seed="the same seed, the same answers",
    )
    return talk(**vars(made.parse_args(arguments)))


def talk(
    folder: str,
    system: str | None,
    base: bool,
    tokens: int,
    temperature: float,
    top_p: float | None,
    seed: int | None,
    endpoint_url: str | None,
) -> int:
    """Returns the exit code: 2 for wrong settings or a wrong folder, told in one line."""
    from pipeline.generation.conversation import Conversation  # here: --help needs no torch
    from pipeline.generation.published import load_published

    try:
        sampling = sampling_of(tokens, temperature, top_p, seed, usual_top_p=TOP_P)
        published = load_published(folder, endpoint_url=endpoint_url)
        has_template = published.encoder.has_chat_template
        if system is not None and (base or not has_template):
            raise ValueError("--system: there is no chat template to tell the model with; leave it out")
        conversation = Conversation(published, sampling, tokens, system=system, templated=has_template and not base)
        kind = "a message" if conversation.templated else "text that the model goes on from"
        print(f"Each line is {kind}; an empty one ends it.", file=sys.stderr)
        for line in _lines():
            conversation.say(line, lambda piece: print(piece, end="", flush=True))
            print(flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


def _lines() -> Iterator[str]:
    """What is typed, up to an empty line; with line editing in a terminal."""
    if sys.stdin.isatty():
        import readline  # noqa: F401

    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line
