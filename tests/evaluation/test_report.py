"""The report of a run: whole, self-contained, its figures those of the manifests."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.evaluation.baselines import SHOWN
from pipeline.evaluation.report import read_metrics, report_path, write_report
from pipeline.manifest import FileEntry
from tests.evaluation.make import MadeRun, make_run, run_config
from tests.publishing.conftest import published

STAGES = {"prepare": 41.2, "train": 283.0, "evaluate": 31.5, "publish": 12.8}
VOID = {"meta", "link", "br", "line", "circle", "path"}


class Page(HTMLParser):
    """Checks that elements nest, and collects links, cells and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID or (tag == "circle"):
            self.open.append(tag)
        assert not {"src", "srcset"} & {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name == "href"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    run = published(str(tmp_path_factory.mktemp("report")))
    made = run.made
    path = write_report(
        made.config,
        made.dataset,
        made.train,
        made.checkpoint,
        run.evaluation,
        run.manifest,
        made.storage,
        stage_seconds=STAGES,
    )
    assert path == report_path("made")
    text = made.storage.read(path).decode()
    return run, text, Page(text)


def test_it_needs_nothing_from_outside(page):
    _, text, parsed = page
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    assert all(not link.startswith(("/", "file:")) for link in parsed.links)


def test_links_lead_to_files_that_exist(page):
    run, _, parsed = page
    folder = Path(run.made.storage.uri(report_path("made"))).parent
    made_here = [link for link in parsed.links if not link.endswith("dataset.json")]  # the made run has no dataset.json
    assert len(made_here) == len(parsed.links) - 1 == 5
    assert all((folder / link).resolve().is_file() for link in made_here)


def test_its_figures_are_the_manifests(page):
    run, text, parsed = page
    cells = {row[0]: row[1:] for row in parsed.rows}
    for name, score in {**run.evaluation.sources, "all": run.evaluation.overall}.items():
        baselines = {**run.evaluation.source_baselines, "all": run.evaluation.baselines}[name]
        expected = [f"{score.documents:,}", f"{score.tokens:,}", f"{score.loss:.3f}", f"{score.bits_per_byte:.3f}"]
        found = next(row[1:] for row in parsed.rows if row[0] == name and row[1:4] == expected[:3])
        assert found == expected + [f"{baselines[other]:.3f}" for other in SHOWN]
    assert cells["train"][0] == "4 min 43 s"
    assert cells["weights in the checkpoint"] == [run.made.checkpoint.content_sha256]
    assert "unigram entropy" in text
    assert "training loss: 5.95 after 1.28k tokens" in text


def test_without_stage_times_and_curves_it_still_renders(tmp_path: Path):
    run = published(str(tmp_path))
    made = run.made
    train = made.train.model_copy(update={"metrics": ()})
    path = write_report(
        made.config, made.dataset, train, made.checkpoint, run.evaluation, run.manifest, made.storage, stage_seconds={}
    )
    text = made.storage.read(path).decode()
    Page(text)
    assert "<h2>Stages</h2>" not in text
    assert "Gradient norm" not in text


def test_it_is_about_the_checkpoint_that_was_evaluated(tmp_path: Path):
    """Not the last one of the run: trained on, steps, the mark in the chart and the artefact are the chosen one's."""
    run = published(str(tmp_path))
    made = run.made
    last = made.checkpoint.model_copy(update={"step": 90, "tokens_seen": 99_000_000, "skipped_steps": 7})
    train = made.train.model_copy(update={"checkpoint": last, "steps": 90, "skipped_steps": 7})
    path = write_report(
        made.config, made.dataset, train, made.checkpoint, run.evaluation, run.manifest, made.storage, stage_seconds={}
    )
    text = made.storage.read(path).decode()
    assert "<strong>12.5k tokens</strong><small>50 of 90 steps, 1 skipped</small>" in text
    assert "train/step-00000050/manifest.json" in text
    assert "step-00000090" not in text
    assert "99M" not in text


def test_a_step_logged_twice_counts_once(tmp_path: Path):
    made: MadeRun = make_run(run_config(str(tmp_path)))
    line = b'{"step": 50, "tokens": 12800, "loss": 1.0}\n'
    made.storage.write("runs/made/train/metrics/more.jsonl", line)
    sha256 = hashlib.sha256(line).hexdigest()
    again = FileEntry(path="runs/made/train/metrics/more.jsonl", bytes=len(line), sha256=sha256)
    train = made.train.model_copy(update={"metrics": (*made.train.metrics, again)})
    records = read_metrics(train, made.storage)
    assert [record["step"] for record in records] == list(range(5, 51, 5))
    assert records[-1]["loss"] == 1.0


def test_a_damaged_file_of_metrics_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made: MadeRun = make_run(run_config(str(tmp_path)))
    path = made.train.metrics[0].path
    made.storage.write(path, made.storage.read(path).replace(b"5.9", b"1.9"))
    assert read_metrics(made.train, made.storage) == []
    assert f"metrics are left out: {made.storage.uri(path)}: sha256 is" in capsys.readouterr().err
