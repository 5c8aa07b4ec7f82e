"""report.html of a run: one file to read, mail or print, with nothing to load; written anew while the run works.

It shows what the run's records say, whatever state it is in, and what could not be read. It is written beside the run, not hashed
and not published. Links go to the run's artefacts by relative path, so the storage root may be a folder or a bucket behind a web server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape

from pipeline.config.load import dump_yaml
from pipeline.model.shapes import count_parameters
from pipeline.report.charts import compact
from pipeline.report.curves import checkpoints
from pipeline.report.data import data
from pipeline.report.parts import page, section, table, tiles
from pipeline.report.run import Run, read_run
from pipeline.report.scores import heldout_text, tasks
from pipeline.report.training import switch, training
from pipeline.storage import Storage
from pipeline.training.commits import folder_of
from pipeline.training.goodput import goodput
from pipeline.training.left_out import order_of
from pipeline.workflow.duration import duration

AGAIN_S = 15  # a browser looks so often while the run works
SPENT = (
    "#15803d",
    "#64748b",
    "#2563eb",
    "#c62828",
    "#d9480f",
    "#db2777",
    "#ca8a04",
    "#a855f7",
    "#94a3b8",
)  # goodput.py's order
REFERENCE_COMPRESSOR = "xz -9"


def report_path(run_id: str) -> str:
    return f"runs/{run_id}/report.html"


def write_page(storage: Storage, run_id: str, run: Run | None = None) -> str:
    """Write the page of a run as it is now, or as `run` says; returns its path below the storage root."""
    text = render(run or read_run(storage, run_id))
    storage.write(report_path(run_id), text.encode())
    return report_path(run_id)


def render(run: Run) -> str:
    """The page as text."""
    state = run.state
    body = [
        _head(run),
        _problems(run),
        _tiles(run),
        section("Training", training(run), switch(run)),
        section("Checkpoints", checkpoints(run.evaluations) if len(run.evaluations) > 1 else ""),
        section("What it writes", _texts(run)),
        section("Held-out text", heldout_text(run.dataset, run.evaluation) if run.dataset and run.evaluation else ""),
        section("Tasks", tasks(run.evaluation) if run.evaluation else ""),
        section("Data", data(run.dataset, run.data, _shares(run)) if run.dataset else ""),
        section("Stages", _stages(run) + _goodput(run)),
        section("Artefacts", _artefacts(run)),
        f"<details><summary>Configuration</summary><pre>{escape(dump_yaml(run.config))}</pre></details>"
        if run.config
        else "",
    ]
    return page(f"{run.run_id}: {state}", "".join(body), again_s=AGAIN_S if state.at_work else None)


def _head(run: Run) -> str:
    state = run.state
    name = f"{run.model.name} {run.model.version} · " if run.model else ""
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.now))
    who = f" · {escape(run.who)}" if run.who else ""
    detail = f"<p class='detail'>{escape(state.detail)}</p>" if state.detail else ""
    return (
        f'<header><h1>{escape(run.run_id)} <span class="state {state.word}">{escape(str(state))}</span></h1>'
        f"<p>{escape(name)}as of {written}{who}</p>{detail}</header>"
    )


def _problems(run: Run) -> str:
    rows = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<div class="problems"><strong>What could not be read</strong><ul>{rows}</ul></div>' if rows else ""


def _tiles(run: Run) -> str:
    found = []
    steps = run.history.steps
    if run.loss is not None:
        left = steps[-1].get("eta_s") if steps and run.state.word == "running" else None
        note = f"nats per token{f', {duration(left)} left' if left else ''}"
        found.append(("training loss", f"{run.loss:.3f}", note))
    evaluation = run.evaluation
    if evaluation is not None:
        overall, below = evaluation.overall, evaluation.unigram_entropy - evaluation.overall.loss
        note = f"nats per token, {abs(below):.2f} {'below' if below >= 0 else 'ABOVE'} unigram"
        found.append(("held-out loss", f"{overall.loss:.3f}", note))
        reference = evaluation.baselines.get(REFERENCE_COMPRESSOR)
        note = "" if reference is None else f"{REFERENCE_COMPRESSOR}: {reference:.3f}"
        found.append(("bits per byte", f"{overall.bits_per_byte:.3f}", note))
    if steps or run.checkpoint:
        found.append(("trained on", *_trained_on(run)))
    if steps and steps[-1].get("tokens_per_second"):
        found.append(("throughput", f"{compact(steps[-1]['tokens_per_second'])} tokens/s", "at the last logged step"))
    if run.config is not None:
        parameters = count_parameters(run.config.model)
        found.append(("parameters", compact(parameters.total), f"{compact(parameters.active)} active per token"))
    spent = goodput(run.events, run.history.lines)
    if spent is not None and spent.useful:
        found.append(("goodput", f"{spent.share:.1%}", f"of {duration(spent.wall)} since training was asked for"))
    attempts = run.attempts
    if attempts:
        seconds = sum(attempt.seconds(run.now) for attempt in attempts)
        found.append(
            ("time", duration(seconds), f"in {len(attempts)} start{'s' if len(attempts) > 1 else ''} of stages")
        )
    return tiles(found)


def _trained_on(run: Run) -> tuple[str, str]:
    """Of the checkpoint that was scored once training is over, of the newest logged step before."""
    last = run.history.steps[-1] if run.history.steps else {}
    chosen = run.checkpoint if run.evaluation is not None and run.train is not None else None
    if chosen is not None or not last:
        assert run.checkpoint is not None
        step, tokens, skipped = run.checkpoint.step, run.checkpoint.tokens_seen, run.checkpoint.skipped_steps
    else:
        step, tokens, skipped = last["step"], last.get("tokens", 0), last.get("skipped_steps", 0)
    of_all = f"of {run.steps:,} " if run.steps and run.steps != step else ""
    return f"{compact(tokens)} tokens", f"{step:,} {of_all}steps, {skipped:,} skipped"


def _shares(run: Run) -> Mapping[str, float]:
    if run.config is None or run.dataset is None or run.checkpoint is None:
        return {}
    order = order_of(run.config, run.dataset, run.checkpoint.left_out)
    goes_on = run.origin is not None and run.config.training.start_position == "parent"
    return order.shares(run.checkpoint.next_sequence, run.origin.next_sequence if run.origin and goes_on else 0)


def _texts(run: Run) -> str:
    """What each checkpoint wrote after the prompts, the newest first."""
    blocks = []
    for number, written in enumerate(reversed(run.texts)):
        samples = "".join(f"<pre><em>{escape(each.prompt)}</em>{escape(each.text)}</pre>" for each in written.texts)
        title = f"step {written.step:,}, {compact(written.tokens_seen)} tokens"
        blocks.append(f"<details{'' if number else ' open'}><summary>{title}</summary>{samples}</details>")
    note = "The likeliest continuations of publishing.sample_prompts, which are set in bold." if blocks else ""
    return f'<div class="texts">{"".join(blocks)}</div><p class="note">{note}</p>' if blocks else ""


def _stages(run: Run) -> str:
    """A row a start of a stage, with a bar where it lies in the run's time."""
    attempts = run.attempts
    if not attempts:
        return ""
    begun = attempts[0].began
    whole = max(max(attempt.began + attempt.seconds(run.now) for attempt in attempts) - begun, 1e-9)

    rows = []
    for attempt in attempts:
        left, width = (attempt.began - begun) / whole, attempt.seconds(run.now) / whole
        outcome = attempt.outcome or ("running" if run.state.word == "running" else run.state.word)
        bar = f'<div class="bar wide"><i class="{outcome}" style="margin-left:{left:.2%};width:{max(width, 0.004):.2%}"></i></div>'
        at = time.strftime("%m-%d %H:%M:%S", time.gmtime(attempt.began))
        said = f' <small title="{escape(attempt.error, quote=True)}">{escape(attempt.error[:60])}</small>'
        rows.append(
            [escape(attempt.stage), escape(outcome) + said, at, duration(attempt.seconds(run.now)), bar],
        )
    return table(["stage", "", "began (UTC)", "time", ""], rows, left=2)


def _goodput(run: Run) -> str:
    """What became of the wall time of training, as one bar and in figures."""
    spent = goodput(run.events, run.history.lines)
    if spent is None or not spent.useful:
        return ""
    parts = [(name, seconds, colour) for (name, seconds), colour in zip(spent.seconds.items(), SPENT) if seconds > 0]
    bar = "".join(
        f'<i style="width:{seconds / spent.wall:.3%};background:{colour}" title="{name}: {duration(seconds)}"></i>'
        for name, seconds, colour in parts
    )
    words = "".join(
        f'<span><i style="background:{colour}"></i>{name} <em>{seconds / spent.wall:.1%}, {duration(seconds)}</em></span>'
        for name, seconds, colour in parts
    )
    return (
        f"<h3>What became of the wall time of training</h3><figure><div class=parts>{bar}</div>"
        f'<div class="legend">{words}</div></figure>'
    )


def _artefacts(run: Run) -> str:
    here = f"runs/{run.run_id}/"
    rows: list[tuple[str, str, str]] = []
    if run.model is not None:
        folder = f"../../models/{run.model.name}/{run.model.version}"
        rows.append(("published model", f"{folder}/README.md", run.model.digest))
        rows.append(("files of the model", f"{folder}/manifest.json", run.model.digest))
    if run.evaluation is not None:
        rows.append(("evaluation", run.evaluation_path.removeprefix(here), run.evaluation.digest))
    if run.checkpoint is not None:
        link = f"{folder_of(run.checkpoint).removeprefix(here)}/manifest.json"
        rows.append((f"checkpoint, step {run.checkpoint.step:,}", link, run.checkpoint.digest))
        rows.append(("weights in the checkpoint", "", run.checkpoint.content_sha256))
    if run.dataset is not None:
        rows.append(("dataset", f"../../datasets/{run.dataset.identity}/dataset.json", run.dataset.digest))
        rows.append(("tokenizer", f"../../{run.dataset.tokenizer.folder}/tokenizer.json", run.dataset.tokenizer.sha256))
    if run.checkpoint is not None:
        rows.append(("order of the data", "", run.checkpoint.order_digest))
        rows.append(("run", "", run.checkpoint.run_identity))
    cells = [
        [f'<a href="{escape(link, quote=True)}">{escape(name)}</a>' if link else escape(name), f"<code>{digest}</code>"]
        for name, link, digest in rows
    ]
    return table(["artefact", "sha256"], cells, left=2) if cells else ""
