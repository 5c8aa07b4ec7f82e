"""The output head and its loss, without ever holding all logits.

The tokens are taken in chunks: logits of a chunk in fp32, its loss, and at once its gradients with respect to hidden
states and weight, which backward only scales; logits are computed once. Memory: chunk x vocabulary instead of tokens x
vocabulary (8192 x 163,840 fp32 logits would be 5.4 GB, and twice that with their gradient), and the weight's gradient
from the forward pass on.

Whatever the weights' dtype, logits, losses, their sum, the softmax and the sum of the weight's gradient over chunks are
fp32, and what arrives in backward (one over the number of tokens) multiplies unrounded. In bf16 the products' operands
are bf16. A chunk's logits are read twice, for their log-softmax and for the gradient in the dtype of the products
(pipeline/kernels/cross_entropy.py); tokens without a label are zero hidden states there. `torch.nn.functional.linear_cross_entropy` returns losses in bf16 instead: summed they
are off by about one per cent, and one by one they cost the logits a second time in backward.

Legend: B rows, S tokens, N = B*S, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.kernels.cross_entropy import cross_entropy
from pipeline.model.devices import is_gpu
from pipeline.model.matmul import TILES, fp32_product, is_cpu_fp32, linear, outer, product

IGNORE = -100  # label of a token that has no loss
CUDA_CHUNK = 1024  # tokens: 640 MiB of logits of the real model
CPU_CHUNK_NUMBERS = 1 << 22  # logits: 16 MiB at most, in whole tiles, which the product needs not put together


class LossOutput(NamedTuple):
    loss_sum: Tensor  # fp32: sum of the cross-entropy (nats) over the labelled tokens
    aux_loss: Tensor  # fp32: balance loss, weighted, mean over the rows that hold text, summed over layers
    num_tokens: Tensor  # int64: labelled tokens


class TokenScores(NamedTuple):
    log_p_N: Tensor  # fp32: log-probability (nats) of each label
    likeliest_N: Tensor  # int64: the token with the largest logit there


class Head(nn.Module):
    """Hidden states to logits, or with labels to the summed loss. A module, so that FSDP gathers its weight for it."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, x_BSD: Tensor, labels: Tensor | None = None, at_N: Tensor | None = None) -> Tensor | TokenScores:
        """`labels` is [B, S], or with `at_N`, flat positions that may repeat, [N]: then every label is scored by itself.

        Without labels the logits, everywhere or at `at_N`."""
        if at_N is not None:
            x_ND = x_BSD.flatten(0, 1)[at_N]
            return linear(x_ND, self.weight).float() if labels is None else token_scores(x_ND, self.weight, labels)
        if labels is None:
            return linear(x_BSD, self.weight).float()
        return cross_entropy_sum(x_BSD.flatten(0, 1), self.weight, labels.flatten())


def cross_entropy_sum(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over tokens with a label of -log softmax(W x)[label], fp32 scalar."""
    loss: Tensor = _CrossEntropySum.apply(x_ND, weight_VD, labels_N)
    return loss


@torch.no_grad()
def token_scores(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> TokenScores:
    """log softmax(W x)[label] and argmax W x of each token, a chunk of logits at a time."""
    chunk = _chunk(x_ND, weight_VD.shape[0])
    log_p, likeliest = [], []
    for x_CD, labels_C in zip(x_ND.split(chunk), labels_N.split(chunk)):
        logits_CV = fp32_product(x_CD, weight_VD)
        log_p.append(_log_p(logits_CV, labels_C))
        likeliest.append(logits_CV.argmax(1))
    return TokenScores(torch.cat(log_p), torch.cat(likeliest))


class _CrossEntropySum(torch.autograd.Function):
    """Loss and gradients of a chunk in one go; backward scales them by the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = x_ND.new_zeros((), dtype=torch.float32)
        chunk = _chunk(x_ND, weight_VD.shape[0])
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight = _WeightGradient(weight_VD) if wanted else None
        for x_CD, labels_C1, grad_x_CD in zip(
            x_ND.split(chunk), labels_N.unsqueeze(1).split(chunk), grad_x_ND.split(chunk)
        ):
            counted_C1 = labels_C1 != IGNORE
            x_CD = x_CD.where(counted_C1, 0)
            logits_CV = fp32_product(x_CD, weight_VD)
            if grad_weight is None:
                loss -= _log_p(logits_CV, labels_C1.squeeze(1).clamp(min=0)).where(counted_C1.squeeze(1), 0).sum()
                continue
            losses_C, grad_CV = cross_entropy(logits_CV, labels_C1.squeeze(1), x_CD.dtype)
            del logits_CV
            loss += losses_C.sum()
            grad_x_CD.copy_(product(grad_CV, weight_VD.T))
            grad_x_CD.masked_fill_(~counted_C1, 0)
            grad_weight.add(grad_CV, x_CD)
        if grad_weight is not None:
            ctx.save_for_backward(grad_x_ND, grad_weight.result())
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        return grad_x_ND * grad, grad_weight_VD * grad, None


class _WeightGradient:
    """The sum over chunks of grad^T x, in fp32.

    On a CPU it is summed transposed: `outer` lays out its first factor anew, and hidden states are narrower than logits.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self.dtype, self.transposed = weight_VD.dtype, is_cpu_fp32(weight_VD)
        shape = weight_VD.T.shape if self.transposed else weight_VD.shape
        self.sum = torch.zeros(shape, dtype=torch.float32, device=weight_VD.device)

    def add(self, grad_CV: Tensor, x_CD: Tensor) -> None:
        if self.transposed:
            self.sum += outer(x_CD, grad_CV)
        elif is_gpu(x_CD.device) and x_CD.dtype != torch.float32:
            torch.addmm(self.sum, grad_CV.T, x_CD, out_dtype=torch.float32, out=self.sum)
        else:
            self.sum.addmm_(grad_CV.T.float(), x_CD.float())

    def result(self) -> Tensor:
        return self.sum.T.contiguous() if self.transposed else self.sum.to(self.dtype)


def _log_p(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """log softmax(logits)[label], [C]."""
    return logits_CV.gather(1, labels_C[:, None])[:, 0] - logits_CV.logsumexp(1)


def _chunk(x_ND: Tensor, vocabulary: int) -> int:
    """Tokens of a chunk."""
    if not is_cpu_fp32(x_ND):
        return CUDA_CHUNK
    return next((tile for tile in TILES if tile * vocabulary <= CPU_CHUNK_NUMBERS), TILES[-1])
