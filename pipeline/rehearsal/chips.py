"""What a GPU and its network do in a second, one YAML file a kind of GPU. Peaks are the maker's; what is reached is assumed or measured, as
each file says."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipeline.config.schema import RunConfig
from pipeline.config.section import Section
from pipeline.config.text import parse
from pipeline.config.values import PositiveFloat, PositiveInt

FOLDER = Path(__file__).parent / "chips"


class Chip(Section):
    """Rates in TFLOP/s, TB/s and GB/s (a GPU and direction); times in microseconds."""

    name: str
    memory_gb: PositiveFloat
    peak_tflops: PositiveFloat  # dense bf16, by which MFU is counted
    matmul: PositiveFloat  # reached, bf16
    matmul_fp32: PositiveFloat
    grouped: PositiveFloat
    grouped_fp8: PositiveFloat | None = None  # of e4m3 with scales of blocks; None: a chip without
    attention_forward: PositiveFloat
    attention_backward: PositiveFloat
    memory_tb_s: PositiveFloat
    host_copy_gb_s: PositiveFloat
    gpus_per_node: PositiveInt
    node_gb_s: PositiveFloat
    node_latency_us: PositiveFloat
    network_gb_s: PositiveFloat
    network_latency_us: PositiveFloat
    kernel_us: PositiveFloat  # a kernel takes no less
    launch_us: PositiveFloat  # of the host, for each
    host_wait_us: PositiveFloat  # until the host goes on after it has waited


def check_chip(chip: Chip, config: RunConfig) -> None:
    """Raises ValueError where the run asks for what the chip does not have."""
    if config.training.expert_products == "fp8" and chip.grouped_fp8 is None:
        raise ValueError(
            f"training.expert_products fp8: {chip.name} has no rate for it (grouped_fp8 in the chip's file); set it to compute_dtype, "
            "choose another --chip, or give the rate if the chip multiplies e4m3 (fn)"
        )


def load_chip(given: str) -> Chip:
    """By name or file. Raises ValueError with what is missing or wrong."""
    file = Path(given) if given.endswith((".yaml", ".yml")) else FOLDER / f"{given}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise ValueError(f"--chip {given!r}: no such file, and no chip of that name; known are {known}")
    try:
        values = parse(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"--chip {file}: cannot be read ({error}); write rates as h100.yaml has them") from None
    if not isinstance(values, dict):
        raise ValueError(f"--chip {file}: must hold names with rates, as h100.yaml does")
    try:
        return Chip.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"--chip {file}: {key} is missing; add the rate as h100.yaml has it") from None
        raise ValueError(f"--chip {file}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
