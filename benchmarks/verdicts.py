"""Every quality rule by itself against datatrove's filter of the same name: of how many real documents the verdict is the same, with the words
that spaCy gives it and with ours, and of how many C4 leaves another text.

    python -m benchmarks.verdicts --documents 20000 --peer-python /path/to/venv/bin/python
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path

import xxhash

from benchmarks.arguments import existing_folder, interpreter, positive
from benchmarks.corpus import documents, prose
from data_prep.rules.apply import apply
from pipeline.config.rules import Rules

RULES = ("gopher_repetition", "gopher_quality", "fineweb", "c4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=positive, default=20_000)
    parser.add_argument(
        "--prose",
        type=existing_folder,
        nargs="+",
        metavar="FOLDER",
        help="text from these, .md .rst .txt .html; else code and all",
    )
    parser.add_argument("--peer-python", type=interpreter, required=True, help="an interpreter that has datatrove")
    arguments = parser.parse_args()
    texts = list(itertools.islice(prose(arguments.prose) if arguments.prose else documents(), arguments.documents))
    with tempfile.TemporaryDirectory(prefix="bench-verdicts-") as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        root = Path(__file__).parents[1]
        script = str(root / "benchmarks" / "verdicts_datatrove.py")
        done = subprocess.run(
            [arguments.peer_python, script, str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
    if done.returncode:
        raise SystemExit(f"datatrove failed:\n{done.stderr[-3000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    print(f"{len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:.0f} MB")
    for name in RULES:
        outcomes = apply(texts, Rules.model_validate({name: {}}))
        kept = [not outcome.rejected for outcome in outcomes]
        for words, tables in theirs.items():
            if name in tables:
                otherwise = sum(ours != bool(other) for ours, other in zip(kept, tables[name]))
                print(f"{name:18} {words:20} {sum(kept):7,} kept, {otherwise:5,} judged otherwise")
        if name == "c4":
            both = [
                (outcome.text, other)
                for outcome, other in zip(outcomes, theirs["with spaCy's words"][name])
                if other and not outcome.rejected
            ]
            changed = sum(xxhash.xxh3_64_hexdigest(text.encode()) != other for text, other in both)
            print(f"{'':39} {changed:,} of {len(both):,} texts that both keep are others")


if __name__ == "__main__":
    main()
