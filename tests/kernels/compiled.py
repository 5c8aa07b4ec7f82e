"""Compiles every Triton kernel for a GPU that is not here, and says of each what came out as a line of JSON: a program of its own, as
Triton decides at its import whether it interprets.

    python -m tests.kernels.compiled 90
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # as it is unless somebody says

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.kernels import (
    activation_triton,
    cross_entropy_triton,
    grouped_fp8_triton,
    quantise_triton,
    sorting_triton,
)

FP8, BF16, FP32, I32, I64 = "*fp8e4nv", "*bf16", "*fp32", "*i32", "*i64"
WIDTHS = {"N", "width", "D", "F", "R", "C", "V"}
KERNELS: dict[Any, tuple[dict[str, str], dict[str, Any]]] = {
    grouped_fp8_triton._product: (
        {"x": FP8, "x_scales": FP32, "weight": FP8, "weight_scales": FP32, "offsets": I32, "y": BF16},
        {"PARTS": 2, "EVEN": True, "EXPERTS": 8, "ROWS": 128, "TILE": 128, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    ),
    quantise_triton._rows: (
        {"x": BF16, "rows": I64, "counts": I32, "values": FP8, "scales": FP32},
        {"GATHERED": True, "BOUNDED": True, "PARTS": 1, "ROWS": 4, "TILES": 8, "TILE": 128},
    ),
    quantise_triton._block: ({"stack": BF16, "values": FP8, "scales": FP32}, {"TRANSPOSED": True, "TILE": 128}),
    activation_triton._forward: (
        {"gate": BF16, "up": BF16, "weights": FP32, "end": I32, "hidden": BF16},
        {"WEIGHTED": True, "BOUNDED": True, "ROWS": 4, "COLUMNS": 512},
    ),
    activation_triton._backward: (
        {"grad": BF16, "gate": BF16, "up": BF16, "weights": FP32, "end": I32, "grad_both": BF16, "hidden": BF16, "grad_weights": FP32},
        {"WEIGHTED": True, "BOUNDED": True, "ROWS": 4, "COLUMNS": 512},
    ),
    cross_entropy_triton._both: ({"logits": FP32, "labels": I64, "losses": FP32, "grad": BF16}, {"COLUMNS": 2048}),
    sorting_triton._count: ({"bins": I64, "counts": I32}, {"C": 6, "BINS": 64, "ROWS": 64}),
    sorting_triton._place: (
        {"bins": I64, "before": I32, "places": I64, "placed": I64, "rows": I64, "choices": I64},
        {"C": 6, "BINS": 64, "ROWS": 64},
    ),
    sorting_triton._list: ({"places": I64, "before": I64, "listed": I64, "bags": I64}, {"C": 6, "ROWS": 64}),
    sorting_triton._ranks: ({"experts": I64, "met": I64}, {"K": 6, "RANKS": 8, "ROWS": 64}),
    sorting_triton._copy: ({"x": BF16, "rows": I64, "counts": I64, "copies": BF16}, {"ROWS": 4, "COLUMNS": 1024}),
    sorting_triton._sums: ({"rows": BF16, "places": I64, "bags": I64, "sums": BF16}, {"COLUMNS": 2048}),
}  # fmt: skip


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """Tensors and widths are aligned, as Triton finds those of a real network to be; other arguments are any int."""
    options = {name: constants.pop(name) for name in list(constants) if name.startswith("num_")}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name in pointers or name in WIDTHS - constants.keys()
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    made = triton.compile(
        ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )
    ptx = made.asm["ptx"]
    return {
        "kernel": f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}", "machine_code": len(made.asm["cubin"]),
        "shared": made.metadata.shared, "spills": ptx.count("st.local"), "products_e4m3": ptx.count(".f32.e4m3.e4m3"), "asynchronous": ptx.count("cp.async.cg"),
    }  # fmt: skip


if __name__ == "__main__":
    for kernel, (pointers, constants) in KERNELS.items():
        print(json.dumps(compiled(kernel, pointers, dict(constants), int(sys.argv[1]))), flush=True)
