"""Tasks of EleutherAI's lm-evaluation-harness, scored on the network that is in memory.

lm-eval makes the prompts, cuts answers out of text and averages; the network answers three kinds of request as lm-eval's
own model of Hugging Face folders does (lm_eval/models/huggingface.py, against which it is tested): contexts that are too
long lose their beginning, and the prompt of a generation leaves room for what is generated. Two things are this project's:
every prompt begins with the EOS that comes before each document in training, and special tokens in text are text.

The seeds are lm-eval's own (few-shot examples: 1234), so that the same examples are drawn everywhere. Only rank 0 runs the
harness and needs the tasks' data; the other ranks follow its forward passes.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from numbers import Real
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.config.schema import RunConfig
from pipeline.evaluation.forward import Forward
from pipeline.evaluation.result import EvaluationProgress, window_length
from pipeline.evaluation.summary import TaskResults
from pipeline.evaluation.tasks import loaded, new_tokens
from pipeline.evaluation.unseen import Seen, unseen_values
from pipeline.manifest import TaskMetric, TaskScore
from pipeline.model.moonlight import Moonlight
from pipeline.tokenizer import Encoder

DECIMALS = 6  # as of held-out scores
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
RESAMPLES = 1000  # for standard errors without a formula: 2 per cent exact; lm-eval's 100,000 take minutes a task

Request = Any  # lm_eval.api.instance.Instance; `args` is what is asked


def harness_version() -> str:
    return f"lm-eval {importlib.metadata.version('lm-eval')}"


def score_tasks(
    config: RunConfig,
    model: Moonlight,
    encoder: Encoder,
    report: Callable[[EvaluationProgress], None],
    seen: Seen | None = None,
) -> TaskResults:
    """Score `evaluation.tasks`; by name, groups first. A collective call on the ranks of a process group. `seen`: questions that were in the
    corpus, where they were looked for; tasks are then scored without them, too.

    Raises ConfigError for tasks that cannot be loaded, and RuntimeError on the ranks that follow one that failed.
    """
    forward = Forward(model, encoder, batch=config.evaluation.batch, report=report)
    if forward.rank > 0:
        found: TaskResults = forward.follow()
        return found
    shots = config.evaluation.few_shot
    try:
        with loaded(config) as (manager, tasks), _no_pool():
            results = simple_evaluate(
                HarnessModel(forward, encoder, window_length(config)),
                tasks=tasks,
                task_manager=manager,
                num_fewshot=shots if isinstance(shots, int) else None,  # by task: set when they were loaded
                limit=config.evaluation.task_limit,
                bootstrap_iters=RESAMPLES,
                log_samples=True,
                **SEEDS,
            )
    except BaseException as error:
        forward.end(error=error)
        raise
    assert results is not None  # lm-eval's rank is 0
    with _no_pool():
        unseen = {} if seen is None else unseen_values(results["samples"], tasks, seen, resamples=RESAMPLES)
    found = TaskResults(harness_version(), task_scores(results, unseen), document_values(results))
    forward.end(found)
    return found


@contextmanager
def _no_pool() -> Iterator[None]:
    """lm-eval draws resamples here, and not in a process a core, forked from this one beside the threads of storage and Ray, of which one
    would do all there is. The numbers are the same."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


class HarnessModel(TemplateLM):
    """The network as lm-eval asks it. `length`: the most tokens that it sees at a time."""

    def __init__(self, forward: Forward, encoder: Encoder, length: int) -> None:
        super().__init__()
        self._forward, self._encoder, self.max_length = forward, encoder, length

    @property
    def eot_token_id(self) -> int:
        return self._encoder.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self._encoder.encode([string.encode()])[0].tolist()
        return ids if add_special_tokens is False else [self._encoder.eos_id, *ids]

    def loglikelihood(self, requests: list[Request], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Raises ValueError that names the task for an answer that has no token of its own."""
        pairs = [self._encode(*request.args) for request in requests]
        _check_answers(requests, pairs)
        return self._score(pairs, "log-likelihoods")

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("lm-eval asks for text")

    def _encode(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """As lm-eval cuts tokens: those of both together, less as many as the context has alone."""
        if context:
            pair: tuple[list[int], list[int]] = self._encode_pair(context, answer)
            return pair
        return [self.eot_token_id], self.tok_encode(answer, add_special_tokens=False)

    def loglikelihood_rolling(self, requests: list[Request], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1)
            windows += [make_disjoint_window(window) for window in cut]
            owners += [owner] * (len(windows) - len(owners))
        _check_texts(requests, set(owners))
        sums = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._score(windows, "perplexities"), strict=True):
            sums[owner] += log_p
        return sums

    def generate_until(self, requests: list[Request], disable_tqdm: bool = True) -> list[str]:
        # of each task what stops it -> requests: they share batches and few-shot examples
        kinds: dict[tuple[str, tuple[str, ...], int], list[int]] = {}
        for index, request in enumerate(requests):
            generation = request.args[1]
            until = generation.get("until") or []
            until = (until,) if isinstance(until, str) else tuple(until)
            kinds.setdefault((request.task_name, until, new_tokens(generation)), []).append(index)
        texts = [""] * len(requests)
        for (_, until, count), indices in kinds.items():
            room = self.max_length - count
            if room < 1:
                raise ValueError(
                    f"evaluation.sequence_length: {self.max_length} tokens hold no prompt beside {count:,} generated ones; raise it"
                )
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in indices]
            for index, text in zip(indices, self._forward.greedy(prompts, until, count, "generated text"), strict=True):
                texts[index] = postprocess_generated_text(text, list(until), None)
        return texts

    def _score(self, pairs: list[tuple[list[int], list[int]]], doing: str) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"evaluation.sequence_length: {self.max_length} tokens do not hold an answer of {longest}; raise it"
            )
        kept = [((context + answer)[-(self.max_length + 1) :], len(answer)) for context, answer in pairs]
        return self._forward.log_likelihoods(kept, doing)


def _check_answers(requests: list[Request], pairs: list[tuple[list[int], list[int]]]) -> None:
    """The sum over no tokens is 0, which beats every answer. lm-eval's own model ends with an assertion there."""
    empty: dict[str, list[Request]] = {}
    for request, (_, answer) in zip(requests, pairs, strict=True):
        if not answer:
            empty.setdefault(request.task_name, []).append(request)
    for name, found in empty.items():
        context, answer = found[0].args
        raise ValueError(
            f"evaluation.tasks: {name} has {len(found):,} answers without a token of their own, such as {answer[:40]!r} after "
            f"{context[-40:]!r}, which the tokenizer joins with what stands before: there is nothing to score. Give the task another "
            "target_delimiter or other answers, or leave it out"
        )


def _check_texts(requests: list[Request], scored: set[int]) -> None:
    """An empty text adds nothing, but a task of nothing else would be predicted perfectly."""
    names = {request.task_name for request in requests}
    empty = sorted(names - {requests[owner].task_name for owner in scored})
    if empty:
        raise ValueError(
            f"evaluation.tasks: all texts of {empty[0]} are empty: there is nothing to score. Leave it out"
        )


def task_scores(results: dict[str, Any], unseen: Mapping[str, dict[str, Any]] | None = None) -> dict[str, TaskScore]:
    """What `simple_evaluate` returned, without what has no number; and `unseen_values` beside it."""
    found: dict[str, TaskScore] = {}
    averaged = results.get("groups", {})
    parents = {
        child: group for group, children in results["group_subtasks"].items() if group in averaged for child in children
    }
    for name in [*averaged, *(task for task in results["results"] if task not in averaged)]:
        values = results["results"][name]
        metrics = _metrics(values, results["higher_is_better"].get(name, {}))
        if metrics:
            shots = results["n-shot"].get(name)
            rest = (unseen or {}).get(name)
            found[name] = TaskScore(
                version=str(results["versions"].get(name)),
                few_shot=shots if isinstance(shots, int) else None,
                documents=int(values["sample_len"]),
                group=parents.get(name),
                metrics=tuple(metrics),
                unseen_documents=None if rest is None else int(rest["sample_len"]),
                unseen=() if rest is None else tuple(_metrics(rest, results["higher_is_better"].get(name, {}))),
            )
    return found


def document_values(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What single documents scored, in metrics that are one number a document: rows of `documents.TASKS`."""
    return [
        {"task": name, "filter": sample["filter"], "metric": metric, "key": sample["doc_hash"], "value": value}
        for name, samples in results.get("samples", {}).items()
        for sample in samples
        for metric in sample["metrics"]
        if (value := _number(sample[metric])) is not None
    ]


def _metrics(values: dict[str, Any], higher_is_better: dict[str, bool | None]) -> list[TaskMetric]:
    """lm-eval writes "acc,none": 0.5, "acc_stderr,none": 0.1 or "N/A"."""
    return [
        TaskMetric(
            name=name,
            filter=cut,
            value=_number(value),
            stderr=_number(values.get(f"{name}_stderr,{cut}")),
            higher_is_better=higher_is_better.get(name),
        )
        for (name, comma, cut), value in ((key.partition(","), value) for key, value in values.items())
        if comma and not name.endswith("_stderr")
    ]


def _number(value: Any) -> float | None:
    return round(float(value), DECIMALS) if isinstance(value, Real) and isfinite(value) else None
