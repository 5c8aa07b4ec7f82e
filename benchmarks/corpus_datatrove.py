"""datatrove's side of benchmarks/corpus.py: a file of JSON lines -> a JSON line, and beside the file the signatures, NAME.signatures.npy.

Needs only datatrove and spaCy.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.formatters import PIIFormatter


def main(path: Path, planted: int) -> None:
    """`planted`: the first so many documents are for near-duplicates alone."""
    texts = [json.loads(line)["text"] for line in path.open()]
    steps = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(), FineWebQualityFilter()]
    personal = PIIFormatter()
    GopherQualityFilter().filter(Document(text="load the words first", id=""))
    start = time.process_time()
    verdicts = [_verdict(text, steps, personal) for text in texts[planted:]]
    rules_s = time.process_time() - start
    with tempfile.TemporaryDirectory(prefix="bench-datatrove-") as folder:
        start = _cpu_seconds()
        clusters = _clusters(texts, Path(folder))
        near_s = _cpu_seconds() - start
        np.save(path.with_suffix(".signatures.npy"), _signatures(Path(folder)))
    print(
        json.dumps({"clusters": clusters, "verdicts": verdicts, "cpu_s": {"near-duplicates": near_s, "rules": rules_s}})
    )


def _verdict(text: str, steps: list, personal: PIIFormatter) -> str:
    document = Document(text=text, id="")
    for step in steps:
        try:
            found = step.filter(document)
        except (ZeroDivisionError, ValueError):  # it divides by the number of words
            return "raises"
        if found is not True:
            return found[1]
    personal.format(document.text)
    return ""


def _clusters(texts: list[str], folder: Path) -> list[tuple[int, int]]:
    """(document, number of its cluster) of those in clusters."""
    config = MinhashConfig()
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    signature = MinhashDedupSignature(str(folder / "signatures"), config)
    signature.run(iter(documents), 0, 1)
    buckets = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)
    for rank in range(config.num_buckets):
        buckets.run(None, rank, config.num_buckets)
    cluster = MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config, save_cluster_id=True)
    LocalPipelineExecutor([cluster], tasks=1, logging_dir=str(folder / "logs")).run()
    data = (folder / "remove" / "000000.clusters").read_bytes()
    found = list(struct.iter_unpack("<2I", data))
    first: dict[int, int] = {}
    return [(document, first.setdefault(number, document)) for document, number in found]


def _signatures(folder: Path) -> np.ndarray:
    """[documents with a signature, 1 + all hashes] uint64: their numbers, and the hashes bucket by bucket."""
    config, columns = MinhashConfig(), []
    record = np.dtype([("hashes", "<u8", config.hashes_per_bucket), ("document", "<u4")])
    for bucket in range(config.num_buckets):
        data = (folder / "signatures" / f"bucket_{bucket:03}" / "00000.minhash.sig").read_bytes()
        found = np.sort(np.frombuffer(data, record), order="document")
        columns += [] if columns else [found["document"][:, None].astype(np.uint64)]
        columns.append(found["hashes"])
    return np.concatenate(columns, axis=1)


def _cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


if __name__ == "__main__":
    if len(sys.argv) <= 2:
        raise SystemExit("a part of python -m benchmarks.corpus, which starts it")
    main(Path(sys.argv[1]), int(sys.argv[2]))
