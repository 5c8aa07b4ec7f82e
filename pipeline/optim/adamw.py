"""AdamW for what has no matrix to orthogonalise: embedding, head, norms (or everything, for comparisons).

Every element is updated on its own, so a rank updates its shards and nothing travels. torch's fused kernel takes a
device-side `found_inf` that turns the whole update into a no-op, step count included: the skip costs neither memory nor
a host sync and is safe against NaN, because nothing is multiplied. State: exp_avg, exp_avg_sq like the parameter, and a
step count kept as a tensor: 8 bytes per element.

Source: Loshchilov & Hutter, arXiv 1711.05101; the rule is `torch.optim.AdamW`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.config.schema import AdamWConfig

STATES = ("exp_avg", "exp_avg_sq", "step")


class AdamW:
    """Executes AdamW on the local shards of named parameters."""

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter]], config: AdamWConfig, weight_decay: float
    ) -> None:
        self.parameters = list(parameters)
        self.config, self.weight_decay = config, weight_decay
        self.exp_avg = [torch.zeros_like(p, memory_format=torch.preserve_format) for _, p in self.parameters]
        self.exp_avg_sq = [torch.zeros_like(p, memory_format=torch.preserve_format) for _, p in self.parameters]
        self.steps = [torch.zeros((), dtype=torch.float32, device=local(p).device) for _, p in self.parameters]

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for (fqn, _), *tensors in zip(self.parameters, self.exp_avg, self.exp_avg_sq, self.steps):
            found.update({f"{fqn}.{name}": tensor for name, tensor in zip(STATES, tensors)})
        return found

    def step(self, lr: float, ok: Tensor | None) -> None:
        """One update of every parameter that has a gradient. `ok`: see `MoonlightOptimizer.step`."""
        live = [i for i, (_, p) in enumerate(self.parameters) if p.grad is not None]
        if not live:
            return
        steps = [self.steps[i] for i in live]
        found_inf = None if ok is None else (ok == 0).to(torch.float32).reshape(())
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [local(self.parameters[i][1]) for i in live],
            [_gradient(self.parameters[i][1]) for i in live],
            [local(self.exp_avg[i]) for i in live],
            [local(self.exp_avg_sq[i]) for i in live],
            [],
            steps,
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            weight_decay=self.weight_decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=found_inf,
        )
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))


def local(tensor: Tensor) -> Tensor:
    """The rank's shard of a DTensor, sharing its storage; other tensors as they are."""
    shard = tensor.detach()
    return shard.to_local() if hasattr(shard, "to_local") else shard


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return local(parameter.grad)
