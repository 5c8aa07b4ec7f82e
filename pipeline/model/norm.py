"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * gain, over the last dim (Zhang and Sennrich, arXiv 1910.07467).

On CUDA PyTorch's fused kernel. Its CPU backward is a chain of a dozen elementwise operations, more than ten times the
forward's time; the one here makes five passes over x:
    n = x * rstd;  p = grad * n;  grad_gain = sum of p over rows
    grad_x = rstd * (grad * gain - n * mean(p * gain))

Legend: N rows, D normalised dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32:
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        rstd_N1 = x_ND.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, gain_D, rstd_N1)
        return (x_ND * rstd_N1).mul_(gain_D).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, gain_D, rstd_N1 = ctx.saved_tensors
        grad_ND = grad.reshape(x_ND.shape)
        normed_ND = x_ND * rstd_N1
        product_ND = grad_ND * normed_ND
        mean_N1 = (product_ND @ gain_D).div_(x_ND.shape[-1]).unsqueeze(1)
        grad_x_ND = (grad_ND * gain_D).addcmul_(normed_ND, mean_N1, value=-1).mul_(rstd_N1)
        return grad_x_ND.view(grad.shape), product_ND.sum(0), None
