"""A training step of one small Moonlight on a CPU, side by side with the same network in other libraries.

    python -m benchmarks.train_step [--rounds 7] [--sizes demo,wide]

ours          this project's network, loss and optimizer (Muon for matrices, AdamW for the rest)
transformers  `DeepseekV3ForCausalLM` at its defaults (fused attention, grouped expert matmuls), its own loss, and
              `torch.optim.Muon` for matrices with `torch.optim.AdamW` for the rest. torch's Muon takes matrices only, so
              each expert's gate, up and down matrix is handed to it as a view of the stacks: the same update as ours.

Both start from the same weights and see the same tokens; the losses of the first step are compared before anything is
measured. Each contender lives in a process of its own with one thread, so that peak memory (of the whole process, from
the kernel) is its own; rounds alternate between them and one step runs at a time. Medians over rounds of the CPU time of that
thread.
Balance loss off: transformers computes none in training.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config.load import load_config
from pipeline.config.schema import ModelConfig, OptimizerConfig
from pipeline.model.hf import hf_config, hf_name
from pipeline.model.moonlight import Moonlight
from pipeline.optim.muon import build_optimizer
from pipeline.optim.rules import moonlight_rules

TARGET = 1.5  # times transformers
LEARNING_RATE = 1e-3
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", default="demo,wide")
    arguments = parser.parse_args()
    results = []
    for name in arguments.sizes.split(","):
        results += compare(name, sizes()[name], arguments.rounds)
    print(json.dumps(results))


def compare(name: str, size: Size, rounds: int) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    for contender in BUILDERS:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(contender, size, theirs), daemon=True)
        process.start()
        workers[contender] = (process, ours)
        if (problem := ours.recv()) is not None:
            print(f"{contender}: not measured ({problem})")
            workers.pop(contender)
    seconds: dict[str, list[float]] = {contender: [] for contender in workers}
    losses = {}
    for round_ in range(-1, rounds):  # the first round warms up
        for contender, (_, pipe) in workers.items():
            pipe.send("step")
            elapsed, loss = pipe.recv()
            if round_ < 0:
                losses[contender] = loss
            else:
                seconds[contender].append(elapsed)
    peaks = {}
    for contender, (process, pipe) in workers.items():
        pipe.send("end")
        peaks[contender] = pipe.recv()
        process.join()
    for contender, loss in losses.items():
        assert abs(loss - losses["ours"]) < 1e-4 * losses["ours"], (contender, loss, losses["ours"])

    tokens = size.batch * size.length
    speeds = {contender: tokens / statistics.median(times) for contender, times in seconds.items()}
    layers, experts = size.config.num_hidden_layers, size.config.n_routed_experts
    print(
        f"\n{name}: {layers} layers of {size.config.hidden_size}, {experts} experts, {size.batch} x {size.length} tokens"
    )
    print(f"{'':14}{'tokens/s':>10}{'seconds a step (fastest - slowest)':>38}{'peak memory':>14}{'ours is':>10}")
    for contender, times in seconds.items():
        span = f"{statistics.median(times):.3f} ({min(times):.3f} - {max(times):.3f})"
        faster = speeds["ours"] / speeds[contender]
        print(f"{contender:14}{speeds[contender]:10.0f}{span:>38}{peaks[contender] / 2**20:11.0f} MiB{faster:9.2f}x")
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


def serve(contender: str, size: Size, pipe: Connection) -> None:
    """Build the contender, then run a step whenever asked; answers (seconds, loss), at the end the peak memory."""
    torch.set_num_threads(1)
    try:
        step = BUILDERS[contender](size)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while pipe.recv() == "step":
        start = time.process_time()
        loss = step()
        pipe.send((time.process_time() - start, loss))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def tokens_of(size: Size) -> tuple[Tensor, Tensor]:
    """The same tokens in every process; labels are the next tokens, without one at a row's end."""
    ids_BS = torch.randint(
        0, size.config.vocab_size, (size.batch, size.length), generator=torch.Generator().manual_seed(0)
    )
    labels_BS = ids_BS.roll(-1, dims=1)
    labels_BS[:, -1] = -100
    return ids_BS, labels_BS


def ours(size: Size) -> Step:
    model = Moonlight(size.config)
    rules = moonlight_rules(size.config, OptimizerConfig())
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(), rules)
    ids_BS, labels_BS = tokens_of(size)

    def step() -> float:
        out = model(ids_BS, labels_BS)
        loss = out.loss_sum / out.num_tokens
        loss.backward()
        optimizer.step(LEARNING_RATE)
        optimizer.zero_grad()
        return loss.item()

    return step


def transformers(size: Size) -> Step:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = hf_config(size.config, bos_token_id=None, eos_token_id=1, dtype="float32")
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(config))
    ours = Moonlight(size.config).state_dict()
    model.load_state_dict(dict(_for_transformers(ours)))
    matrices = {
        n: p
        for n, p in model.named_parameters()
        if p.dim() >= 2 and not n.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
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
    ids_BS, labels_BS = tokens_of(size)

    def step() -> float:
        loss = model(ids_BS, shift_labels=labels_BS, labels=labels_BS, use_cache=False).loss
        loss.backward()
        for name, parameter in matrices.items():
            assert parameter.grad is not None
            for view, gradient in zip(views[name], matrices_of(name, parameter.grad), strict=True):
                view.grad = gradient
        muon.step()
        adamw.step()
        model.zero_grad()
        return loss.item()

    return step


def matrices_of(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices in a parameter of transformers' model, as views: stacks fuse experts, and gate with up."""
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


BUILDERS: dict[str, Callable[[Size], Step]] = {"ours": ours, "transformers": transformers}

if __name__ == "__main__":
    main()
