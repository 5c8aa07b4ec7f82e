"""Steps that must not happen: a non-finite loss or gradient norm changes nothing, nor does a spike where that is asked for.

The verdict is a 0/1 tensor on the device that multiplies into every update (optimizer, router bias), so no step waits
for the host to learn that all is well. Loss and norm are sums over all ranks: one bad value anywhere is a bad value
everywhere and the ranks agree without asking. Data goes on (the batch is passed over, never retried) and schedules are
functions of tokens, so what follows is the run it would have been.

Skipped steps are counted on the device. The host sees the counts with the metrics, one step late; a run that skips
`training.max_skipped_steps` in a row stops: its state is damaged or its data is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.schema import SpikeConfig
from pipeline.training.spikes import Spikes


class RunDiverged(RuntimeError):
    """The run cannot go on by itself; the message says what to look at."""


class Guard:
    """Judges steps and counts the skipped ones; its counters are part of a checkpoint."""

    def __init__(self, device: torch.device, spikes: SpikeConfig | None = None) -> None:
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # the step that was judged last
        self.spikes = Spikes(spikes or SpikeConfig(), device)

    def judge(self, loss: Tensor, gradient_norm: Tensor, *, may_repeat: bool = False) -> Tensor:
        """1.0 (fp32) if the step may happen, else 0.0. `may_repeat`: one that is not finite is computed again, and not counted."""
        self.finite = finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        spike = self.spikes.judge(loss, gradient_norm, finite)
        good = finite & ~spike if self.spikes.config.action != "count" else finite
        self.skipped += ~good & finite if may_repeat else ~good
        self.in_a_row.copy_(torch.where(finite, 0, self.in_a_row + (not may_repeat)))
        return good.float()

    def state(self) -> dict[str, Tensor]:
        counted = {"guard.skipped_steps": self.skipped, "guard.skipped_in_a_row": self.in_a_row}
        return counted | self.spikes.state()


def check_skipped(in_a_row: int, limit: int, step: int) -> None:
    """Raises RunDiverged on the host."""
    if in_a_row >= limit:
        raise RunDiverged(
            f"step {step}: the last {in_a_row} steps had a non-finite loss or gradient and were skipped "
            f"(training.max_skipped_steps {limit}); look at train/metrics, then lower the learning rate, leave the data out "
            "with training.skip_sequences, or start from an earlier checkpoint"
        )


def check_spikes(in_a_row: int, limit: int, step: int) -> None:
    """Raises RunDiverged on the host."""
    if in_a_row >= limit:
        raise RunDiverged(
            f"step {step}: the last {in_a_row} steps had a loss or gradient norm far above the run's own "
            f"(training.spikes.stop_after {limit}); look at train/metrics and at the data of the first of them (jobs.inspect ... step), "
            "then lower the learning rate, leave the data out with training.skip_sequences, or start from an earlier checkpoint"
        )
