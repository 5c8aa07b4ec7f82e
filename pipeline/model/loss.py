"""The output head and its loss, without ever holding all logits.

The tokens are taken in chunks: logits of a chunk, its loss, and at once its gradients with respect to hidden states and
weight, which backward only scales. Memory: chunk x vocabulary instead of tokens x vocabulary (8192 x 163,840 fp32
logits would be 5.4 GB, and twice that with their gradient).

On CUDA this is `torch.nn.functional.linear_cross_entropy`. Its own choice of chunk, 64 rows for the real model, re-reads
the weight 128 times a sequence; here a chunk has 1024 rows. Its summed form adds up bf16 losses in bf16, off by about
one per cent after a hundred chunks, so the losses come token by token and are summed in fp32; backward then computes the
logits once more. In fp32 on a CPU the same algorithm runs on the faster product of pipeline/model/matmul.py.

Legend: B rows, S tokens, N = B*S, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.matmul import TILES, is_cpu_fp32, linear, outer, product

IGNORE = -100  # label of a token that has no loss
CUDA_CHUNK = 1024  # tokens
CPU_CHUNK_NUMBERS = 1 << 22  # logits: 16 MiB at most, in whole tiles, which the product needs not put together


class LossOutput(NamedTuple):
    loss_sum: Tensor  # fp32: sum of the cross-entropy (nats) over the labelled tokens
    aux_loss: Tensor  # fp32: balance loss, weighted, mean over sequences, summed over layers
    num_tokens: Tensor  # int64: labelled tokens


class Head(nn.Module):
    """Hidden states to logits, or with labels to the summed loss. A module, so that FSDP gathers its weight for it."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        if labels_BS is None:
            return linear(x_BSD, self.weight).float()
        return cross_entropy_sum(x_BSD.flatten(0, 1), self.weight, labels_BS.flatten())


def cross_entropy_sum(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over tokens with a label of -log softmax(W x)[label], fp32 scalar."""
    if is_cpu_fp32(x_ND):
        return _CrossEntropySum.apply(x_ND, weight_VD, labels_N)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=CUDA_CHUNK)
    loss_N = F.linear_cross_entropy(x_ND, weight_VD, labels_N, reduction="none", ignore_index=IGNORE, options=options)
    return loss_N.float().sum()


class _CrossEntropySum(torch.autograd.Function):
    """Loss and gradients of a chunk in one go; backward scales them by the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        (N, _), V = x_ND.shape, weight_VD.shape[0]
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = x_ND.new_zeros(())
        grad_x_ND = torch.empty_like(x_ND) if wanted else None
        # Summed transposed: `outer` lays out its first factor anew, and hidden states are narrower than logits.
        grad_weight_DV = weight_VD.new_zeros(weight_VD.shape[1], V) if wanted else None
        chunk = next((tile for tile in TILES if tile * V <= CPU_CHUNK_NUMBERS), TILES[-1])
        for start in range(0, N, chunk):
            x_CD, labels_C = x_ND[start : start + chunk], labels_N[start : start + chunk, None]
            counted_C = labels_C != IGNORE
            index_C = labels_C.where(counted_C, 0)
            logits_CV = product(x_CD, weight_VD)
            logits_CV -= logits_CV.amax(1, keepdim=True)
            chosen_C = logits_CV.gather(1, index_C)
            total_C = logits_CV.exp_().sum(1, keepdim=True)
            loss += ((total_C.log() - chosen_C) * counted_C).sum()
            if grad_x_ND is not None and grad_weight_DV is not None:
                grad_CV = logits_CV.mul_(counted_C / total_C)
                grad_CV.scatter_add_(1, index_C, -counted_C.to(grad_CV))
                grad_x_ND[start : start + chunk] = product(grad_CV, weight_VD.T)
                grad_weight_DV += outer(x_CD, grad_CV)
        ctx.save_for_backward(grad_x_ND, None if grad_weight_DV is None else grad_weight_DV.T.contiguous())
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        return grad_x_ND * grad, grad_weight_VD * grad, None
