"""A training step of one small Moonlight on a CPU, side by side with the same network in other libraries.

    python -m benchmarks.train_step [--rounds 7] [--sizes demo,wide] [--torchtitan FOLDER]

ours             this project's network, loss and optimizer (Muon for matrices, AdamW for the rest)
ours-bf16        the same with bf16 products in Newton-Schulz whatever the processor has; left out where they are the choice
transformers     `DeepseekV3ForCausalLM` at its defaults (fused attention, grouped expert matmuls), its own loss
torchtitan       its DeepSeek-V3 model with the same sizes and its chunked loss (`train_step_torchtitan.py`), experts in
                 fp32; imported from FOLDER where given (`pip install --target`), skipped where it cannot be
torchtitan-bf16  the same as it ships: experts cast to bf16, all else in fp32

The peers' matrices are trained by `torch.optim.Muon` and the rest by its fused AdamW. torch's Muon takes matrices only,
so each expert's gate, up and down matrix is handed to it as a view of the stacks: the same update as ours.

All start from the same weights and see the same tokens. No figure is printed before the numbers of parameters and the
losses of the first two steps (hence gradients and updates) were found equal: the same work is measured. Each contender
lives in a process of its own with one thread, so that peak memory (of the whole process, from the kernel) is its own;
rounds alternate between them and one step runs at a time. Medians over rounds of the CPU time of that thread. Balance
loss off: no peer computes one in training.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.arguments import folder_of, positive, some_of
from benchmarks.memory import peak_bytes
from benchmarks.processor import processor
from benchmarks.train_step_torchtitan import build, torchtitan_name
from pipeline.config.load import load_config
from pipeline.config.schema import ModelConfig, OptimizerConfig
from pipeline.model.hf import hf_config, hf_name
from pipeline.model.moonlight import Moonlight
from pipeline.optim.muon import build_optimizer
from pipeline.optim.rules import moonlight_rules
from pipeline.training.flops import flops_per_token

TARGET = 1.5  # times transformers
LEARNING_RATE = 1e-3
LOSS_TOLERANCE = {"torchtitan-bf16": 1e-3}  # relative; 8 bits in the experts' products
Step = Callable[[], float]  # one training step -> mean loss in nats


class Size(NamedTuple):
    config: ModelConfig
    batch: int
    length: int


def sizes() -> dict[str, Size]:
    demo = load_config("debug").model
    wide = {
        "vocab_size": 16_384,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1056,
        "moe_intermediate_size": 264,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 1024,
    }
    return {
        "demo": Size(demo, batch=8, length=512),
        "wide": Size(demo.model_copy(update=wide), batch=4, length=1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--sizes", type=some_of(sizes()), default="demo,wide")
    parser.add_argument(
        "--torchtitan", type=folder_of("torchtitan"), help="folder that contains the package torchtitan"
    )
    arguments = parser.parse_args()
    results = []
    for name in arguments.sizes:
        results += compare(name, sizes()[name], arguments.rounds, arguments.torchtitan)
    print(json.dumps(results))


def compare(name: str, size: Size, rounds: int, folder: str | None) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    parameters: dict[str, int] = {}
    for contender in BUILDERS:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(contender, size, folder, theirs), daemon=True)
        process.start()
        workers[contender] = (process, ours)
        parameters[contender], problem = ours.recv()
        if problem:
            print(f"{contender}: not measured ({problem})")
            workers.pop(contender)
    seconds: dict[str, list[float]] = {contender: [] for contender in workers}
    losses: dict[str, list[float]] = {contender: [] for contender in workers}
    for round_ in range(-1, rounds):  # the first round warms up
        for contender, (_, pipe) in workers.items():
            pipe.send("step")
            elapsed, loss = pipe.recv()
            losses[contender].append(loss)
            if round_ >= 0:
                seconds[contender].append(elapsed)
    peaks = {}
    for contender, (process, pipe) in workers.items():
        pipe.send("end")
        peaks[contender] = pipe.recv()
        process.join()
    for contender, found in losses.items():
        tolerance = LOSS_TOLERANCE.get(contender, 1e-4)
        for loss, expected in zip(found[:2], losses["ours"]):
            assert abs(loss - expected) < tolerance * expected, (contender, found, losses["ours"])
        assert parameters[contender] == parameters["ours"], (contender, parameters)

    tokens = size.batch * size.length
    speeds = {contender: tokens / statistics.median(times) for contender, times in seconds.items()}
    layers, experts = size.config.num_hidden_layers, size.config.n_routed_experts
    shape = (
        f"{layers} layers of {size.config.hidden_size}, {experts} experts, {parameters['ours'] / 1e6:.1f} M parameters"
    )
    gflop = flops_per_token(size.config, size.length) * tokens / 1e9
    print(f"\n{name}: {shape}; {size.batch} x {size.length} tokens, {gflop:.0f} GFLOP forward and backward")
    print(processor())
    print(f"{'':16}{'tokens/s':>10}{'seconds a step (fastest - slowest)':>38}{'peak memory':>14}{'ours is':>10}")
    for contender, times in seconds.items():
        span = f"{statistics.median(times):.3f} ({min(times):.3f} - {max(times):.3f})"
        faster = speeds["ours"] / speeds[contender]
        print(f"{contender:16}{speeds[contender]:10.0f}{span:>38}{peaks[contender] / 2**20:11.0f} MiB{faster:9.2f}x")
    return [
        {
            "benchmark": f"train_step/{name}/{contender}",
            "ours": round(speeds["ours"], 1),
            "peer": round(speed, 1),
            "ratio": round(speeds["ours"] / speed, 3),
            "target": TARGET if contender == "transformers" else 1.0,
            "met": speeds["ours"] / speed >= (TARGET if contender == "transformers" else 1.0),
            "unit": "tokens/s",
            "peak_bytes_ours": peaks["ours"],
            "peak_bytes_peer": peaks[contender],
        }
        for contender, speed in speeds.items()
        if contender != "ours"
    ]


def serve(contender: str, size: Size, folder: str | None, pipe: Connection) -> None:
    """Build the contender, say (number of parameters, what is missing), then run a step whenever asked; answers
    (seconds, loss), at the end the peak memory."""
    torch.set_num_threads(1)
    if folder and contender.startswith("torchtitan"):
        sys.path.append(folder)
        warnings.filterwarnings("ignore", message="In CPU autocast")  # its router asks for fp32, which it has anyway
    try:
        parameters, step = BUILDERS[contender](size)
    except ImportError as error:
        pipe.send((0, str(error)))
        return
    pipe.send((parameters, None))
    while pipe.recv() == "step":
        start = time.process_time()
        loss = step()
        pipe.send((time.process_time() - start, loss))
    pipe.send(peak_bytes())


def tokens_of(size: Size) -> tuple[Tensor, Tensor]:
    """The same tokens in every process; labels are the next tokens, without one at a row's end."""
    ids_BS = torch.randint(
        0, size.config.vocab_size, (size.batch, size.length), generator=torch.Generator().manual_seed(0)
    )
    labels_BS = ids_BS.roll(-1, dims=1)
    labels_BS[:, -1] = -100
    return ids_BS, labels_BS


def ours(size: Size, bf16: bool = False) -> tuple[int, Step]:
    model = Moonlight(size.config)
    rules = moonlight_rules(size.config, OptimizerConfig())
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(), rules)
    if bf16 and optimizer.muon.products == "half":
        raise ImportError("the same as ours here")
    if bf16:
        optimizer.muon.products = "half"  # past the refusal
    ids_BS, labels_BS = tokens_of(size)

    def step() -> float:
        out = model(ids_BS, labels_BS)
        loss = out.loss_sum / out.num_tokens
        loss.backward()
        optimizer.step(LEARNING_RATE)
        optimizer.zero_grad()
        return loss.item()

    return count(model), step


def transformers(size: Size) -> tuple[int, Step]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = hf_config(size.config, bos_token_id=None, eos_token_id=1, dtype="float32")
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(config))
    model.load_state_dict(dict(_for_transformers(Moonlight(size.config).state_dict())))
    update = torch_optimizers(model, ("embed_tokens.weight", "lm_head.weight"))
    ids_BS, labels_BS = tokens_of(size)

    def step() -> float:
        loss = model(ids_BS, shift_labels=labels_BS, labels=labels_BS, use_cache=False).loss
        loss.backward()
        update()
        return loss.item()

    return count(model), step


def torchtitan(size: Size, experts_dtype: torch.dtype = torch.float32) -> tuple[int, Step]:
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

    model = build(size.config, size.length, experts_dtype)
    model.load_state_dict({torchtitan_name(n): t for n, t in Moonlight(size.config).state_dict().items()})
    model._skip_lm_head = True  # the loss applies it, chunk by chunk
    inner = CrossEntropyLoss.Config(global_vocab_size=size.config.vocab_size)
    loss_of = ChunkedLossWrapper.Config(loss_fn=inner).build()
    loss_of.set_lm_head(model.lm_head)
    update = torch_optimizers(model, ("tok_embeddings.weight", "lm_head.weight"))
    ids_BS, labels_BS = tokens_of(size)
    valid = (labels_BS != -100).sum()

    def step() -> float:
        loss, _ = loss_of(model(ids_BS), labels_BS, valid)
        loss.backward()
        update()
        return loss.item()

    return count(model), step


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def torch_optimizers(model: nn.Module, not_matrices: tuple[str, ...]) -> Callable[[], None]:
    """torch's Muon for the matrices (views of stacks included) and AdamW for the rest, as one update."""
    matrices = {n: p for n, p in model.named_parameters() if p.dim() >= 2 and not n.endswith(not_matrices)}
    views = {name: [nn.Parameter(view) for view in matrices_of(name, p.detach())] for name, p in matrices.items()}
    muon = torch.optim.Muon(
        [view for several in views.values() for view in several],
        lr=LEARNING_RATE,
        weight_decay=0.1,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    others = [p for n, p in model.named_parameters() if n not in matrices]
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def update() -> None:
        for name, parameter in matrices.items():
            assert parameter.grad is not None
            for view, gradient in zip(views[name], matrices_of(name, parameter.grad), strict=True):
                view.grad = gradient
        muon.step()
        adamw.step()
        model.zero_grad()

    return update


def matrices_of(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices in a parameter, as views of the stacks of experts; transformers fuses gate with up."""
    if tensor.dim() == 2:
        return [tensor]
    halves = tensor.chunk(2, dim=1) if name.endswith("gate_up_proj") else (tensor,)
    return [matrix for half in halves for matrix in half.unbind()]


def _for_transformers(state: dict[str, Tensor]) -> Any:
    for name, tensor in state.items():
        if name.endswith("experts.gate_proj"):
            up = state[name.replace("gate_proj", "up_proj")]
            yield "model." + name.replace("gate_proj", "gate_up_proj"), torch.cat([tensor, up], dim=1)
        elif name.endswith("experts.down_proj"):
            yield "model." + name, tensor
        elif not name.endswith("experts.up_proj"):
            yield hf_name(name), tensor


BUILDERS: dict[str, Callable[[Size], tuple[int, Step]]] = {
    "ours": ours,
    "ours-bf16": partial(ours, bf16=True),
    "transformers": transformers,
    "torchtitan": torchtitan,
    "torchtitan-bf16": partial(torchtitan, experts_dtype=torch.bfloat16),
}

if __name__ == "__main__":
    main()
