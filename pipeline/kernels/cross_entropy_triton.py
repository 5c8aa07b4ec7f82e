"""The cross-entropy kernel, a program a token; what it computes: cross_entropy.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # logits at a time


def cross_entropy(logits_CV: Tensor, labels_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits_CV = logits_CV.contiguous()
    C, V = logits_CV.shape
    losses_C = logits_CV.new_empty(C, dtype=torch.float32)
    grad_CV = torch.empty_like(logits_CV, dtype=dtype)
    if C:
        columns = min(triton.next_power_of_2(V), COLUMNS)
        _both[(C,)](logits_CV, labels_C.contiguous(), losses_C, grad_CV, V, columns)
    return losses_C, grad_CV


@triton.jit
def _both(logits, labels, losses, grad, V, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits, grad = logits + row * V, grad + row * V
    label = tl.load(labels + row)
    largest = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(logits + column, column < V, float("-inf"))
        higher = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
        # A lane that has only seen -inf has added up nothing.
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(largest - higher) + tl.exp(x - higher))
        largest = higher
    top = tl.max(largest, 0)
    log_sum = tl.log(tl.sum(tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - top)), 0))
    at_label = tl.load(logits + tl.maximum(label, 0)) - top - log_sum
    tl.store(losses + row, tl.where(label < 0, 0.0, -at_label))
    # exp(x) - 1, by its series where the difference would cancel
    series = at_label * (1 + at_label * (1 / 2 + at_label * (1 / 6 + at_label * (1 / 24))))
    less_one = tl.where(at_label > -0.03125, series, tl.exp(at_label) - 1)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        p = tl.exp(tl.load(logits + column, column < V, 0.0) - top - log_sum)
        p = tl.where(column == label, less_one, p)
        tl.store(grad + column, p.to(grad.dtype.element_ty), column < V)
