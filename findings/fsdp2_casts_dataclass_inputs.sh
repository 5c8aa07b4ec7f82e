#!/usr/bin/env bash
# Version: torch 2.13.0
# Behaviour: with MixedPrecisionPolicy(param_dtype=bf16) FSDP2 casts every floating-point tensor that reaches a wrapped
#   module's forward to bf16, also those in the fields of a (frozen) dataclass, in named tuples, dicts and lists, at any
#   depth: it makes a new dataclass. An object of a plain class is left alone. Rotary tables that are handed from layer to
#   layer in a dataclass therefore arrive in bf16, in which positions above 256 collapse. cast_forward_inputs=False ends it.
# Seen: torch 2.13.0: "dataclass bf16, plain object fp32; with cast_forward_inputs=False dataclass fp32"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/see.py" <<'PYTHON'
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Tables:
    cos: Tensor


class Plain:
    def __init__(self, cos: Tensor) -> None:
        self.cos = cos


class Layer(nn.Linear):
    def forward(self, x, tables):
        self.seen = tables.cos.dtype
        return super().forward(x)


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
seen = []
for cast, kind in (True, Tables), (True, Plain), (False, Tables):
    layer = Layer(4, 4)
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast))
    layer(torch.ones(1, 4, dtype=torch.bfloat16), kind(torch.ones(4)))
    seen.append(layer.seen)
dist.destroy_process_group()
name = {torch.bfloat16: "bf16", torch.float32: "fp32"}
print(f"torch {torch.__version__}: dataclass {name[seen[0]]}, plain object {name[seen[1]]}; "
      f"with cast_forward_inputs=False dataclass {name[seen[2]]}")
assert seen == [torch.bfloat16, torch.float32, torch.float32], seen
PYTHON
"$folder/venv/bin/python" "$folder/see.py" || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
