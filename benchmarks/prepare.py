"""Raw text to packed, checksummed Parquet: MB of text per CPU-second against datatrove, peak memory, ids against Hugging Face.

Collects distinct real text from this machine (sources and documentation of Python, of its packages and of the system),
writes it as jsonl.zst and as Parquet, and runs `data_prep.prepare` (listing, hashing, tokenizing, held-out split, duplicates,
packing, re-reading, committing), the libraries under it alone (benchmarks/prepare_limit.py: what no prepare on them can go
below) and datatrove (reader -> DocumentTokenizer) on it, each in a fresh process on one core, in
interleaved rounds. datatrove writes its own flat format, unpacked and unchecked: it does less. CPU-seconds are user + system
time of the process and its children; imports are not counted. Then every id is compared with Hugging Face `tokenizers`.

    python -m benchmarks.prepare --megabytes 500 --peer-python /path/to/venv/bin/python

`--peer-python` is an interpreter with datatrove and zstandard installed; without it that row is skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.arguments import interpreter, positive
from benchmarks.memory import peak_bytes

ENDINGS = {
    ".py", ".pyi", ".md", ".rst", ".txt", ".c", ".h", ".hpp", ".cc", ".cpp", ".cu", ".cuh", ".js", ".ts", ".html", ".rs", ".sh", ".tex",
    ".pod", ".pm", ".pl", ".tcl", ".el", ".rb", ".go", ".java", ".cmake", ".inl", "",
}  # fmt: skip
SYSTEM_FOLDERS = ("/usr/share", "/usr/include", "/usr/lib")
DOCUMENTS_PER_FILE = 4000
TARGET_RATIO, TARGET_RATE, TARGET_MEMORY = 30.0, 50.0, 1000.0
FORMATS = ("jsonl.zst", "parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=positive, default=500, help="text to prepare")
    parser.add_argument("--peer-megabytes", type=positive, help="text for datatrove; default: the same")
    parser.add_argument(
        "--check-megabytes", type=positive, default=100, help="text whose ids are compared with Hugging Face"
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--vocab-size", type=positive, default=32_000)
    parser.add_argument("--peer-python", type=interpreter, help="an interpreter that has datatrove")
    parser.add_argument("--folder", type=Path, help="working folder, kept and used again; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as temporary:
        run(arguments, arguments.folder or Path(temporary))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    text_mb = collect(folder, arguments.megabytes)
    peer_mb = min(text_mb, arguments.peer_megabytes or text_mb)
    tokenizer = train(folder, arguments.vocab_size)
    has_peer = arguments.peer_python and _succeeds([arguments.peer_python, "-c", "import datatrove, zstandard"])
    if not has_peer:
        print("datatrove: skipped; give --peer-python an interpreter with datatrove and zstandard installed")
    ours: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    peer: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    limit: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    for number in range(arguments.rounds):
        for name in FORMATS:
            limit[name].append(_worker([sys.executable, "-m", "benchmarks.prepare_limit"], folder, name, tokenizer, ""))
            ours[name].append(
                _worker([sys.executable, "-m", "benchmarks.prepare_ours"], folder, name, tokenizer, str(number))
            )
            if has_peer and (peer_mb < text_mb or number == 0):
                script = str(Path(__file__).with_name("prepare_datatrove.py"))
                peer[name].append(_worker([arguments.peer_python, script], folder, name, tokenizer, str(peer_mb)))
    print(f"\n{text_mb:.0f} MB of text, {arguments.rounds} rounds, medians, one core\n")
    print(f"{'':24}{'MB/cpu-s':>10}{'Mtok/cpu-s':>12}{'CPU-s':>8}{'wall s':>8}{'peak MB':>9}")
    results = []
    for name in FORMATS:
        for who, rows in (("ours", ours[name]), ("datatrove", peer[name])):
            if rows:
                m = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
                rate, tokens = m["text_mb"] / m["cpu_s"], m["tokens"] / 1e6 / m["cpu_s"]
                print(
                    f"{who + ' ' + name:24}{rate:10.1f}{tokens:12.2f}{m['cpu_s']:8.1f}{m['wall_s']:8.1f}{m['peak_mb']:9.0f}"
                )
        steps = {key: statistics.median(row[key] for row in limit[name]) for key in limit[name][0]}
        print(f"{'libraries alone ' + name:24}{_rate(limit[name]):10.1f}{'':12}{steps['cpu_s']:8.1f}", end="  ")
        print(", ".join(f"{step} {steps[step]:.2f}" for step in ("read", "encode", "cast", "lz4", "zstd")))
        rate = _rate(ours[name])
        results.append(_result(f"prepare {name} MB/cpu-s", rate, None, TARGET_RATE, rate >= TARGET_RATE))
        if peer[name]:
            ratio = rate / _rate(peer[name])
            results.append(
                _result(
                    f"prepare {name} against datatrove", rate, _rate(peer[name]), TARGET_RATIO, ratio >= TARGET_RATIO
                )
            )
        peak = max(row["peak_mb"] for row in ours[name])
        results.append(_result(f"prepare {name} peak MB", peak, None, TARGET_MEMORY, peak < TARGET_MEMORY))
    checked, different = check_ids(folder, tokenizer, arguments.check_megabytes)
    print(f"\nids against Hugging Face tokenizers: {checked / 1e6:.0f} MB, {different} documents differ")
    results.append(_result("prepare ids differing from Hugging Face", different, 0, 0, different == 0))
    encode_rates(folder, tokenizer)
    print(json.dumps(results))


def _result(name: str, ours: float, peer: float | None, target: float, met: bool) -> dict[str, object]:
    ratio = round(ours / peer, 2) if peer else None
    return {
        "benchmark": name,
        "ours": round(ours, 2),
        "peer": peer and round(peer, 2),
        "ratio": ratio,
        "target": target,
        "met": met,
    }


def _rate(rows: list[dict[str, float]]) -> float:
    return statistics.median(row["text_mb"] / row["cpu_s"] for row in rows)


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _worker(command: list[str], folder: Path, name: str, tokenizer: Path, extra: str) -> dict[str, float]:
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), name, str(tokenizer), extra], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command[-1]} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


class Meter:
    """CPU, wall time and peak memory from here to `result`."""

    def __init__(self) -> None:
        self._cpu, self._wall = _cpu_seconds(), time.monotonic()

    def result(self, text_bytes: int, tokens: int) -> dict[str, float]:
        cpu = _cpu_seconds() - self._cpu
        return {
            "text_mb": text_bytes / 1e6,
            "tokens": tokens,
            "cpu_s": cpu,
            "wall_s": time.monotonic() - self._wall,
            "peak_mb": peak_bytes() / 1e6,
        }


def _cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


# -- text ------------------------------------------------------------------------------------------------------------


def real_texts(limit: int) -> Iterator[tuple[str, str]]:
    """(path, text) of distinct files up to `limit` bytes, spread over the folders in hash order."""
    folders = [sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], *SYSTEM_FOLDERS]
    paths = set()
    for folder in folders:
        for root, _, names in os.walk(folder):
            paths |= {os.path.join(root, name) for name in names if os.path.splitext(name)[1] in ENDINGS}
    seen, total = set(), 0
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.encode(errors="replace")).digest()):
        if total >= limit:
            return
        if os.path.islink(path) or not 200 <= os.path.getsize(path) <= 4_000_000:
            continue
        try:
            data = Path(path).read_bytes()
            text = data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(data).digest()
        if "\0" not in text and digest not in seen:
            seen.add(digest)
            total += len(data)
            yield path, text


def collect(folder: Path, megabytes: int) -> float:
    """The corpus in both formats; returns its size in MB of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    note = folder / f"text-{megabytes}.json"
    if note.exists():
        return float(json.loads(note.read_text()))
    for name in FORMATS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    total, batch, part = 0, list[tuple[str, str]](), 0

    def flush() -> None:
        nonlocal batch, part
        lines = "".join(json.dumps({"text": text, "id": path}, ensure_ascii=False) + "\n" for path, text in batch)
        (folder / FORMATS[0] / f"{part:04d}.jsonl.zst").write_bytes(
            zstandard.ZstdCompressor(3).compress(lines.encode())
        )
        table = pa.table({"text": [text for _, text in batch], "id": [path for path, _ in batch]})
        pq.write_table(table, folder / FORMATS[1] / f"{part:04d}.parquet", compression="zstd", row_group_size=1000)
        batch, part = [], part + 1

    for path, text in real_texts(megabytes * 1_000_000):
        total += len(text.encode())
        batch.append((path, text))
        if len(batch) == DOCUMENTS_PER_FILE:
            flush()
    if batch:
        flush()
    note.write_text(json.dumps(total / 1e6))
    print(f"collected {total / 1e6:.0f} MB of distinct text in {part} files of each format")
    return total / 1e6


def train(folder: Path, vocab_size: int) -> Path:
    """A tokenizer on 40 MB of the corpus."""
    from pipeline.config.schema import TokenizerConfig
    from pipeline.tokenizer import train_tokenizer

    target = folder / f"tokenizer-{vocab_size}"
    if not (target / "tokenizer.json").exists():
        texts = (text for _, text in real_texts(40_000_000))
        target.mkdir(parents=True, exist_ok=True)
        for name, data in train_tokenizer(texts, TokenizerConfig(vocab_size=vocab_size)).items():
            (target / name).write_bytes(data)
    return target


def check_ids(folder: Path, tokenizer: Path, megabytes: int) -> tuple[int, int]:
    """Bytes compared, and documents whose committed ids are not those of Hugging Face's encoder."""
    import numpy as np
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    from data_prep.tokenize_unit import document_hash

    document = json.loads((tokenizer / "tokenizer.json").read_text())
    document["added_tokens"] = []  # a literal "[EOS]" in text is text
    oracle = Tokenizer.from_str(json.dumps(document))
    dtype = np.uint16 if len(document["model"]["vocab"]) < 65_000 else np.uint32
    committed = {}
    for path in sorted((folder / "ours-parquet" / "datasets" / "documents").glob("*/*[0-9a-f].parquet")):
        if path.name.endswith(".heldout.parquet"):
            continue
        table = pq.read_table(path, columns=["tokens", "doc_hash"])
        committed.update(zip(table["doc_hash"].to_pylist(), table["tokens"].to_pylist()))
    checked = different = 0
    for path in sorted((folder / FORMATS[1]).glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(200, columns=["text"]):
            texts = batch.column(0).to_pylist()
            for text, encoding in zip(texts, oracle.encode_batch_fast(texts, add_special_tokens=False)):
                data = text.encode()
                ours = committed[document_hash(data)]
                different += encoding.ids != np.frombuffer(ours, dtype).tolist()
                checked += len(data)
            if checked >= megabytes * 1_000_000:
                return checked, different
    return checked, different


def encode_rates(folder: Path, tokenizer: Path, megabytes: int = 20) -> None:
    """What an engine costs a given tokenizer: MB of text per CPU-second of encoding alone, by Moonlight's pattern and by nobody's."""
    import pyarrow.parquet as pq

    from pipeline.tokenizer import Encoder
    from pipeline.tokenizer.newer_letters import holds_newer_letters

    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    document = json.loads(files["tokenizer.json"])
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d|[\p{L}_]+|\s+|[^\s\p{L}\d]+"
    nobodys = {**files, "tokenizer.json": json.dumps(document).encode()}
    texts: list[bytes] = []
    for path in sorted((folder / FORMATS[1]).glob("*.parquet")):
        texts += [text.encode() for text in pq.read_table(path, columns=["text"]).column(0).to_pylist()]
        if sum(map(len, texts)) > megabytes * 1_000_000:
            break
    batches = [texts[start : start + 200] for start in range(0, len(texts), 200)]
    size = sum(map(len, texts))
    print(f"\nencoding {size / 1e6:.0f} MB, MB per CPU-second and core-hours a TB")
    runs = [
        ("gigatoken", files),
        ("fastokens", files),
        ("fastokens", nobodys),
        ("tokenizers", files),
        ("tokenizers", nobodys),
    ]
    for name, given in runs:
        encoder = Encoder(given, (name,))
        start = time.process_time()
        for batch in batches:
            encoder.encode(batch)
        seconds = time.process_time() - start
        pattern = "Moonlight's pattern" if given is files else "nobody's pattern"
        print(f"{name:12}{pattern:22}{size / 1e6 / seconds:8.1f}{1e12 / size * seconds / 3600:8.0f}")
    start = time.process_time()
    holds_newer_letters(texts)
    seconds = time.process_time() - start
    print(f"{'search for newer letters':34}{size / 1e6 / seconds:8.0f}{1e12 / size * seconds / 3600:8.2f}")


if __name__ == "__main__":
    main()
