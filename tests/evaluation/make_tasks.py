"""A folder of own tasks in lm-eval's format: two of multiple choice in a group, one of generated text, one of perplexity."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

TASKS = ("night_sums", "continue_code", "prose")
NEW_TOKENS = 8


def write_tasks(folder: Path, cache: Path) -> Path:
    """Data files are named relative to the folder; what `datasets` makes of them goes to `cache`, outside of it."""
    (folder / "data").mkdir(parents=True)
    questions = [
        {
            "question": f"What is {a} plus {b}?",
            "choices": [str(a + b), str(a + b + 1), f"{a} or {b} 月"],
            "answer": (a + b) % 3,
        }
        for a in range(3)
        for b in range(5)
    ]
    lines = [{"text": f"def f{n}(x):\n    return x + {n}\n\n\nprint(f{n}(" + "1 + " * n} for n in range(5)]
    words = [{"text": "The moon rose late. " * n + "月亮升起来了。"} for n in (1, 9, 3, 0)]
    for name, rows in {"sums": questions[:9], "more": questions[9:], "code": lines, "prose": words}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text)

    def write(name: str, data: str, **settings: object) -> None:
        files = {"data_files": {"test": f"data/{data}.jsonl"}, "cache_dir": str(cache)}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **settings}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))

    choice = {
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 2.0},
    }
    write("sums", "sums", **choice)
    write("more_sums", "more", **choice)
    group = {
        "group": "night_sums",
        "task": ["sums", "more_sums"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 3.0},
    }
    (folder / "night_sums.yaml").write_text(yaml.safe_dump(group))
    write(
        "continue_code",
        "code",
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target=")",
        num_fewshot=0,
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        metadata={"version": 1.0},
    )
    perplexities = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    write(
        "prose",
        "prose",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        num_fewshot=0,
        metric_list=[{"metric": name} for name in perplexities],
        metadata={"version": 1.0},
    )
    return folder
