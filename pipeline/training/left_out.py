"""Going back on a spike: an earlier checkpoint, and the data in between left out.

With `training.spikes.action: go_back` a step that spikes is undone with all steps since an earlier checkpoint, and the sequences that these
steps had drawn are passed over from then on, as those of `training.skip_sequences` are (PaLM, section 5.1, went on from some 100 steps
before a spike and skipped the data up to it: https://arxiv.org/abs/2204.02311). Schedules go by the number of sequences and stay as they
were.

    <root>/runs/<run_id>/train/left_out.json    what was left out so far, and why

The record is the decision: it is written before anything is undone. Whoever begins later reads it, withdraws checkpoints that were taken
on a way that has been left (their manifests lack its range), and goes on as if nothing had interrupted it. Each checkpoint's manifest has
the ranges that were left out when it was taken.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.config.schema import RunConfig
from pipeline.dataset.order import Order
from pipeline.integrity import read_record
from pipeline.manifest import CheckpointManifest, DatasetManifest, Record
from pipeline.storage import Storage
from pipeline.training.commits import train_folder

Range = tuple[int, int]


class Detour(Record):
    """One spike that was gone back on."""

    spike: int  # step
    back_to: int  # step of the checkpoint; 0: the beginning
    left_out: Range  # [from, to) of global positions
    loss: float  # of the spike, nats per token
    gradient_norm: float


class LeftOut(Record):
    """`left_out.json`, oldest first."""

    detours: tuple[Detour, ...] = ()
    inherited: tuple[Range, ...] = ()  # left out by the run that this one branched off from (branch.py)

    @property
    def ranges(self) -> tuple[Range, ...]:
        return (*self.inherited, *(detour.left_out for detour in self.detours))

    def is_stale(self, manifest: CheckpointManifest) -> bool:
        """Was it taken on a way that the run has left?"""
        return any(manifest.step > each.back_to and each.left_out not in manifest.left_out for each in self.detours)


def left_out_path(run_id: str) -> str:
    return f"{train_folder(run_id)}/left_out.json"


def read_left_out(storage: Storage, run_id: str) -> LeftOut:
    """Raises DamagedRecord."""
    return read_record(storage, left_out_path(run_id), LeftOut) or LeftOut()


def order_of(config: RunConfig, dataset: DatasetManifest, ranges: Iterable[Range]) -> Order:
    """The order of a run with what it has left out so far, besides `training.skip_sequences`."""
    return Order.of_run(config, dataset, skip=union([*config.training.skip_sequences, *ranges]))


def union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same positions in ranges that neither overlap nor touch, ascending."""
    found: list[Range] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return tuple(found)
