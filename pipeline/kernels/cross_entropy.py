"""Cross-entropy of a chunk of logits and its gradient, two readings of the logits and one writing.

The first reading finds each row's largest logit and the sum of exponents, the second writes softmax minus one-hot in the dtype of
the products that follow. A label below zero has no loss; what its row of the gradient holds is for the caller to drop.

Legend: C tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.choice import own_kernels


def cross_entropy(logits_CV: Tensor, labels_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(-log softmax(logits)[label] [C] in fp32, its gradient [C, V] in `dtype`)."""
    if own_kernels(logits_CV):
        return torch.ops.moonlight.cross_entropy(logits_CV, labels_C, dtype)
    return plain_cross_entropy(logits_CV, labels_C, dtype)


def plain_cross_entropy(logits_CV: Tensor, labels_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    counted_C = labels_C >= 0
    index_C1 = labels_C.where(counted_C, 0).unsqueeze(1)
    log_p_CV = logits_CV.log_softmax(1)
    log_p_C1 = log_p_CV.gather(1, index_C1)
    losses_C = (-log_p_C1.squeeze(1)).where(counted_C, 0)
    grad_CV = log_p_CV if dtype == log_p_CV.dtype else torch.empty_like(log_p_CV, dtype=dtype)
    torch.exp(log_p_CV, out=grad_CV)  # one pass, in place where the dtype is the same
    grad_CV.scatter_(1, index_C1, log_p_C1.expm1().to(dtype))
    return losses_C, grad_CV


@torch.library.custom_op("moonlight::cross_entropy", mutates_args=(), device_types="cuda")
def _cross_entropy(logits_CV: Tensor, labels_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from pipeline.kernels.cross_entropy_triton import cross_entropy

    return cross_entropy(logits_CV, labels_C, dtype)


@_cross_entropy.register_fake
def _(logits_CV: Tensor, labels_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return logits_CV.new_empty(labels_C.shape[0]), torch.empty_like(logits_CV, dtype=dtype)
