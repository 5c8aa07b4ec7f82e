"""One line on the processor under a benchmark: figures of different vector units do not compare."""

from __future__ import annotations

import os

import torch

from pipeline.optim.products import has_products

CAPS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)  # make torch, oneDNN and MKL use less than there is


def processor() -> str:
    facts = torch.cpu.get_capabilities()
    flags = [flag for flag in ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16") if facts.get(flag)]
    products = [
        name for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if has_products("cpu", dtype)
    ]
    capped = [f"{name}={os.environ[name]}" for name in CAPS if name in os.environ]
    return (
        f"{facts.get('cpu_name', 'unknown processor')}: {' '.join(flags) or 'no known vector unit'}; torch uses "
        f"{torch.backends.cpu.get_cpu_capability()}; products of {' and '.join(['fp32', *products])}"
        + (f"; capped by {' '.join(capped)}" if capped else "")
    )
