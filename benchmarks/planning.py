"""A corpus of a million input files: listing, identity and plan, in CPU-seconds and peak memory.

    python -m benchmarks.planning [--files 1000000] [--only folder|S3]

On a folder (real files of a few bytes, a thousand to a folder) and on an S3 server (a process that answers ListObjectsV2
with keys made by arithmetic, for no real one keeps a million objects on one machine; only the client is measured). As a run does it,
in two fresh processes. The driver: listing, the corpus's digest, the list handed on. The job that prepares: the list taken, units of
2 GB (files count as 20 MB each on S3, so that 10,000 units come out), the plan written and read again, and, at the corpus's
growth by one file, planned anew with all units known.
CPU-seconds are user and system time of that process, imports not counted; peak memory counts everything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from benchmarks.arguments import positive
from benchmarks.memory import peak_bytes
from data_prep.handed_listing import ENVIRONMENT, hand_over, handed
from data_prep.identity import identity, list_corpus
from data_prep.plan import plan_source, unit_settings
from data_prep.units import Units
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.storage import Storage

TARGET_S, TARGET_MB = 30.0, 500.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=positive, default=1_000_000)
    parser.add_argument("--only", choices=("folder", "S3"))
    given = parser.parse_args()
    files = given.files
    spawn = multiprocessing.get_context("spawn")
    results = []
    if given.only != "S3":
        with tempfile.TemporaryDirectory(prefix="bench-planning-") as folder:
            print(f"writing {files:,} files", flush=True)
            write(Path(folder), files)
            results += report("folder", spawn, folder, files, "")
    if given.only != "folder":
        ours, theirs = spawn.Pipe()
        server = spawn.Process(target=serve, args=(files, theirs), daemon=True)
        server.start()
        results += report("S3", spawn, "s3://bucket/corpus", files, ours.recv())
        server.terminate()
    print(json.dumps(results))


def report(
    name: str, spawn: multiprocessing.context.SpawnContext, path: str, files: int, endpoint: str
) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory(prefix="bench-planning-run-") as root:
        with spawn.Pool(1) as pool:
            told, steps, peak = pool.apply(drive, (path, files, endpoint, root))
        os.environ[ENVIRONMENT] = told
        with spawn.Pool(1) as pool:
            more, another = pool.apply(plan, (path, files, endpoint, root))
    steps, peak = {**steps, **more}, max(peak, another)
    cpu = sum(steps.values())
    print(f"\n{name}: {cpu:.1f} CPU-s, peak {peak:.0f} MB")
    for step, seconds in steps.items():
        print(f"    {step:12}{seconds:8.2f} CPU-s")
    what = f"planning {files:,} files, {name}"
    return [
        {"benchmark": f"{what}, CPU-s", "ours": round(cpu, 2), "peer": None, "ratio": None, "target": TARGET_S, "met": cpu <= TARGET_S},
        {"benchmark": f"{what}, peak MB", "ours": round(peak), "peer": None, "ratio": None, "target": TARGET_MB, "met": peak <= TARGET_MB},
    ]  # fmt: skip


class Steps:
    """CPU-seconds of each step of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.process_time()

    def done(self, step: str) -> None:
        self.seconds[step] = time.process_time() - self._begin
        self._begin = time.process_time()


def configuration(path: str, endpoint: str, root: str) -> RunConfig:
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    overrides = [
        f"storage.root={root}",
        "tokenizer.path=null",
        *([f"storage.endpoint_url={endpoint}"] if endpoint else []),
    ]
    config = load_config("moonlight-16b-a3b", overrides)
    changes = {"path": path, "include": ("**/*",), "exclude": (), "max_bytes": None, "format": "auto"}
    source = config.corpus.sources[0].model_copy(update=changes)
    return config.model_copy(update={"corpus": config.corpus.model_copy(update={"sources": (source,)})})


def drive(path: str, files: int, endpoint: str, root: str) -> tuple[str, dict[str, float], float]:
    """What the job must be told, CPU-seconds of each step, peak megabytes."""
    config = configuration(path, endpoint, root)
    steps = Steps()
    listings = list_corpus(config)
    assert [len(listing) for listing in listings.values()] == [files]
    steps.done("listing")
    identity(config, listings)
    steps.done("identity")
    told = hand_over(config, Storage(StorageConfig(root=root)), listings)
    steps.done("handed on")
    return told, steps.seconds, peak_bytes() / 1e6


def plan(path: str, files: int, endpoint: str, root: str) -> tuple[dict[str, float], float]:
    """CPU-seconds of each step, peak megabytes."""
    config = configuration(path, endpoint, root)
    source = config.corpus.sources[0]
    steps = Steps()
    listing = handed(config, Storage(StorageConfig(root=root)))[source.name]
    assert len(listing) == files
    steps.done("taken")
    settings = unit_settings(source, config.corpus, "0" * 64)
    unit_bytes = config.corpus.unit_bytes if endpoint else listing.bytes // (files // 100)
    units = Units(plan_source(source, listing, unit_bytes, settings))
    steps.done("plan")
    data = units.to_bytes()
    count = len(units)
    del units
    known = Units.from_bytes(data)
    assert len(known) == count
    steps.done("write, read")
    again = Units(plan_source(source, listing, unit_bytes, settings, known))
    assert again.ids == known.ids
    steps.done("plan again")
    return steps.seconds, peak_bytes() / 1e6


def name_of(number: int) -> str:
    return f"crawl-2026-{number // 100_000:02d}/part-{number // 1000:06d}/{number:09d}.jsonl.zst"


def write(folder: Path, files: int) -> None:
    for number in range(files):
        path = folder / name_of(number)
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(b"%d" % number)


def serve(files: int, pipe: Connection) -> None:
    """An S3 server that only lists: a thousand keys a page below corpus/."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = {key: values[0] for key, values in parse_qs(urlparse(self.path).query).items()}
            first = int(query.get("continuation-token", "0"))
            last = min(files, first + int(query.get("max-keys", "1000")))
            entries = "".join(
                f"<Contents><Key>corpus/{name_of(number)}</Key><LastModified>2026-11-28T00:00:00.000Z</LastModified>"
                f"<ETag>&quot;{number:032x}&quot;</ETag><Size>{20_000_000 + number * 7919 % 5_000_000}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
                for number in range(first, last)
            )
            more = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < files else ""
            body = (
                '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<Name>bucket</Name><EncodingType>url</EncodingType><IsTruncated>{str(last < files).lower()}</IsTruncated>{more}"
                f"{entries}</ListBucketResult>"
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


if __name__ == "__main__":
    main()
