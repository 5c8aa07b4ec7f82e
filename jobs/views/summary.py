"""The end of a run on the screen: where the model is, how good it is, how long it took, what to type next."""

from __future__ import annotations

import argparse
import shlex

from jobs.stages.records import Records
from jobs.views.curves import write_curves
from pipeline.config.schema import RunConfig
from pipeline.manifest import EvaluationManifest
from pipeline.publishing import registry
from pipeline.report.page import write_page
from pipeline.storage import Storage
from pipeline.workflow.duration import duration
from pipeline.workflow.heartbeat import Heartbeat
from pipeline.workflow.record import read_events, stage_seconds

LONGEST_NAME = 40  # of a run (config/schema.py)


def print_summary(config: RunConfig, storage: Storage, records: Records, given: argparse.Namespace) -> None:
    """Write the run's report and print the summary. All stages must be done. `given`: the command line of `jobs.pipeline`."""
    dataset, evaluation, model = records.dataset, records.evaluation, records.model
    checkpoint = records.checkpoint
    assert dataset is not None
    assert checkpoint is not None
    assert evaluation is not None
    assert model is not None
    seconds = stage_seconds(read_events(storage, config.run_id))
    with Heartbeat("writing the report"):
        write_curves(storage, config.run_id)
        report = write_page(storage, config.run_id)
    folder = storage.uri(registry.folder(model.name, model.version))
    below = evaluation.unigram_entropy - evaluation.overall.loss
    lines = [
        "",
        f"model      {folder}",
        f"digest     {model.digest}",
        f"trained    {checkpoint.tokens_seen:,} tokens in {checkpoint.step:,} steps; data: {dataset.tokens:,} tokens, "
        f"{sum(source.counts.docs_out for source in dataset.sources):,} documents",
        f"held out   loss {evaluation.overall.loss:.3f} nats per token, {below:.2f} under the unigram entropy "
        f"({evaluation.unigram_entropy:.3f})",
        f"           {evaluation.overall.bits_per_byte:.3f} bits per byte; "
        + ", ".join(f"{name} {value:.3f}" for name, value in evaluation.baselines.items()),
        *(
            f"           {name:<20} loss {score.loss:.3f}  {score.bits_per_byte:.3f} bits per byte"
            for name, score in evaluation.sources.items()
        ),
        *task_lines(evaluation, "tasks      "),
    ]
    if seconds:
        times = ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items())
        lines.append(f"time       {times} (together {duration(sum(seconds.values()))})")
    lines += [
        f"report     {storage.uri(report)}",
        "",
        "next       read the model card:   " + f"{folder}/README.md",
        '           load it:               transformers.AutoModelForCausalLM.from_pretrained("' + folder + '")',
        f"           train longer:          {longer(config, given)}",
    ]
    print("\n".join(lines), flush=True)


def longer(config: RunConfig, given: argparse.Namespace) -> str:
    """A command for a shell: the run of this command line with twice the tokens, under another name, in the same storage."""
    kept = [each for each in given.overrides if not each.startswith(("run_id=", "schedule.total_tokens="))]
    backend = [] if given.backend == "ray" else ["--backend", given.backend]
    now, tokens = config.schedule.total_tokens, 2 * config.schedule.total_tokens
    name = config.run_id.removesuffix(f"-{now}")[: LONGEST_NAME - len(f"-{tokens}")].rstrip("-")
    new = [f"run_id={name}-{tokens}", f"schedule.total_tokens={tokens}"]
    return shlex.join(["moonlight", "run", "--config", given.config, *backend, *kept, *new])


def task_lines(evaluation: EvaluationManifest, label: str) -> list[str]:
    """A line a metric of each task or group that no other group averages; `label` before the first."""
    found = []
    for name, score in evaluation.tasks.items():
        for metric in score.metrics if score.group is None else ():
            shots = "" if score.few_shot is None else f", {score.few_shot}-shot"
            found.append(
                f"{name:<20} {metric.label} {metric.shown}  ({score.documents:,} documents{shots}, version {score.version})"
            )
    return [(label if index == 0 else " " * len(label)) + line for index, line in enumerate(found)]
