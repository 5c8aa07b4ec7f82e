"""A run before it is started: memory, traffic, time and cost, without a GPU and without touching data.

Time of a step = model FLOPs / (peak * MFU) + Newton-Schulz FLOPs of the busiest rank / (peak * 0.55). MFU, the share of
the chip's peak that forward and backward reach with their communication, is an input: 0.39 is what NVIDIA published for
this network on H100s (386.6 of 989.4 TFLOP/s, Megatron-Bridge's verification card), and 0.55 is what large bf16 products
reach there. Traffic is given beside the time as the seconds it would take alone, so that one sees whether it can hide
behind the computation.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.model.shapes import ParameterCount, count_parameters, parameter_shapes
from pipeline.optim.layout import sharded_parameters
from pipeline.optim.plan import MuonPlan
from pipeline.optim.replicas import plan_of
from pipeline.optim.rules import moonlight_rules
from pipeline.optim.schedule import Segment, segments
from pipeline.planner.memory import Memory, memory
from pipeline.planner.sizes import FP32, sizes_of
from pipeline.planner.traffic import Traffic, traffic
from pipeline.training.flops import PEAKS, flops_per_token

NEWTON_SCHULZ_EFFICIENCY = 0.55


@dataclass(frozen=True)
class Hardware:
    """One worker's processor and its share of the network. The defaults are an H100 SXM in an eight-GPU node with 3,200 Gbit/s."""

    peak_tflops: float = PEAKS["H100"]  # dense bf16; of a CPU fp32
    memory_gb: float = 80.0
    network_gb_s: float = 50.0  # between nodes, per GPU and direction
    node_gb_s: float = 450.0  # inside a node, the same
    gpus_per_node: int = 8
    mfu: float = 0.39

    @classmethod
    def of_cpus(cls, cores: float, memory_gb: float) -> Hardware:
        """A worker of so many cores with AVX-512: 0.1 TFLOP/s each in fp32, half of which the demo's steps reach (benchmarks/README.md)."""
        return cls(peak_tflops=0.1 * cores, memory_gb=memory_gb, network_gb_s=1.0, node_gb_s=5.0, mfu=0.5)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    model: float
    newton_schulz: float
    wire: float  # of all traffic alone; a group that fits into a node talks at the speed inside it

    @property
    def total(self) -> float:
        return self.model + self.newton_schulz


@dataclass(frozen=True)
class Estimate:
    parameters: ParameterCount
    flops_per_token: int
    segments: tuple[Segment, ...]  # steps of one batch size each
    memory: Memory
    traffic: Traffic  # of a step of the last segment
    step: StepTime  # the same step
    tokens_per_second: float  # of one worker, over the whole run
    seconds: float  # of the whole run
    newton_schulz_imbalance: float

    @property
    def steps(self) -> int:
        return sum(segment.steps for segment in self.segments)


def estimate(config: RunConfig, hardware: Hardware) -> Estimate:
    """Everything that is known of the run beforehand."""
    shapes = parameter_shapes(config.model)
    sizes = sizes_of(shapes)
    itemsize = 2 if config.training.compute_dtype == "bf16" or _auto_bf16(config) else FP32
    plan = _muon_plan(config, shapes)
    length, world = config.training.sequence_length, config.parallelism.world_size
    per_token = flops_per_token(config.model, length)
    found = segments(config.schedule, length)
    sent = traffic(config, sizes, plan, found[-1].sequences, itemsize)

    def speed(ranks: int) -> float:
        """Bytes a second in a group of neighbouring ranks."""
        return 1e9 * (hardware.node_gb_s if ranks <= hardware.gpus_per_node else hardware.network_gb_s)

    def step_time(sequences: int) -> StepTime:
        peak = hardware.peak_tflops * 1e12
        busiest = max(plan.loads) if plan else 0
        return StepTime(
            model=per_token * sequences * length / world / (peak * hardware.mfu),
            newton_schulz=busiest / (peak * NEWTON_SCHULZ_EFFICIENCY),
            wire=(sent.weights + sent.gradients + sent.muon) / speed(config.parallelism.shard)
            + sent.copies / speed(world)
            + sent.tokens / speed(config.parallelism.ep),
        )

    seconds = sum(segment.steps * step_time(segment.sequences).total for segment in found)
    tokens = sum(segment.steps * segment.sequences for segment in found) * length
    held = memory(config, sizes, itemsize)
    return Estimate(
        parameters=count_parameters(config.model),
        flops_per_token=per_token,
        segments=found,
        memory=held,
        traffic=sent,
        step=step_time(found[-1].sequences),
        tokens_per_second=tokens / seconds / world,
        seconds=seconds,
        newton_schulz_imbalance=plan.imbalance if plan else 1.0,
    )


def _auto_bf16(config: RunConfig) -> bool:
    return config.training.compute_dtype == "auto" and config.cluster.use_gpu


def _muon_plan(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> MuonPlan | None:
    if config.optimizer.name != "muon":
        return None
    muon = config.optimizer.muon
    parameters = sharded_parameters(
        list(shapes.items()), moonlight_rules(config.model, config.optimizer), config.parallelism
    )
    return plan_of(parameters, muon)
