"""The oracle of the distributed tests: `torch.optim.Muon` on whole tensors in one process, one block at a time.

Where Newton-Schulz multiplies fp32, torch's Muon is given ours of one matrix (`test_newton_schulz.py` holds it against
torch's): then equality says that the bits do not depend on ranks, layouts and batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import OptimizerConfig
from pipeline.optim.boxes import block_boxes
from pipeline.optim.newton_schulz import coefficients, orthogonalize
from pipeline.optim.products import choose
from pipeline.optim.rules import Rule, match_rules


def full(tensor: Tensor) -> Tensor:
    """The gathered tensor (also of FSDP2's strided shards)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Oracle:
    """Whole copies of sharded parameters, trained by torch's own Muon and fused AdamW."""

    def __init__(self, named: list[tuple[str, Tensor]], config: OptimizerConfig, rules: list[Rule], lr: float) -> None:
        self.blocks: dict[str, list[tuple[Any, nn.Parameter]]] = {}
        self.shapes = {fqn: tuple(p.shape) for fqn, p in named}
        chosen = match_rules(self.shapes.items(), rules)
        self.exact = {fqn for fqn, rule in zip(self.shapes, chosen) if rule.treatment == "muon"}
        muon, adamw = [], []
        for (fqn, p), rule in zip(named, chosen):
            whole = full(p)
            boxes = block_boxes(whole.shape, rule.block_rows) if rule.treatment == "muon" else [()]
            self.blocks[fqn] = []
            for box in boxes:
                index = tuple(
                    a if len(whole.shape) == 3 and dim == 0 else slice(a, b) for dim, (a, b) in enumerate(box)
                )
                self.blocks[fqn].append((index, nn.Parameter(whole[index].clone())))
            (muon if rule.treatment == "muon" else adamw).extend(p for _, p in self.blocks[fqn])
        self.momentum_dtype = config.muon.momentum_dtype
        self.products = choose(config.muon.products, "plain", torch.device("cpu"))
        self.optimizers: list[torch.optim.Optimizer] = []
        if muon:
            self.optimizers.append(
                torch.optim.Muon(
                    muon,
                    lr=lr,
                    weight_decay=config.weight_decay,
                    momentum=0.95,
                    nesterov=config.muon.nesterov,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if adamw:
            self.optimizers.append(
                torch.optim.AdamW(adamw, lr=lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
            )

    def step(self, gradients: dict[str, Tensor]) -> None:
        for fqn, blocks in self.blocks.items():
            for index, p in blocks:
                p.grad = gradients[fqn][index].clone()
        replaced = {"_zeropower_via_newtonschulz": _by_fp32} if self.products == "fp32" else {}
        with mock.patch.multiple("torch.optim._muon", **replaced) if replaced else nullcontext():
            for optimizer in self.optimizers:
                optimizer.step()
        if (
            self.momentum_dtype == "bf16"
        ):  # torch's advances in the gradients' dtype alone, so its buffers are rounded for it
            for optimizer in self.optimizers:
                for state in optimizer.state.values():
                    if "momentum_buffer" in state:
                        state["momentum_buffer"].copy_(state["momentum_buffer"].bfloat16())

    def check(self, named: list[tuple[str, Tensor]], case: str) -> None:
        """Every element equal, to the bit; AdamW's on a CPU to one in the last place, as torch's kernel fuses multiply and add
        in whole vectors only and a shard ends its vectors elsewhere."""
        for fqn, p in named:
            whole = full(p)
            for index, expected in self.blocks[fqn]:
                found = whole[index]
                if fqn in self.exact:
                    assert torch.equal(found, expected), (case, fqn, index, (found - expected).abs().max().item())
                else:
                    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7, msg=f"{case}, {fqn}")


def _by_fp32(x_MN: Tensor, _: object, steps: int, __: float) -> Tensor:
    return orthogonalize(x_MN[None], coefficients("moonlight", steps), products="fp32")[0]


class Wire(TorchDispatchMode):
    """What this rank puts on the wire, from the operators that every collective ends in; pieces to itself stay.

    Anything but an all-to-all with splits fails: a step has no other collective, whoever would call it.
    """

    sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            assert func is torch.ops.c10d.alltoall_base_.default, func
            _, send, group, _, splits = args[:5]
            me = dist.ProcessGroup.unbox(group).rank()
            assert sum(splits) == send.shape[0]
            self.sent += (sum(splits) - splits[me]) * send.element_size()
        return func(*args, **(kwargs or {}))


@contextmanager
def no_gathering() -> Iterator[list[int]]:
    """Counts DTensor.full_tensor and DTensor.redistribute calls."""
    calls = [0]
    originals = {name: getattr(DTensor, name) for name in ("full_tensor", "redistribute")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(DTensor, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(DTensor, name, original)
