"""Three own tasks in lm-eval's format whose questions are long enough to be found in a corpus, and a corpus that holds some of them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import yaml

EXAMS = ("exam_choice", "exam_free", "exam_cloze")
ASKED = 8  # questions of each
SEEN = (0, 1, 2, 3)  # of each, by 13-grams; 4 is cut into pieces that are too short, the others are nowhere
WORDS = ["".join(Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=6)) for n in range(900)]


def prose(seed: int, count: int) -> str:
    rng = Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def question(exam: str, number: int) -> str:
    return f"{prose(1000 * EXAMS.index(exam) + number, 34).capitalize()}?"


def write_exams(folder: Path, cache: Path) -> Path:
    folder.mkdir(parents=True)
    for exam in EXAMS:
        rows = [
            {
                "question": question(exam, n),
                "choices": [f"answer {n}", "another one"],
                "label": n % 3 % 2,
                "answer": f"{n} it is",
            }
            for n in range(ASKED)
        ]
        (folder / f"{exam}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    free = {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    cloze = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", **mean}],
    }
    for exam, settings in zip(EXAMS, (choice, free, cloze)):
        files = {"data_files": {"test": f"{exam}.jsonl"}, "cache_dir": str(cache)}
        data = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "num_fewshot": 0}
        (folder / f"{exam}.yaml").write_text(yaml.safe_dump({"task": exam, **data, **settings}))
    group = {
        "group": "exams",
        "task": ["exam_choice", "exam_cloze"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "exams.yaml").write_text(yaml.safe_dump(group))
    return folder


def write_corpus(folder: Path) -> list[str]:
    """40 documents as JSON lines, 15 of which hold questions. Returns their texts."""
    texts = [prose(10_000 + number, 200) for number in range(25)]
    for place, exam in enumerate(EXAMS):
        asked = [question(exam, number) for number in range(5)]
        words = asked[3].split()
        planted = [
            asked[0],
            asked[1].upper(),
            asked[2].replace(" ", " \n  "),
            " ".join(words[:17]),
            f"{' '.join(asked[4].split()[:12])} or {' '.join(asked[4].split()[22:])}",
        ]
        for number, text in enumerate(planted):
            seed = 20_000 + 10 * place + number
            texts.append(f"{prose(seed, 120)}\n{text}\n{prose(seed + 5_000, 120)}")
    folder.mkdir(parents=True)
    lines = (json.dumps({"text": text, "id": str(number)}) + "\n" for number, text in enumerate(texts))
    (folder / "a.jsonl").write_text("".join(lines))
    return texts
