"""Near-duplicates and quality rules against datatrove: recall by overlap, verdicts, and MB of text per CPU-second, in one run; and ours
alone: the search for questions of tasks, and prepare with all rules on.

Distinct real text of this machine, and pairs of documents planted among it that share a stated part of their 5-grams. Both sides read
the same JSON lines on one core: signatures, bands and clusters; then Gopher's, C4's and FineWeb's rules and personal data. What is
compared is the clusters (recall of planted pairs by overlap, and how much of the real text is dropped) and the verdicts. Of datatrove's own signatures our
bands and components are to make the very clusters that it makes.

    python -m benchmarks.corpus --documents 20000 --peer-python /path/to/venv/bin/python

`--peer-python` is an interpreter with datatrove, its `processing` extra and spaCy installed; without it that side is skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np

from benchmarks.arguments import existing_folder, interpreter, positive
from benchmarks.prepare import real_texts
from data_prep.contamination.finder import Finder
from data_prep.contamination.questions import parse, to_bytes
from data_prep.near import file as near_file
from data_prep.near.bands import EDGE, Corpus, band_partitions, find_edges
from data_prep.near.components import Components, find_components
from data_prep.near.file import Signatures
from data_prep.near.signatures import Bands, hashes_of_bands
from data_prep.prepare import prepare
from data_prep.records import PrepareProgress, UnitManifest
from data_prep.rules.apply import apply
from data_prep.tokenize_unit import BATCH_BYTES, document_hash
from pipeline.config.load import load_config
from pipeline.config.rules import C4, FineWeb, GopherQuality, GopherRepetition, PersonalData, Rules
from pipeline.config.schema import Decontamination, NearDuplicates, StorageConfig
from pipeline.manifest import DocumentCounts, FileEntry, NearDuplicatesFound
from pipeline.storage import Storage, open_storage

OVERLAPS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WORDS = 250  # of a planted document
POINTS = 0.02
DOCUMENT, SHORTEST = 800, 200  # characters
PROSE = (".md", ".rst", ".txt", ".html")
QUESTIONS = 16_000  # as many as MMLU and a few more
RULES = Rules(
    gopher_repetition=GopherRepetition(),
    gopher_quality=GopherQuality(),
    c4=C4(),
    fineweb=FineWeb(),
    personal_data=PersonalData(),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=positive, default=20_000, help="of real text: files, cut at empty lines")
    parser.add_argument("--pairs", type=positive, default=3000, help="planted pairs of each overlap")
    parser.add_argument("--peer-python", type=interpreter, help="an interpreter that has datatrove")
    parser.add_argument(
        "--prose",
        type=existing_folder,
        nargs="+",
        metavar="FOLDER",
        help="real text from these, .md .rst .txt .html; else code and all",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-corpus-") as temporary:
        run(arguments, Path(temporary))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    real = list(itertools.islice(prose(arguments.prose) if arguments.prose else documents(), arguments.documents))
    planted = [text for overlap in OVERLAPS for number in range(arguments.pairs) for text in _pair(number, overlap)]
    texts = planted + real
    real_mb = sum(len(text.encode()) for text in real) / 1e6
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": str(number)}) + "\n" for number, text in enumerate(texts)))
    sides = {"ours": _ours(texts, len(planted), folder)}
    if arguments.peer_python:
        script = str(Path(__file__).with_name("corpus_datatrove.py"))
        done = subprocess.run(
            [arguments.peer_python, script, str(path), str(len(planted))], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"datatrove failed:\n{done.stderr[-3000:]}")
        sides["datatrove"] = json.loads(done.stdout.splitlines()[-1])
    print(f"{megabytes:.0f} MB of text, {len(planted):,} planted documents among {len(texts):,}\n")
    print(f"{'planted overlap':18}" + "".join(f"{overlap:7.1f}" for overlap in OVERLAPS) + "   real text dropped")
    recalls = {}
    for name, side in sides.items():
        cluster = dict(map(tuple, side["clusters"]))
        hit = [
            cluster.get(number, number) == cluster.get(number + 1, number + 1) for number in range(0, len(planted), 2)
        ]
        recalls[name] = np.array(hit).reshape(len(OVERLAPS), -1).mean(axis=1)
        dropped = sum(1 for number, kept in cluster.items() if number >= len(planted) and kept != number)
        print(f"{name:18}" + "".join(f"{100 * found:7.1f}" for found in recalls[name]) + f"   {dropped:,}")
    theory = [1 - (1 - overlap**8) ** 14 for overlap in OVERLAPS]
    print(f"{'1-(1-s^8)^14':18}" + "".join(f"{100 * found:7.1f}" for found in theory) + "\n")
    results = []
    for step, least, size in (("near-duplicates", 5.0, megabytes), ("rules", 10.0, real_mb)):
        rates = {name: size / side["cpu_s"][step] for name, side in sides.items()}
        print(f"{step:18}" + ", ".join(f"{name} {rate:.1f} MB/cpu-s" for name, rate in rates.items()))
        results.append(_result(f"{step} MB/cpu-s", rates["ours"], rates.get("datatrove"), least))
    if "datatrove" in sides:
        worst = float(np.abs(recalls["ours"] - recalls["datatrove"]).max())
        results.append(
            {
                "benchmark": "recall, largest difference",
                "ours": round(worst, 4),
                "target": POINTS,
                "met": worst <= POINTS,
            }
        )
        theirs = _groups([tuple(pair) for pair in sides["datatrove"]["clusters"]])
        ours = _groups(_by_its_signatures(texts, path.with_suffix(".signatures.npy"), folder))
        print(
            f"of its signatures {len(ours):,} clusters; {len(ours ^ theirs):,} that datatrove does not make of them, or we do not"
        )
        results.append(
            {
                "benchmark": "clusters of its signatures that differ",
                "ours": len(ours ^ theirs),
                "met": ours == theirs and bool(ours),
            }
        )
        pairs = list(zip(sides["ours"]["verdicts"], sides["datatrove"]["verdicts"]))
        same = sum((ours == "") == (theirs == "") for ours, theirs in pairs)
        print(f"verdicts          {same:,} of {len(pairs):,} documents are kept or dropped by both")
        print(
            f"                  {Counter(pair for pair in pairs if (pair[0] == '') != (pair[1] == '')).most_common(6)}"
        )
    for name, rate, least in (
        *((f"questions by {rule}", real_mb / _questions_s(real, rule), None) for rule in ("ngram", "span")),
        ("prepare with all rules", real_mb / _prepare_s(real, folder), 15.0),
    ):
        print(f"{name:24}{rate:.1f} MB/cpu-s")
        results.append(
            {
                "benchmark": f"{name} MB/cpu-s",
                "ours": round(rate, 2),
                "target": least,
                "met": least is None or rate >= least,
            }
        )
    if "datatrove" in sides:  # its rules alone: neither languages, reading nor tokens
        results.append(_result("prepare with all rules, datatrove's rules alone", rate, rates["datatrove"], 10.0))
        print(f"{'':18}{rate / rates['datatrove']:.0f} times datatrove's rules alone")
    print(json.dumps(results))


def documents() -> Iterator[str]:
    """Real files, cut at empty lines into documents of DOCUMENT characters and more."""
    for _, text in real_texts(1 << 40):
        parts, size = list[str](), 0
        for part in text.split("\n\n"):
            parts.append(part)
            size += len(part)
            if size > DOCUMENT:
                yield "\n\n".join(parts)
                parts, size = [], 0
        if size > SHORTEST:
            yield "\n\n".join(parts)


def prose(folders: list[str]) -> Iterator[str]:
    """Distinct texts below the folders, each a document: .md, .rst and .txt as they are, of .html the main text; in hash order."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    paths = [path for folder in folders for path in Path(folder).rglob("*") if path.suffix in PROSE and path.is_file()]
    seen = set()
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path).encode(errors="replace")).digest()):
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if digest in seen or not 500 <= len(data) <= 1_000_000:
            continue
        seen.add(digest)
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode()
            if path.suffix == ".html":
                text = extract_plain_text(HTMLTree.parse(text), main_content=True)
            if len(text) >= SHORTEST:
                yield text


def _questions_s(texts: list[str], rule: str) -> float:
    """CPU-seconds of looking for QUESTIONS questions, of the words of these texts."""
    rng, words = Random(0), sorted({word for text in texts[:200] for word in text.split()})
    sizes = [8 + number % 5 if number % 8 == 0 else 60 for number in range(QUESTIONS)]
    asked = [(str(number), [" ".join(rng.choices(words, k=size))]) for number, size in enumerate(sizes)]
    finder = Finder(parse(to_bytes({"exam": asked})), Decontamination(tasks=("exam",), rule=rule))
    start = time.process_time()
    finder.find(texts)
    return time.process_time() - start


def _prepare_s(texts: list[str], folder: Path) -> float:
    """CPU-seconds of prepare in one process, from the first unit on: without the training of the tokenizer."""
    (folder / "source").mkdir()
    (folder / "source" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"name": "real", "path": str(folder / "source"), "max_epochs": 1e6}
    rules = {name: True for name in Rules.model_fields if name != "classifier"}
    config = load_config(
        "debug",
        [
            f"storage.root={folder / 'prepared'}",
            "corpus=" + json.dumps({"sources": [source], "rules": rules, "max_dropped_fraction": 1.0}),
            "data.max_padding=1.0",
        ],
    )
    begun = list[float]()

    def report(progress: PrepareProgress) -> None:
        if progress.phase == "tokenize":
            begun.append(time.process_time())

    prepare(config, open_storage(config.storage), report=report)
    return time.process_time() - begun[0]


def _result(name: str, ours: float, peer: float | None, least: float) -> dict[str, object]:
    ratio = None if peer is None else ours / peer
    return {
        "benchmark": name,
        "ours": round(ours, 2),
        "peer": peer and round(peer, 2),
        "ratio": ratio and round(ratio, 2),
        "target": least,
        "met": ratio is not None and ratio >= least,
    }


def _pair(number: int, overlap: float) -> tuple[str, str]:
    """Two documents that begin alike and go on differently, so that of all their 5-grams `overlap` are in both."""
    rng = Random(number * 100 + round(overlap * 10))
    first, other = (
        [f"{rng.choice(_SYLLABLES)}{rng.choice(_SYLLABLES)}{rng.choice(_SYLLABLES)}" for _ in range(WORDS)]
        for _ in "ab"
    )
    common = round(2 * (WORDS - 4) * overlap / (1 + overlap)) + 4
    return " ".join(first), " ".join(first[:common] + other[common:])


_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def _ours(texts: list[str], planted: int, folder: Path) -> dict[str, object]:
    storage = open_storage(StorageConfig(root=str(folder / "ours")))
    apply(texts[-1:], RULES)
    batches = _batches(texts)
    start = time.process_time()
    verdicts = [outcome.rejected for batch in _batches(texts[planted:]) for outcome in apply(batch, RULES)]
    rules_s = time.process_time() - start
    start = time.process_time()
    found = _clustered(storage, batches)
    near_s = time.process_time() - start
    clusters = _pairs(storage, found)
    return {"clusters": clusters, "verdicts": verdicts, "cpu_s": {"near-duplicates": near_s, "rules": rules_s}}


def _clustered(storage: Storage, batches: list[list[str]]) -> NearDuplicatesFound:
    signatures = Signatures(NearDuplicates())
    for batch in batches:
        data = [text.encode() for text in batch]
        signatures.add(data, [document_hash(text) for text in data])
    storage.write("a.bands", signatures.to_bytes())
    documents = sum(map(len, batches))
    corpus = Corpus(("a.bands",), (documents,), (0,))
    parts = band_partitions([_unit(documents)], NearDuplicates(), "near")
    edges = tuple(find_edges(storage.config, corpus, part) for part in parts)
    return find_components(storage.config, corpus, Components(edges, (), "near/all"))


def _pairs(storage: Storage, found: NearDuplicatesFound) -> list[tuple[int, int]]:
    """(document, first of its cluster)"""
    return [(int(pair["other"]), int(pair["first"])) for pair in np.frombuffer(storage.read(found.clusters.path), EDGE)]


def _by_its_signatures(texts: list[str], path: Path, folder: Path) -> list[tuple[int, int]]:
    """The clusters that our banding and components make of datatrove's signatures."""
    found, settings = np.load(path), NearDuplicates()
    bands = Bands(found[:, 0].astype(np.int64), hashes_of_bands(found[:, 1:].T.copy(), settings))
    storage = open_storage(StorageConfig(root=str(folder / "by-its-signatures")))
    with mock.patch.object(near_file, "bands", return_value=bands):
        return _pairs(storage, _clustered(storage, [texts]))


def _groups(clusters: list[tuple[int, int]]) -> set[frozenset[int]]:
    by_first: dict[int, set[int]] = {}
    for document, first in clusters:
        by_first.setdefault(first, {first}).add(document)
    return {frozenset(group) for group in by_first.values() if len(group) > 1}


def _batches(texts: list[str]) -> list[list[str]]:
    batches, size = [list[str]()], 0
    for text in texts:
        if size > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


def _unit(documents: int) -> UnitManifest:
    counts = DocumentCounts(docs_in=documents, docs_out=documents, heldout=0, filtered={}, quarantined={})
    none = dict.fromkeys(("documents", "index", "candidates", "quarantine"))
    entry = FileEntry(path="a.bands", bytes=0, sha256="")
    return UnitManifest(
        id="a",
        source="a",
        slices=(),
        settings={},
        counts=counts,
        tokens=0,
        text_bytes=0,
        cross_checked=0,
        versions={},
        bands=entry,
        **none,
    )


if __name__ == "__main__":
    main()
