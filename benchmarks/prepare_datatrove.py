"""One measured run of datatrove for benchmarks/prepare.py: folder, format, tokenizer, MB -> a JSON line. Needs only datatrove."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main(folder: Path, name: str, tokenizer: Path, megabytes: float) -> None:
    for leftover in ("datatrove-out", "datatrove-work", "datatrove-logs"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    text_bytes = 0

    def limited(data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        nonlocal text_bytes
        for document in data:
            text_bytes += len(document.text.encode())
            yield document
            if text_bytes >= megabytes * 1e6:
                return

    reader = JsonlReader(str(folder / name)) if name.startswith("jsonl") else ParquetReader(str(folder / name))
    writer = DocumentTokenizer(
        output_folder=str(folder / "datatrove-out"),
        local_working_dir=str(folder / "datatrove-work"),
        tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
        eos_token="[EOS]",
        batch_size=1000,
        max_tokens_per_file=int(1e9),
        seed=0,
    )
    cpu, wall = _cpu_seconds(), time.monotonic()
    stats = LocalPipelineExecutor(
        [reader, limited, writer], tasks=1, workers=1, logging_dir=str(folder / "datatrove-logs")
    ).run()
    cpu, wall = _cpu_seconds() - cpu, time.monotonic() - wall
    del stats
    tokens = sum(path.stat().st_size for path in (folder / "datatrove-out").glob("*.ds")) // 2
    status = Path("/proc/self/status").read_text()  # as benchmarks/memory.py, which this interpreter does not know
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6
    print(json.dumps({"text_mb": text_bytes / 1e6, "tokens": tokens, "cpu_s": cpu, "wall_s": wall, "peak_mb": peak}))


def _cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


if __name__ == "__main__":
    if len(sys.argv) <= 4:
        raise SystemExit("a part of python -m benchmarks.prepare, which starts it")
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
