"""How a published model's tokens are drawn, as `generate` and `chat` are told it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.generation.sample import Sampling


def add_sampling(
    made: argparse.ArgumentParser, *, tokens: tuple[int, str], temperature: float, top_p: float, seed: str
) -> None:
    """The settings with a command's own defaults, and its own words for `--tokens` and `--seed`."""
    made.add_argument("--tokens", type=int, default=tokens[0], help=tokens[1])
    made.add_argument(
        "--temperature", type=float, default=temperature, help="0: the likeliest token; 1: as the model says"
    )
    made.add_argument("--top-p", type=float, help=f"draw from the fewest tokens with this probability ({top_p:g})")
    made.add_argument("--seed", type=int, help=seed)
    made.add_argument("--endpoint-url", help="of an S3 server that is not AWS's")


def sampling_of(
    tokens: int, temperature: float, top_p: float | None, seed: int | None, *, usual_top_p: float
) -> Sampling:
    """Raises ValueError for a setting that means nothing, or has no effect."""
    from pipeline.generation.sample import Sampling  # here: --help needs no torch

    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: give a number from 1 on")
    for option, value in (("--top-p", top_p), ("--seed", seed)):
        if temperature == 0 and value is not None:
            raise ValueError(
                f"{option} {value:g}: nothing is drawn at --temperature 0, which takes the likeliest token; raise it, or leave {option} out"
            )
    return Sampling(temperature, usual_top_p if top_p is None else top_p, seed or 0)
