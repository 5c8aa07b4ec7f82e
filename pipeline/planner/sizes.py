"""How many elements the network has, by what happens to them: arithmetic, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.optimizer import OptimizerConfig

FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Elements of the network: everything but experts, the experts, and the parts that are gathered as units."""

    dense: int
    experts: int
    matrices: int  # of `dense`, what Muon trains
    embedding: int  # equal to the head
    dense_of_block: int  # of a MoE block
    experts_of_block: int

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def by_adamw(self, optimizer: OptimizerConfig) -> int:
        return self.dense - self.matrices if optimizer.name == "muon" else self.total


def momentum_itemsize(optimizer: OptimizerConfig) -> int:
    """Of Muon's state."""
    return 2 if optimizer.muon.momentum_dtype == "bf16" else FP32


def sizes_of(shapes: dict[str, tuple[int, ...]]) -> Sizes:
    """From the network's parameters by name."""
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    experts = {name: size for name, size in count.items() if ".mlp.experts." in name}
    blocks = {name.split(".")[1] for name in experts}
    block = f"layers.{min(blocks, key=int)}." if blocks else "layers.0."
    return Sizes(
        dense=sum(count.values()) - sum(experts.values()),
        experts=sum(experts.values()),
        matrices=sum(size for name, size in count.items() if name.startswith("layers.") and len(shapes[name]) == 2),
        embedding=count["embed_tokens.weight"],
        dense_of_block=sum(size for name, size in count.items() if name.startswith(block) and name not in experts),
        experts_of_block=sum(size for name, size in experts.items() if name.startswith(block)),
    )
