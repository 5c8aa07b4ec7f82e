"""What a run will need, before it is started: memory of a GPU, traffic, time and cost. Needs no GPU and reads no data.

    python -m jobs.plan --config moonlight-16b-a3b [--mfu 0.39] [--price 2.5] [section.key=value ...]
    python -m jobs.plan --config moonlight-16b-a3b --rehearse [--chip h100] [--trace step.json] [section.key=value ...]

Try `parallelism.shard=32`, `training.micro_batch=2` or `training.activation_checkpointing=full`. The figures and what
they leave out: pipeline/planner/. `--rehearse` runs one whole step of one rank without a GPU (pipeline/rehearsal/, a minute or two): every
allocation, collective, wait of the host and kernel, and from a chip's rates what hides behind what, so MFU is a result. Exit code 0: it fits; 1: it does not fit into a GPU's memory, with what would help;
2: wrong configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from jobs.cli import parser
from jobs.views.plan import show
from pipeline.config.load import load_config
from pipeline.planner.estimate import Hardware


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("plan", "What a run will need, before it is started.")
    usual = Hardware()
    made.add_argument("--mfu", type=float, default=usual.mfu, help="share of the peak that forward and backward reach")
    made.add_argument("--peak-tflops", type=float, default=usual.peak_tflops, help="dense bf16 of one GPU")
    made.add_argument("--gpu-memory", type=float, default=usual.memory_gb, metavar="GB")
    made.add_argument(
        "--network", type=float, default=usual.network_gb_s, metavar="GB/S", help="per GPU, between nodes"
    )
    made.add_argument("--price", type=float, metavar="DOLLARS", help="of one GPU for an hour")
    made.add_argument("--rehearse", action="store_true", help="run one step of one rank on a GPU that is not there")
    made.add_argument(
        "--chip", help="rates of a rehearsal: h100, h200, b200, mi300x or a file like theirs (default h100)"
    )
    made.add_argument("--trace", metavar="FILE", help="write a rehearsal's time line for Perfetto")
    given = made.parse_args(arguments)
    hardware = Hardware(
        peak_tflops=given.peak_tflops, memory_gb=given.gpu_memory, network_gb_s=given.network, mfu=given.mfu
    )
    wrong = [f"{name} {value:g} must be above 0" for name, value in asdict(hardware).items() if value <= 0]
    if given.price is not None and not given.price >= 0:
        wrong.append(f"--price {given.price:g} must be 0 or more")
    if not given.rehearse and (given.chip or given.trace):
        wrong.append(f"{'--chip' if given.chip else '--trace'} belongs to a rehearsal: add --rehearse")
    if wrong or given.mfu > 1:
        made.error("; ".join(wrong) or f"--mfu {given.mfu:g} is a share of the peak: at most 1")
    try:
        config = load_config(given.config, given.overrides)
        if given.rehearse:
            from jobs.views.rehearsal import rehearse_and_show  # torch, and a device of its own

            return rehearse_and_show(config, given.chip or "h100", given.trace)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return show(config, hardware, given.price)


if __name__ == "__main__":
    sys.exit(main())
