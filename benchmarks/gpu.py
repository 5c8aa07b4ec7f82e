"""Moonlight's layers and Newton-Schulz at real width on one GPU. No Ray, no process group, under eight minutes.

    python -m benchmarks.gpu                       # the report, on the first GPU
    python -m benchmarks.gpu --device cpu --tiny   # a run-through without a GPU: its figures mean nothing

layers       embedding, one dense layer, as many mixture layers as fit, head and loss: forward and backward in bf16 of
             one sequence of 8,192 random tokens (4,096 second), routed as the router likes. Eager, compiled, and compiled
             with selective checkpointing, the preset's way. TFLOP/s and MFU by pipeline/training/flops.py, which counts
             nothing that is computed twice; neither optimizer nor communication.
attention    16 heads of 192/128 at 8,192 tokens, causal, forward and backward, by every kernel that takes them
newton-schulz the five steps of Muon for each matrix shape of the model: batched against one matrix after the other,
             plain and Gram form
Medians of calls that follow each other without waiting, by CUDA events; the first calls are not timed. Memory is the
allocator's peak. Every row is printed when it is known. One that cannot be measured says why and the others go on; rows
that would begin after BUDGET_S are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config.load import load_config
from pipeline.config.schema import ModelConfig
from pipeline.model.block import Block
from pipeline.model.loss import LossOutput
from pipeline.model.moonlight import Moonlight
from pipeline.optim.newton_schulz import coefficients, orthogonalize
from pipeline.optim.newton_schulz import flops as newton_schulz_flops
from pipeline.training.flops import flops_per_token

PEAK_BF16 = {  # dense, from data sheets; the first name found in the device's counts
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}
MFU_TARGET = 0.40
MEMORY_SHARE = 0.85  # of the device, for weights, gradients and activations
ACTIVATION_BYTES = 170_000  # of one mixture layer and token at real width, bf16: sets how many layers are tried first
BUDGET_S = 360.0  # no row begins later; compilation, the longest part of a row, takes about a minute


class Mode(NamedTuple):
    name: str
    compiled: bool
    checkpointing: str


MODES = (Mode("eager", False, "none"), Mode("compiled", True, "none"), Mode("selective", True, "selective"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the debug preset's sizes")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(chip)
    show(f"{chip}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; bf16 peak {peak and peak / 1e12} TFLOP/s")
    config = load_config("debug" if arguments.tiny else "moonlight-16b-a3b").model
    length = 64 if arguments.tiny else 8192
    deadline = time.monotonic() + BUDGET_S
    results = layers(config, length, device, peak, deadline)
    attention(config, length, device, deadline)
    results += newton_schulz(config, device, deadline)
    if not arguments.tiny:
        results += layers(config, length // 2, device, peak, deadline)
    show(json.dumps(results))


def peak_flops(chip: str) -> float | None:
    """bf16 FLOP/s of a device by the name it gives itself; None for one that the table lacks."""
    return next((flops for name, flops in PEAK_BF16.items() if name in chip), None)


def show(line: str) -> None:
    print(line, flush=True)


def late(name: str, deadline: float) -> bool:
    if time.monotonic() < deadline:
        return False
    show(f"{name:24} left out: more than {BUDGET_S:.0f} s have passed")
    return True


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def layers(
    config: ModelConfig, length: int, device: torch.device, peak: float | None, deadline: float
) -> list[dict[str, Any]]:
    results = []
    count = config.num_hidden_layers
    if device.type == "cuda":
        count = layers_that_fit(config, length, torch.cuda.mem_get_info(device)[0])
    show(f"\nlayers: forward and backward of {length} tokens, hidden {config.hidden_size}")
    show(f"{'':10}{'layers':>8}{'ms':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'memory':>12}")
    for mode in MODES:
        if late(mode.name, deadline):
            continue
        try:
            count, seconds, memory = shrink_to_fit(
                lambda count, mode=mode: time_layers(with_layers(config, count), length, device, mode), count
            )
        except RuntimeError as error:  # of CUDA, of a kernel, of the compiler
            show(f"{mode.name:10} not measured: {first_line(error)}")
            continue
        speed = length / seconds
        flops = speed * flops_per_token(with_layers(config, count), length)
        mfu = flops / peak if peak else None
        shown = f"{mfu:8.1%}" if mfu is not None else f"{'-':>8}"
        show(
            f"{mode.name:10}{count:8}{seconds * 1e3:10.1f}{speed:12.0f}{flops / 1e12:10.3g}{shown}{memory / 2**30:8.1f} GiB"
        )
        results.append(
            {
                "benchmark": f"gpu/layers/{length}/{mode.name}",
                "ours": mfu,
                "peer": 1.0,
                "ratio": mfu,
                "target": MFU_TARGET,
                "met": mfu is not None and mfu >= MFU_TARGET,
                "unit": "model FLOPs utilisation",
                "tokens_per_second": round(speed),
                "layers": count,
                "peak_bytes": memory,
            }
        )
    return results


def with_layers(config: ModelConfig, count: int) -> ModelConfig:
    return config.model_copy(update={"num_hidden_layers": count})


def layers_that_fit(config: ModelConfig, length: int, free: int) -> int:
    """Layers whose bf16 weights, gradients and activations should fit into `free` bytes; at least two, so one mixture."""
    with torch.device("meta"):
        model = Moonlight(with_layers(config, 2))
    layer = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.1."))
    fixed = sum(p.numel() for p in model.parameters()) - layer
    mixtures = int((MEMORY_SHARE * free - 4 * fixed) / (4 * layer + ACTIVATION_BYTES * length))
    return max(2, min(config.num_hidden_layers, 1 + mixtures))


def shrink_to_fit(measure: Callable[[int], tuple[float, int]], count: int) -> tuple[int, float, int]:
    """(layers, *measure(layers)) with the first of count, count - 2, ... layers that the memory holds."""
    while True:
        try:
            return count, *measure(count)
        except torch.OutOfMemoryError:
            if count <= 2:
                raise
        count = max(2, count - 2)
        gc.collect()  # compiled blocks are cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def time_layers(config: ModelConfig, length: int, device: torch.device, mode: Mode) -> tuple[float, int]:
    """(median seconds of a forward and backward pass, peak bytes)."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with torch.device("meta"):
        model = Moonlight(config, aux_loss_weight=1e-4)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # the router's bias stays fp32
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=config.initializer_range) if parameter.dim() > 1 else torch.nn.init.ones_(
            parameter
        )
    for _, router in model.routers():
        router.e_score_correction_bias.zero_()
        router.tokens_per_expert.zero_()
    for block in (cast(Block, block) for block in model.layers):
        block.activation_checkpointing = mode.checkpointing
        if mode.compiled:
            block.compile()
    ids_BS = torch.randint(0, config.vocab_size, (1, length), device=device)

    def step() -> None:
        out = cast(LossOutput, model(ids_BS, ids_BS))
        (out.loss_sum / length + out.aux_loss).backward()
        model.zero_grad()

    seconds = timed(step, device, warmup=3, rounds=8)
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def attention(config: ModelConfig, length: int, device: torch.device, deadline: float) -> None:
    heads, width, value_width = config.num_attention_heads, config.qk_head_dim, config.v_head_dim
    flops = 3 * 2 * heads * length**2 // 2 * (width + value_width)  # causal half, backward twice the forward

    def draw(numbers: int) -> Tensor:
        return torch.randn(1, heads, length, numbers, device=device, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = draw(width), draw(width), draw(value_width)
    show(f"\nattention: {heads} heads of {width}/{value_width}, {length} tokens, forward and backward")
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        if late(backend.name, deadline):
            continue
        padded = backend == SDPBackend.FLASH_ATTENTION  # takes one width only

        def step(backend: SDPBackend = backend, padded: bool = padded) -> None:
            with sdpa_kernel(backend):
                value = F.pad(v, (0, width - value_width)) if padded else v
                out = F.scaled_dot_product_attention(q, k, value, is_causal=True)
            out.backward(out.detach())

        try:
            seconds = timed(step, device, warmup=2, rounds=5)
        except RuntimeError as error:
            show(f"{backend.name:24} not measured: {first_line(error)}")
            continue
        show(f"{backend.name:24}{seconds * 1e3:10.2f} ms{flops / seconds / 1e12:10.1f} TFLOP/s")


def newton_schulz(config: ModelConfig, device: torch.device, deadline: float) -> list[dict[str, Any]]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    shapes = {
        "expert": (config.n_routed_experts, config.moe_intermediate_size, hidden),
        "shared": (6, config.shared_intermediate_size, hidden),
        "q_proj": (6, heads * config.qk_head_dim, hidden),
        "kv_a": (6, latent + config.qk_rope_head_dim, hidden),
        "kv_b": (6, heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (6, hidden, heads * config.v_head_dim),
    }
    schedule = coefficients("moonlight", 5)
    dtype = torch.bfloat16
    results = []
    show("\nNewton-Schulz, five steps, bf16: TFLOP/s of the plain form's FLOPs")
    show(f"{'':10}{'matrices':>20}{'looped':>10}{'batched':>10}{'gram':>10}")
    for name, (batch, rows, columns) in shapes.items():
        if late(name, deadline):
            continue
        x_BMN = torch.randn(batch, rows, columns, device=device).to(dtype)

        def looped(x_BMN: Tensor = x_BMN) -> None:
            for matrix in x_BMN.split(1):
                orthogonalize(matrix, schedule)

        def batched(x_BMN: Tensor = x_BMN) -> None:
            orthogonalize(x_BMN, schedule)

        def gram(x_BMN: Tensor = x_BMN) -> None:
            orthogonalize(x_BMN, schedule, "gram")

        work = batch * newton_schulz_flops(rows, columns, 5) / 1e12
        try:
            speeds = [work / timed(run, device, warmup=2, rounds=5) for run in (looped, batched, gram)]
        except RuntimeError as error:
            show(f"{name:10} not measured: {first_line(error)}")
            continue
        show(f"{name:10}{f'{batch} of {rows} x {columns}':>20}" + "".join(f"{speed:10.3g}" for speed in speeds))
        results.append(
            {
                "benchmark": f"gpu/newton_schulz/{name}",
                "ours": round(max(speeds[1:]), 3),
                "peer": round(speeds[0], 3),
                "ratio": round(max(speeds[1:]) / speeds[0], 3),
                "target": 1.0,
                "met": max(speeds[1:]) >= speeds[0],
                "unit": "TFLOP/s, batched against looped",
            }
        )
    return results


def timed(run: Callable[[], None], device: torch.device, *, warmup: int, rounds: int) -> float:
    """Median seconds of a call on the device, one call queued behind the other. Without a GPU: one call each, by the clock."""
    if device.type != "cuda":
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(warmup):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in zip(marks, marks[1:])) / 1e3


if __name__ == "__main__":
    main()
