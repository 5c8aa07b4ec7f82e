"""The oracle of the distributed tests: `torch.optim.Muon` on whole tensors in one process, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.config.schema import OptimizerConfig
from pipeline.optim import exchange
from pipeline.optim.boxes import block_boxes
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
        self.optimizers: list[torch.optim.Optimizer] = []
        if muon:
            self.optimizers.append(
                torch.optim.Muon(
                    muon, lr=lr, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
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
        for optimizer in self.optimizers:
            optimizer.step()

    def check(self, named: list[tuple[str, Tensor]], case: str) -> None:
        """Every element equal, to the bit."""
        for fqn, p in named:
            whole = full(p)
            for index, expected in self.blocks[fqn]:
                found = whole[index]
                assert torch.equal(found, expected), (case, fqn, index, (found - expected).abs().max().item())


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Counts what this rank puts on the wire (pieces to itself stay) in `pipeline.optim.exchange`."""
    original, total = dist.all_to_all_single, [0]

    def counting(
        output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], **kwargs: Any
    ) -> Any:
        to_others = sum(input_splits) - input_splits[dist.get_rank(kwargs["group"])]
        total[0] += to_others * input.element_size()
        return original(output, input, output_splits, input_splits, **kwargs)

    exchange.dist.all_to_all_single = counting
    try:
        yield total
    finally:
        exchange.dist.all_to_all_single = original


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
