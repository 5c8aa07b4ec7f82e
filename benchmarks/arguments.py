"""Arguments that several benchmarks take, refused by name before anything is measured; and ranks for those that need some."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def positive(text: str) -> int:
    """A number of rounds, ranks, documents."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def interpreter(text: str) -> str:
    """Another environment's Python, by its path or its name on PATH."""
    found = shutil.which(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a program; give the path of an environment's bin/python")
    return found


def existing_folder(text: str) -> str:
    """One that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return text


def folder_of(package: str) -> Callable[[str], str]:
    """A folder that contains the package."""

    def holds_it(text: str) -> str:
        if not (Path(text) / package).is_dir():
            raise argparse.ArgumentTypeError(f"there is no package {package} in {text!r}")
        return text

    return holds_it


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Names with commas between."""
    known = list(names)

    def chosen(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return text.split(",")

    return chosen


def on_ranks(module: str, ranks: int) -> None:
    """Goes on where torchrun has started this process; elsewhere this process becomes torchrun, for so many ranks of the same command."""
    if "RANK" in os.environ:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which says so at length
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", module, *sys.argv[1:]])
