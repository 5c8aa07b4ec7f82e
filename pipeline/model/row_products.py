"""What the rows of experts are multiplied with on their way forward and back, in the compute dtype (`Wide`) or in fp8 (`Fp8`).

    forward   gate_up: rows -> gate, up        down: hidden numbers -> results
    backward  through_down: gradients of results -> of hidden numbers        through_gate_up: of gate and up -> of rows

In fp8 rows are quantised in tiles of 1 x 128 on their way into a product, in forward while they are copied to their experts' places,
and weights in blocks of 128 x 128 once a step or a pass (`Fp8Copies`). Results are in the compute dtype. Gradients of the weights are
not computed here, nor in fp8 (pipeline/model/expert_products.py): they are what masters sum up. DeepSeek-V3 (arXiv 2412.19437, section 3.3)
has these in fp8, too, and needs rows in tiles of 128 x 1 for them.

Legend: R rows, M pairs, D hidden, F width, e experts here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.quantise import Quantised, quantised_rows, quantised_stacks
from pipeline.model.grouped import grouped_linear
from pipeline.model.grouped_fp8 import grouped_fp8
from pipeline.model.matmul import is_cpu_fp32
from pipeline.parallel.rows import Filled, gathered


class Stacks(NamedTuple):
    gate_eFD: Tensor
    up_eFD: Tensor
    down_eDF: Tensor


class Places(NamedTuple):
    """Where a row's copies lie, sorted by expert."""

    row_M: Tensor  # the row that each place holds
    offsets_e: Tensor  # int32: where each expert's places end
    filled: Filled | None  # None: all places are


class Forward(NamedTuple):
    """Stacks in fp8 as forward multiplies them."""

    gate: Quantised
    up: Quantised
    down: Quantised


class Backward(NamedTuple):
    """The same numbers and scales the other way round: what a product sums over lies side by side in memory."""

    gate_up: Quantised  # [e, D, F of gate and F of up]
    down: Quantised


class Fp8Copies:
    """Of one layer's stacks on this rank: made when they are first asked for, and while `keep` is set never again."""

    def __init__(self) -> None:
        self.keep = False
        self._forward: Forward | None = None
        self._backward: Backward | None = None

    def forward(self, stacks: Stacks) -> Forward:
        if self._forward is not None:
            return self._forward
        made = Forward(*(quantised_stacks([stack], transposed=False) for stack in stacks))
        if self.keep:
            self._forward = made
        return made

    def backward(self, stacks: Stacks) -> Backward:
        if self._backward is not None:
            return self._backward
        turned = partial(quantised_stacks, transposed=True)
        made = Backward(turned([stacks.gate_eFD, stacks.up_eFD]), turned([stacks.down_eDF]))
        if self.keep:
            self._backward = made
        return made

    def forget(self) -> None:
        self._forward = self._backward = None


@contextmanager
def kept(copies: Sequence[Fp8Copies]) -> Iterator[None]:
    """Inside weights do not change, and these copies of them stay."""
    for each in copies:
        each.keep = True
    try:
        yield
    finally:
        for each in copies:
            each.keep = False
            each.forget()


@dataclass(frozen=True)
class Wide:
    stacks: Stacks
    places: Places

    def gate_up(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """(gate_MF, up_MF) of all places."""
        gate_eFD, up_eFD, _ = self.stacks
        row_M, offsets_e, filled = self.places
        x_MD = gathered(x_RD, row_M, filled)
        return grouped_linear(x_MD, gate_eFD, offsets_e), grouped_linear(x_MD, up_eFD, offsets_e)

    def down(self, hidden_MF: Tensor) -> Tensor:
        return grouped_linear(hidden_MF, self.stacks.down_eDF, self.places.offsets_e)

    def through_down(self, grad_MD: Tensor) -> Tensor:
        return grouped_linear(grad_MD, self.stacks.down_eDF, self.places.offsets_e, transpose=False)

    def through_gate_up(self, grad_M2F: Tensor) -> Tensor:
        gate_eFD, up_eFD, _ = self.stacks
        if is_cpu_fp32(grad_M2F):  # two sums of fp32 are no worse than one, and nothing is laid end to end
            grad_gate_MF, grad_up_MF = grad_M2F.chunk(2, dim=1)
            grad_x_MD = grouped_linear(grad_gate_MF, gate_eFD, self.places.offsets_e, transpose=False)
            grad_x_MD += grouped_linear(grad_up_MF, up_eFD, self.places.offsets_e, transpose=False)
            return grad_x_MD
        both_e2FD = torch.cat([gate_eFD, up_eFD], dim=1)
        return grouped_linear(grad_M2F, both_e2FD, self.places.offsets_e, transpose=False)


@dataclass(frozen=True)
class Fp8:
    stacks: Stacks
    places: Places
    copies: Fp8Copies

    def gate_up(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """(gate_MF, up_MF) of all places."""
        x, (gate, up, _), offsets_e = (
            quantised_rows(x_RD, self.places.row_M, *self._filled),
            self._forward,
            self.places.offsets_e,
        )
        return grouped_fp8(x, gate, offsets_e, x_RD.dtype), grouped_fp8(x, up, offsets_e, x_RD.dtype)

    def down(self, hidden_MF: Tensor) -> Tensor:
        return self._product(hidden_MF, self._forward.down)

    def through_down(self, grad_MD: Tensor) -> Tensor:
        return self._product(grad_MD, self._backward.down)

    def through_gate_up(self, grad_M2F: Tensor) -> Tensor:
        return self._product(grad_M2F, self._backward.gate_up, parts=2)

    def _product(self, x_MK: Tensor, stack: Quantised, parts: int = 1) -> Tensor:
        x = quantised_rows(x_MK, None, *self._filled, parts)
        return grouped_fp8(x, stack, self.places.offsets_e, x_MK.dtype, parts)

    @cached_property
    def _forward(self) -> Forward:
        return self.copies.forward(self.stacks)

    @cached_property
    def _backward(self) -> Backward:
        return self.copies.backward(self.stacks)

    @property
    def _filled(self) -> tuple[Tensor | None, int]:
        return self.places.filled or (None, 0)
