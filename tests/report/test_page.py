"""The page of a run: whole, self-contained, its figures those of the records, in every state of the run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.config.schema import StorageConfig
from pipeline.evaluation.baselines import SHOWN
from pipeline.manifest import ModelManifest
from pipeline.publishing import registry
from pipeline.report.page import render, report_path, write_page
from pipeline.report.run import read_run
from pipeline.storage import Storage, open_storage
from pipeline.training.journal import journal_folder
from tests.publishing.conftest import published
from tests.report.make import START, events, journal, recorded, run_of, settings

VOID = {"meta", "link", "br", "line", "path", "input"}


class Page(HTMLParser):
    """Checks that elements nest and that nothing is loaded, and collects links, cells, titles of charts and their values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.charts: list[str] = []
        self.plots: dict[tuple[str, str], dict] = {}  # by chart and axis
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        assert not {"src", "srcset"} & known.keys()
        self.links += [known["href"]] if "href" in known else []
        if tag == "figcaption":
            self.charts.append("")
        if "data-values" in known:
            self.plots[self.charts[-1], known["data-axis"]] = json.loads(known["data-values"])
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
        if "figcaption" in self.open:
            self.charts[-1] += data

    def line(self, chart: str, axis: str = "tokens", name: str | None = None) -> list[tuple[float, float]]:
        found = [series for series in self.plots[chart, axis]["series"] if name in (None, series[0])]
        return list(zip(found[0][2], found[0][3]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    run = published(str(tmp_path_factory.mktemp("report")))
    text = render(run_of(run))
    return run, text, Page(text)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


def test_it_needs_nothing_from_outside(page):
    _, text, parsed = page
    assert not re.search(r"https?://|@import|url\(|<link", text)
    assert all(not link.startswith(("/", "file:")) for link in parsed.links)


def test_links_lead_to_files_that_exist(page):
    run, _, parsed = page
    folder = Path(run.made.storage.uri(report_path("made"))).parent
    made_here = [link for link in parsed.links if not link.endswith("dataset.json")]  # the made run has no dataset.json
    assert len(made_here) == len(parsed.links) - 1 == 5
    assert all((folder / link).resolve().is_file() for link in made_here)


def test_its_figures_are_the_manifests(page):
    run, text, parsed = page
    cells = {row[0]: row[1:] for row in parsed.rows if row}
    for name, score in {**run.evaluation.sources, "all": run.evaluation.overall}.items():
        baselines = {**run.evaluation.source_baselines, "all": run.evaluation.baselines}[name]
        expected = [f"{score.documents:,}", f"{score.tokens:,}", f"{score.loss:.3f}", f"{score.bits_per_byte:.3f}"]
        found = next(row[1:] for row in parsed.rows if row[0] == name and row[1:4] == expected[:3])
        assert found == expected + [f"{baselines[other]:.3f}" for other in SHOWN]
    assert cells["weights in the checkpoint"] == [run.made.checkpoint.content_sha256]
    assert "unigram entropy" in text
    assert (1280, 5.95) in parsed.line("Loss")
    assert {axis for _, axis in parsed.plots} == {"tokens"}  # metrics of before there were journals have no times
    assert "Gradient norm" not in text  # nor this figure, in the made run


def test_without_curves_it_still_renders(page):
    run, *_ = page
    text = render(run_of(run, history=type(run_of(run).history)()))
    Page(text)
    assert "<h2>Training</h2>" not in text
    assert "<h2>Stages</h2>" not in text


def test_it_is_about_the_checkpoint_that_was_evaluated(page):
    """Not the last one of the run: trained on, steps and the artefact are the chosen one's."""
    made = page[0].made
    last = made.checkpoint.model_copy(update={"step": 90, "tokens_seen": 99_000_000, "skipped_steps": 7})
    train = made.train.model_copy(update={"checkpoint": last, "steps": 90, "skipped_steps": 7})
    text = render(run_of(page[0], train=train))
    assert "<strong>12.5k tokens</strong><small>50 of 90 steps, 1 skipped</small>" in text
    assert "train/step-00000050/manifest.json" in text
    assert "step-00000090" not in text
    assert "99M" not in text


def test_of_several_versions_it_is_about_the_chosen_checkpoints(page, storage: Storage):
    """With publishing.revisions later steps are published, too; and of one step there is a version for each setting of the export."""
    settings(storage, "r", "evaluation.checkpoint=40", "publishing.name=m")
    events(storage, "r", (0, "started", "publish", {}), (9, "finished", "publish", {}))

    def put(step: int, mark: str, run_id: str = "r") -> ModelManifest:
        version = f"step-{step:08d}-{mark}"
        changed = {"name": "m", "version": version, "step": step, "config": {"run_id": run_id}}
        manifest = page[0].manifest.model_copy(update=changed)
        return registry.commit(storage, manifest)

    put(80, "aaaaaaaa")
    put(40, "bbbbbbbb", run_id="another")
    promoted, later = put(40, "cccccccc"), put(40, "dddddddd")
    assert read_run(storage, "r").model == later
    assert registry.promote(storage, promoted)
    found = read_run(storage, "r")
    assert found.model == promoted
    assert found.problems == ()
    storage.write("models/m/step-00000090-eeeeeeee/manifest.json", b"{")
    found = read_run(storage, "r")
    assert found.model == promoted
    assert ["step-00000090-eeeeeeee" in problem for problem in found.problems] == [True]


def test_it_grows_while_the_run_works(storage: Storage):
    """Three looks at a run: before its first step, in the middle, and after its end."""
    settings(storage, "debug")
    begun = [
        (0, "started", "prepare", {}),
        (30, "finished", "prepare", {"seconds": 30.0}),
        (31, "started", "train", {}),
    ]
    events(storage, "debug", *begun)
    looks = [render(replace(read_run(storage, "debug"), now=START + 35))]
    journal(storage, "debug", (40, 0, 60))
    looks.append(render(replace(read_run(storage, "debug"), now=START + 170)))
    journal(storage, "debug", (40, 0, 120))
    ended = [(300, "finished", "train", {"seconds": 269.0}), (301, "started", "publish", {}), (310, "finished", "publish", {"seconds": 9.0})]  # fmt: skip
    events(storage, "debug", *begun, *ended)
    looks.append(render(replace(read_run(storage, "debug"), now=START + 400)))
    first, second, third = map(Page, looks)
    assert first.plots == {}
    assert len(second.line("Loss")) == 60
    assert len(third.line("Loss")) == 120
    assert third.line("Loss")[:60] == second.line("Loss")
    assert ["running: train" in look for look in looks] == [True, True, False]
    assert ["http-equiv" in look for look in looks] == [
        True,
        True,
        False,
    ]  # a browser looks again while there is something to come
    assert ">done<" in looks[2]


def test_a_killed_run_that_went_on_is_one_curve_with_the_restart_marked(storage: Storage):
    recorded(storage, "debug")
    text = render(read_run(storage, "debug"))
    parsed = Page(text)
    tokens = [x for x, _ in parsed.line("Loss", name="training")]
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 120
    lines = [json.loads(line) for name in storage.names(journal_folder("debug")) for line in storage.read(f"{journal_folder('debug')}/{name}").splitlines()]  # fmt: skip
    again = {line["step"]: line for line in lines if line.get("step", 0) > 80 and line["time"] > START + 262}
    assert dict(parsed.line("Loss", name="training"))[again[90]["tokens"]] == pytest.approx(again[90]["loss"], rel=1e-6)
    restarts = [moment for moment in parsed.plots["Loss", "tokens"]["moments"] if moment[0].startswith("restart")]
    assert restarts == [["restart: went on from step 80", 80 * 8170]]
    [[_, began]] = [each for each in parsed.plots["Loss", "time"]["moments"] if each[0].startswith("restart")]
    assert began == 262 - 40  # over time it is where it was
    saved = [x for name, x in parsed.plots["Gradient norm", "tokens"]["moments"] if name.startswith("checkpoint")]
    assert saved == [40 * 8170, 80 * 8170, 120 * 8170]
    assert "15 logged steps were done again after a restart." in text
    stages = [row for row in parsed.rows if row[0] == "train"]
    assert [row[1].strip() for row in stages] == ["killed", "finished"]
    by_time = parsed.line("Loss", "time", "training")
    assert by_time[-1][0] == pytest.approx(262 + 8 + 80 - 40)  # seconds since training began
    assert by_time == sorted(by_time)


def test_validation_stands_where_its_checkpoint_does(storage: Storage):
    recorded(storage, "debug")
    parsed = Page(render(read_run(storage, "debug")))
    assert parsed.line("Loss", "tokens", "held out") == [(40 * 8170, 5.2), (80 * 8170, 4.7), (120 * 8170, 4.5)]
    assert [x for x, _ in parsed.line("Loss", "time", "held out")] == pytest.approx([40 * 2 + 8, 80 * 2 + 8, 310])


FIGURES = {
    "mfu": "MFU",
    "memory_peak_bytes": "Memory",
    "seconds_data": "Where a step's time goes",
    "slowest_seconds": "Slowest rank",
}


def test_every_figure_that_is_recorded_has_a_chart_with_titles(storage: Storage):
    recorded(storage, "debug", **dict.fromkeys(FIGURES, 0.5))
    recorded(storage, "bare")
    full, bare = (Page(render(read_run(storage, name))) for name in ("debug", "bare"))
    always = {"Loss", "Gradient norm", "Learning rate", "Bias rate of the router", "Batch", "Throughput", "Expert load", "Skipped steps and spikes"}  # fmt: skip
    assert always <= set(bare.charts)
    assert set(full.charts) - set(bare.charts) == set(FIGURES.values())
    assert {axis for _, axis in full.plots} == {"tokens", "time"}
    layers = [series[0] for series in full.plots["Expert load", "tokens"]["series"]]
    assert layers == ["mixture layer 1", "mixture layer 2", "mixture layer 3"]
    assert full.line("Loss", name="spike") == [
        point for point in full.line("Loss", name="training") if point[0] == 71 * 8170
    ]


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(storage: Storage):
    recorded(storage, "debug")
    for path in ("config.yaml", "evaluate/step-00000080.json", "dataset.json", "train/manifest.json"):
        storage.write(f"runs/debug/{path}", b'{"step": ')
    run = read_run(storage, "debug")
    places = ("config.yaml", "dataset.json", "evaluate/step-00000080.json", "train/manifest.json")
    assert len(run.problems) == 4
    for place in places:
        assert [place in problem for problem in run.problems].count(True) == 1
    text = render(run)
    assert "What could not be read" in text
    assert len(Page(text).line("Loss", name="training")) == 120


def test_of_a_run_that_has_nothing_yet(storage: Storage):
    storage.write("runs/debug/events.jsonl", b"")
    assert write_page(storage, "debug") == report_path("debug")
    text = storage.read(report_path("debug")).decode()
    Page(text)
    assert ">new<" in text
