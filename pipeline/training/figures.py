"""The figures of a step on their way from the device to the host, where they become a `StepRecord` one step later.

They travel as one float64 vector: loss, balance loss, gradient norm, labels trained on, skipped steps, these in a row, spikes,
these in a row, stop requests, then the imbalance of each mixture layer, and the times that all ranks sent with the step (times.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.training.metrics import StepRecord
from pipeline.training.times import VALUES


class Fetch:
    """A small device tensor on its way to the host. The copy is queued now, so waiting for it never waits for later work."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(
                values, non_blocking=True
            )
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._values.tolist()
        return found


@dataclass(frozen=True)
class PendingRecord:
    """A step whose figures are still on the way: `values` is the vector described above."""

    step: int
    slots: int  # position after the step
    learning_rate: float
    bias_rate: float
    sequences: int
    values: Fetch
    clock: float  # time.monotonic() when the step had been handed to the device
    timed: tuple[int, ...] = ()  # steps whose times travelled with this one
    ranks: int = 0  # that sent times

    def fetch(self, tokens_before: int = 0) -> StepRecord:
        """Waits for the device to have finished the step. `tokens_before`: labels that the run had been trained on."""
        loss, aux_loss, gradient_norm, labels, skipped, in_a_row, spikes, spikes_in_a_row, stop, *rest = (
            self.values.result()
        )
        layers = len(rest) - self.ranks * VALUES
        return StepRecord(
            self.step, self.slots, tokens_before + round(labels), self.learning_rate, self.bias_rate, self.sequences,
            loss, aux_loss, gradient_norm, round(skipped), round(in_a_row),
            round(spikes), round(spikes_in_a_row), stop > 0, tuple(rest[:layers]), self.timed, tuple(rest[layers:]),
        )  # fmt: skip
