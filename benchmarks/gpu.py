"""Every branch for GPUs proved against the CPU, then Moonlight's layers and Newton-Schulz at real width on one GPU. No Ray, no
other process, under eight minutes.

    python -m benchmarks.gpu                       # the report, on the first GPU
    python -m benchmarks.gpu --device cpu --tiny   # a run-through without a GPU: its figures mean nothing

parity       kernels, network, document masks, recomputation, compilation, one update and one that is skipped, checkpoints, exchanges of a
             group of this GPU alone: how far each is off (gpu_parity.py)
layers       embedding, one dense layer, as many mixture layers as fit, head and loss: forward and backward in bf16 of
             one sequence of 8,192 random tokens (4,096 last), routed as the router likes. Eager, compiled, and compiled
             with selective checkpointing, the preset's way; the first two also as one CUDA graph (on a GPU). TFLOP/s and MFU by
             pipeline/training/flops.py, which counts nothing that is computed twice; neither optimizer nor communication. With it how often the host waits for the device
             in a pass, by the profiler, and the peak of memory beside that of the same pass rehearsed (pipeline/rehearsal).
             Last the same with products of routed experts in fp8; MFU counts by the bf16 peak there, too.
experts      products that rows take part in, forward and back, of 8 experts and as many rows as 8,192 tokens send them, in bf16 and
             in fp8 with what it costs to quantise rows (weights are quantised before, as once a step)
attention    16 heads of 192/128 at 8,192 tokens, causal, forward and backward, by every kernel that takes them
newton-schulz the five steps of Muon for each matrix shape of the model: one matrix after the other, batched, and batched
             in Gram form; TFLOP/s of the plain form's FLOPs
Medians of calls that follow each other without waiting, by CUDA events; the first calls are not timed. Memory is the
allocator's peak. A row is printed when it is known, for people and as a line of JSON; the last line is the list of all.
Rows run in a process apart (benchmarks/isolated.py): one that fails, crashes or hangs says so and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_parity import CHECKS, parity
from benchmarks.isolated import Row, measure_rows, report, show
from pipeline.config.load import load_config
from pipeline.config.schema import ModelConfig
from pipeline.model.block import Block
from pipeline.model.devices import check_fp8
from pipeline.model.experts import MoE
from pipeline.model.loss import LossOutput
from pipeline.model.moonlight import Moonlight
from pipeline.model.row_products import Fp8, Fp8Copies, Places, Stacks, Wide, kept
from pipeline.optim.newton_schulz import coefficients, orthogonalize
from pipeline.optim.newton_schulz import flops as newton_schulz_flops
from pipeline.training.flops import flops_per_token, peak_flops

MFU_TARGET = 0.40
MEMORY_SHARE = 0.85  # of the device, for weights, gradients and activations
ACTIVATION_BYTES = 170_000  # of one mixture layer and token at real width, bf16: sets how many layers are tried first
BUDGET_S = 330.0  # no row begins later
ROW_S = 140.0  # a row that takes longer is ended; compilation, its longest part, takes about a minute


class Mode(NamedTuple):
    name: str
    compiled: bool
    checkpointing: str
    graph: bool = False  # the whole pass is one CUDA graph
    fp8: bool = False  # products of routed experts


MODES = (Mode("eager", False, "none"), Mode("compiled", True, "none"), Mode("selective", True, "selective"))
GRAPHS = (Mode("eager graph", False, "none", True), Mode("compiled graph", True, "none", True))
IN_FP8 = Mode("fp8", True, "selective", fp8=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the debug preset's sizes")
    parser.add_argument("--child-from", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU here; --device cpu --tiny runs through without one")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # for the children, too
    if device.index is not None:
        torch.cuda.set_device(device)
    rows = all_rows(device, arguments.tiny)
    if arguments.child_from is not None:
        measure_rows(rows, arguments.child_from)
        return
    child = [sys.executable, "-m", "benchmarks.gpu", "--device", arguments.device, *(["--tiny"] * arguments.tiny)]
    slow = 10 if device.type == "cpu" else 1  # Inductor's C++ compiler
    show(f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    show(json.dumps(report([*child, "--child-from"], list(rows), budget_s=slow * BUDGET_S, row_s=slow * ROW_S)))


def all_rows(device: torch.device, tiny: bool) -> dict[str, Row]:
    """The report, in order: what matters most comes first."""
    config = load_config("debug" if tiny else "moonlight-16b-a3b").model
    length = 64 if tiny else 8192
    rows: dict[str, Row] = {"chip": functools.partial(chip, device)}
    for check in CHECKS:
        rows[f"parity {check.__name__}"] = functools.partial(parity, check, device)
    graphs = GRAPHS if device.type == "cuda" else ()
    for mode in (*MODES, IN_FP8, *graphs[:1]):
        rows[f"layers {length} {mode.name}"] = functools.partial(layers, config, length, device, mode)
    rows["experts"] = functools.partial(experts, config, length, device)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        rows[f"attention {backend.name}"] = functools.partial(attention, config, length, device, backend)
    for name, shape in matrix_shapes(config).items():
        rows[f"newton-schulz {name}"] = functools.partial(newton_schulz, name, *shape, device)
    for mode, tokens in [*((mode, length // 2) for mode in MODES), *((mode, length) for mode in graphs[1:])]:
        rows[f"layers {tokens} {mode.name}"] = functools.partial(layers, config, tokens, device, mode)
    return rows


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def chip(device: torch.device) -> None:
    name = name_of(device)
    peak = peak_flops(name)
    show(f"{name}: bf16 peak {'not in the table, hence no MFU' if math.isnan(peak) else f'{peak / 1e12:.0f} TFLOP/s'}")


def layers(config: ModelConfig, length: int, device: torch.device, mode: Mode) -> dict[str, Any]:
    count, peak = config.num_hidden_layers, peak_flops(name_of(device))
    if device.type == "cuda":
        count = layers_that_fit(config, length, torch.cuda.mem_get_info(device)[0])
    count, seconds, memory = shrink_to_fit(
        lambda count: time_layers(with_layers(config, count), length, device, mode), count
    )
    speed = length / seconds
    flops = speed * flops_per_token(with_layers(config, count), length)
    mfu = None if math.isnan(peak) else flops / peak
    show(
        f"{f'layers {length} {mode.name}':32}{count:4} layers{seconds * 1e3:10.1f} ms{speed:10.0f} tokens/s"
        f"{flops / 1e12:8.3g} TFLOP/s, MFU {f'{mfu:.1%}' if mfu is not None else '?'}, peak {memory / 2**30:.1f} GiB"
    )
    waits = host_waits(one_pass(without_memory(with_layers(config, 2)), length, device, mode), device)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rehearsed = pool.submit(rehearsed_peak, with_layers(config, count), length, mode).result()
    show(f"{'':32}the host waits {waits} times a pass; rehearsed, the peak is {rehearsed / 2**30:.1f} GiB")
    return {
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
        "rehearsed_peak_bytes": rehearsed,
        "host_waits": waits,
    }


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
    step = one_pass(without_memory(config), length, device, mode)
    seconds = timed(captured(step, device) if mode.graph else step, device, warmup=3, rounds=8)
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def without_memory(config: ModelConfig) -> Moonlight:
    """A network in bf16 on the meta device."""
    with torch.device("meta"):
        model = Moonlight(config, aux_loss_weight=1e-4)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # the router's bias stays fp32
    return model


def one_pass(model: Moonlight, length: int, device: torch.device, mode: Mode) -> Callable[[], None]:
    """Forward and backward of the network, which gets memory and weights first."""
    config = model.config
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
        if mode.fp8 and isinstance(block.mlp, MoE):
            check_fp8(device)
            block.mlp.experts.fp8 = Fp8Copies()
        if mode.compiled:
            block.compile()
    ids_BS = torch.randint(0, config.vocab_size, (1, length), device=device)

    def step() -> None:
        out = cast(LossOutput, model(ids_BS, ids_BS))
        (out.loss_sum / length + out.aux_loss).backward()
        model.zero_grad()

    return step


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same as one CUDA graph, which the host launches at once. Fails where the host waits for the device on the way."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and allocates what stays
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense"}


def host_waits(step: Callable[[], None], device: torch.device) -> int:
    """Times that the host waits for the device in a call, the first one aside."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        step()
    # The profiler itself waits once, at its end; a read of a number is one wait by two names.
    counts = {event.key: event.count for event in seen.key_averages() if event.key in WAITS}
    reads = counts.pop("aten::_local_scalar_dense", 0)
    return max(reads, sum(counts.values()) - 1 if device.type == "cuda" else 0)


def rehearsed_peak(config: ModelConfig, length: int, mode: Mode) -> int:
    """Bytes that the pass holds at most, on a device that is not there; once a process."""
    from pipeline.rehearsal.device import TAPE, install
    from pipeline.rehearsal.recorder import Memory
    from pipeline.rehearsal.step import on_stage

    device, memory, model = install(1), Memory(TAPE), without_memory(config)
    with on_stage(memory):
        one_pass(model, length, device, mode._replace(compiled=False))()
    return memory.peak


def experts(config: ModelConfig, length: int, device: torch.device) -> None:
    """Of one rank of 8 whose experts get as many rows as any."""
    D, F_, e = config.hidden_size, config.moe_intermediate_size, max(config.n_routed_experts // 8, 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pairs = length * config.num_experts_per_tok // e * e

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    stacks = Stacks(draw(e, F_, D), draw(e, F_, D), draw(e, D, F_))
    offsets_e = torch.arange(1, e + 1, dtype=torch.int32, device=device) * (pairs // e)
    places, copies = Places(torch.arange(pairs, device=device), offsets_e, None), Fp8Copies()
    rows_MD, hidden_MF, both_M2F = draw(pairs, D), draw(pairs, F_), draw(pairs, 2 * F_)
    seconds = []
    with kept([copies]):
        for name in (str(dtype).removeprefix("torch."), "fp8"):
            if name == "fp8":
                check_fp8(device)

            def step(name: str = name) -> None:
                products = Fp8(stacks, places, copies) if name == "fp8" else Wide(stacks, places)
                products.gate_up(rows_MD)
                products.down(hidden_MF)
                products.through_down(rows_MD)
                products.through_gate_up(both_M2F)

            seconds.append(timed(step, device, warmup=2, rounds=5))
            flops = 12 * pairs * D * F_ / seconds[-1]
            what = f"{pairs} rows of {e} experts, {D} x {F_}"
            show(f"{f'experts {name}':32}{seconds[-1] * 1e3:10.2f} ms{flops / 1e12:8.3g} TFLOP/s ({what})")
    show(f"{'':32}fp8 takes {seconds[1] / seconds[0]:.2f} times as long")


def attention(config: ModelConfig, length: int, device: torch.device, backend: SDPBackend) -> None:
    heads, width, value_width = config.num_attention_heads, config.qk_head_dim, config.v_head_dim
    flops = 3 * 2 * heads * length**2 // 2 * (width + value_width)  # causal half, backward twice the forward

    def draw(numbers: int) -> Tensor:
        return torch.randn(1, heads, length, numbers, device=device, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = draw(width), draw(width), draw(value_width)
    padded = backend == SDPBackend.FLASH_ATTENTION  # takes one width only

    def step() -> None:
        with sdpa_kernel(backend):
            value = F.pad(v, (0, width - value_width)) if padded else v
            out = F.scaled_dot_product_attention(q, k, value, is_causal=True)
        out.backward(out.detach())

    seconds = timed(step, device, warmup=2, rounds=5)
    what = f"{heads} heads of {width}/{value_width}, {length} tokens"
    show(f"{f'attention {backend.name}':32}{seconds * 1e3:10.2f} ms{flops / seconds / 1e12:8.3g} TFLOP/s ({what})")


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """(matrices in a batch, rows, columns) of each kind of matrix that Muon trains."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    return {
        "expert": (config.n_routed_experts, config.moe_intermediate_size, hidden),
        "shared": (6, config.shared_intermediate_size, hidden),
        "dense": (3, config.intermediate_size, hidden),
        "q_proj": (6, heads * config.qk_head_dim, hidden),
        "kv_a": (6, latent + config.qk_rope_head_dim, hidden),
        "kv_b": (6, heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (6, hidden, heads * config.v_head_dim),
        "router": (26, config.n_routed_experts, hidden),
    }


def newton_schulz(name: str, batch: int, rows: int, columns: int, device: torch.device) -> dict[str, Any]:
    schedule = coefficients("moonlight", 5)
    x_BMN = torch.randn(batch, rows, columns, device=device).bfloat16()

    def looped() -> None:
        for matrix in x_BMN.split(1):
            orthogonalize(matrix, schedule)

    def batched() -> None:
        orthogonalize(x_BMN, schedule)

    def gram() -> None:
        orthogonalize(x_BMN, schedule, "gram")

    work = batch * newton_schulz_flops(rows, columns, 5) / 1e12
    speeds = [work / timed(run, device, warmup=2, rounds=5) for run in (looped, batched, gram)]
    shape = f"{batch} of {rows} x {columns}"
    show(
        f"{f'newton-schulz {name}':32}{shape:>20}: looped {speeds[0]:.3g}, batched {speeds[1]:.3g}, Gram {speeds[2]:.3g} TFLOP/s"
    )
    return {
        "benchmark": f"gpu/newton_schulz/{name}",
        "ours": round(speeds[1], 3),
        "peer": round(speeds[0], 3),
        "ratio": round(speeds[1] / speeds[0], 3),
        "target": 1.0,
        "met": speeds[1] >= speeds[0],
        "unit": "TFLOP/s, batched against looped",
        "gram": round(speeds[2], 3),
    }


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
