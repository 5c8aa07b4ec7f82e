"""Spikes: a finite loss or gradient norm far above what the last steps had.

Two figures are watched, the loss (nats per token) and the logarithm of the gradient norm, since norms vary by factors. Of each the mean and
the variance are kept as exponential averages over `horizon_steps`; a value more than `deviations` standard deviations above the mean is a
spike. What a spike adds to the averages is cut at TRUST deviations, so that one outlier does not hide the next, and a level that is
here to stay is taken for normal after some dozens of steps. The first `horizon_steps` steps teach and are not judged: losses
fall and norms settle there.

All on the device, from figures that are already sums over all ranks: every rank comes to the same verdict, and no host waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.schema import SpikeConfig

TRUST = 3.0  # deviations that a spike may add to the averages
LEAST = (
    0.01,
    0.05,
)  # standard deviation of the loss, of the log of the norm: steadier figures are not judged more sharply


class Spikes:
    """Judges steps; its averages and counters are part of a checkpoint."""

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self.config = config
        self.spread = torch.zeros(2, 2, dtype=torch.float64, device=device)  # (loss, log norm) x (mean, variance)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)  # that taught
        self.found = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._least = torch.tensor(LEAST, dtype=torch.float64, device=device)

    def judge(self, loss: Tensor, gradient_norm: Tensor, finite: Tensor) -> Tensor:
        """Is this step a spike? (bool, []). A step that is not finite is none and teaches nothing."""
        value_2 = torch.stack([loss.double(), gradient_norm.double().clamp(min=1e-30).log()])
        mean_2, variance_2 = self.spread.unbind(1)
        deviation_2 = torch.maximum(variance_2.sqrt(), self._least)
        above_2 = value_2 - mean_2
        judged = finite & (self.steps >= self.config.horizon_steps)
        spike = judged & (above_2 > self.config.deviations * deviation_2).any()
        self.found += spike
        self.in_a_row.copy_(torch.where(spike, self.in_a_row + 1, torch.where(finite, 0, self.in_a_row)))

        # Welford's update with a weight that falls to 1 / horizon: the plain mean and variance of the first steps.
        weight = 1.0 / (self.steps + 1).clamp(max=self.config.horizon_steps).double()
        step_2 = torch.where(judged, torch.minimum(above_2, TRUST * deviation_2), above_2)
        learned = torch.stack([mean_2 + weight * step_2, (1 - weight) * (variance_2 + weight * step_2 * step_2)], dim=1)
        self.spread.copy_(torch.where(finite, learned, self.spread))
        self.steps += finite
        return spike

    @property
    def counters(self) -> tuple[Tensor, Tensor]:
        """Spikes of the run; of these the last ones in a row."""
        return self.found, self.in_a_row

    def state(self) -> dict[str, Tensor]:
        return {
            "guard.spread": self.spread,
            "guard.spread_steps": self.steps,
            "guard.spikes": self.found,
            "guard.spikes_in_a_row": self.in_a_row,
        }
