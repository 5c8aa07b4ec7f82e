"""Moonlight's layers and Newton-Schulz at real width on one GPU. No Ray, no process group, under eight minutes.

    python -m benchmarks.gpu                       # the report, on the first GPU
    python -m benchmarks.gpu --device cpu --tiny   # a run-through without a GPU: its figures mean nothing

layers       embedding, one dense layer, as many mixture layers as fit, head and loss: forward and backward in bf16 of
             one sequence of 8,192 random tokens (4,096 second), routed as the router likes. Eager and with torch.compile
             per block. TFLOP/s and MFU by pipeline/training/flops.py; neither optimizer nor communication.
attention    16 heads of 192/128 at 8,192 tokens, causal, forward and backward, by every kernel that takes them
newton-schulz the five steps of Muon for each matrix shape of the model: batched against one matrix after the other,
             plain and Gram form
Medians; the first calls are not timed. Memory is the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

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

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}  # dense, data sheets
MFU_TARGET = 0.40
MEMORY_SHARE = 0.85  # of the device, for weights, gradients and activations
ACTIVATION_BYTES = 170_000  # of one mixture layer and token at real width, bf16: sets how many layers are tried first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the debug preset's sizes")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = next((flops for name, flops in PEAK_BF16.items() if name in chip), None)
    print(f"{chip}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; bf16 peak {peak and peak / 1e12} TFLOP/s")
    preset = load_config("debug" if arguments.tiny else "moonlight-16b-a3b")
    results = []
    for length in (64,) if arguments.tiny else (8192, 4096):
        results += layers(preset.model, length, device, peak)
    attention(preset.model, 64 if arguments.tiny else 8192, device)
    results += newton_schulz(preset.model, device)
    print(json.dumps(results))


def layers(config: ModelConfig, length: int, device: torch.device, peak: float | None) -> list[dict[str, Any]]:
    results = []
    count = layers_that_fit(config, length, device)
    print(f"\nlayers: forward and backward of {length} tokens, hidden {config.hidden_size}")
    print(f"{'':10}{'layers':>8}{'ms':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'memory':>12}")
    for mode in ("eager", "compiled"):
        while True:
            try:
                seconds, memory = time_layers(
                    config.model_copy(update={"num_hidden_layers": count}), length, device, mode
                )
                break
            except torch.OutOfMemoryError:
                count -= 2
                assert count >= 2, "not even two layers fit"
            torch.cuda.empty_cache()
        speed = length / seconds
        flops = speed * flops_per_token(config.model_copy(update={"num_hidden_layers": count}), length)
        mfu = flops / peak if peak else None
        shown = f"{mfu:8.1%}" if mfu is not None else f"{'-':>8}"
        print(
            f"{mode:10}{count:8}{seconds * 1e3:10.1f}{speed:12.0f}{flops / 1e12:10.3g}{shown}{memory / 2**30:8.1f} GiB"
        )
        results.append(
            {
                "benchmark": f"gpu/layers/{length}/{mode}",
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


def layers_that_fit(config: ModelConfig, length: int, device: torch.device) -> int:
    if device.type != "cuda":
        return config.num_hidden_layers
    with torch.device("meta"):
        model = Moonlight(config.model_copy(update={"num_hidden_layers": 2}))
    layer = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.1."))
    fixed = sum(p.numel() for p in model.parameters()) - layer
    budget = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    return max(2, min(config.num_hidden_layers, int((budget - 4 * fixed) / (4 * layer + ACTIVATION_BYTES * length))))


def time_layers(config: ModelConfig, length: int, device: torch.device, mode: str) -> tuple[float, int]:
    """(median seconds of a forward and backward pass, peak bytes)."""
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
    if mode == "compiled":
        torch.compiler.reset()
        for block in model.layers:
            cast(Block, block).compile()
    ids_BS = torch.randint(0, config.vocab_size, (1, length), device=device)

    def step() -> None:
        out = cast(LossOutput, model(ids_BS, ids_BS))
        (out.loss_sum / length + out.aux_loss).backward()
        model.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(step, device, warmup=3, rounds=8)
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def attention(config: ModelConfig, length: int, device: torch.device) -> None:
    heads, width, value_width = config.num_attention_heads, config.qk_head_dim, config.v_head_dim
    flops = 3 * 2 * heads * length**2 // 2 * (width + value_width)  # causal half, backward twice the forward

    def draw(numbers: int) -> Tensor:
        return torch.randn(1, heads, length, numbers, device=device, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = draw(width), draw(width), draw(value_width)
    print(f"\nattention: {heads} heads of {width}/{value_width}, {length} tokens, forward and backward")
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        padded = backend == SDPBackend.FLASH_ATTENTION  # takes one width only

        def step(backend: SDPBackend = backend, padded: bool = padded) -> None:
            with sdpa_kernel(backend):
                value = F.pad(v, (0, width - value_width)) if padded else v
                out = F.scaled_dot_product_attention(q, k, value, is_causal=True)
            out.backward(out.detach())

        try:
            seconds = timed(step, device, warmup=2, rounds=5)
        except RuntimeError as error:
            print(f"{backend.name:24} not available: {str(error).splitlines()[0][:80]}")
            continue
        print(f"{backend.name:24}{seconds * 1e3:10.2f} ms{flops / seconds / 1e12:10.1f} TFLOP/s")


def newton_schulz(config: ModelConfig, device: torch.device) -> list[dict[str, Any]]:
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
    print("\nNewton-Schulz, five steps, bf16: TFLOP/s of the plain form's FLOPs")
    print(f"{'':10}{'matrices':>20}{'looped':>10}{'batched':>10}{'gram':>10}")
    for name, (batch, rows, columns) in shapes.items():
        x_BMN = torch.randn(batch, rows, columns, device=device).to(dtype)

        def looped(x_BMN: Tensor = x_BMN) -> None:
            for matrix in x_BMN.split(1):
                orthogonalize(matrix, schedule)

        def batched(x_BMN: Tensor = x_BMN) -> None:
            orthogonalize(x_BMN, schedule)

        def gram(x_BMN: Tensor = x_BMN) -> None:
            orthogonalize(x_BMN, schedule, "gram")

        work = batch * newton_schulz_flops(rows, columns, 5) / 1e12
        speeds = [work / timed(run, device, warmup=2, rounds=5) for run in (looped, batched, gram)]
        print(f"{name:10}{f'{batch} of {rows} x {columns}':>20}" + "".join(f"{speed:10.3g}" for speed in speeds))
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
    """Median seconds of a call, the device's queue empty before and after. One call each without a GPU."""
    if device.type != "cuda":
        warmup, rounds = 1, 1
    times = []
    for index in range(-warmup, rounds):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
