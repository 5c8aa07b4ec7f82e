"""Several runs in one page: exactly the differing settings, and curves of all of them in one plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.schema import StorageConfig
from pipeline.report.compare import COLOURS, compare, comparison_path, differing
from pipeline.report.run import read_run
from pipeline.storage import Storage, open_storage
from tests.evaluation.make import make_run, run_config
from tests.report.make import events, recorded, settings
from tests.report.test_page import Page

CHANGED = ("optimizer.weight_decay=0.05", "schedule.learning_rate.0.end=2e-3", "training.spikes.action=skip")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


def test_exactly_the_settings_that_differ(storage: Storage):
    recorded(storage, "one")
    recorded(storage, "two", *CHANGED, shift=0.2)
    page = Page(compare([read_run(storage, name) for name in ("one", "two")]))
    first = page.rows.index(["setting", "one", "two"]) + 1
    table = {}
    for row in page.rows[first:]:
        table[row[0]] = row[1:]
    base, other = (load_config("debug", [f"run_id={name}", *more]) for name, more in (("one", ()), ("two", CHANGED)))
    assert table == {
        "optimizer.weight_decay": [str(base.optimizer.weight_decay), "0.05"],
        "schedule.learning_rate[0].end": ["0.004", "0.002"],
        "training.spikes.action": ["count", "skip"],
    }
    assert other.training.spikes.action == "skip"


def test_curves_of_both_are_in_one_plot(storage: Storage):
    recorded(storage, "one")
    recorded(storage, "two", shift=0.2)
    text = compare([read_run(storage, name) for name in ("one", "two")])
    page = Page(text)
    for axis in ("tokens", "time"):
        one, two = page.plots["Loss", axis]["series"]
        assert [one[:2], two[:2]] == [["one", COLOURS[0]], ["two", COLOURS[1]]]
        assert len(one[2]) == len(two[2]) == 120
    assert [series[3] for series in page.plots["Held-out loss", "tokens"]["series"]] == [
        [5.2, 4.7, 4.5],
        [5.4, 4.9, 4.7],
    ]
    assert "None: they have the same settings." in text


def test_differing_by_key():
    one = {"run_id": "a", "storage": {"root": "x"}, "a": {"b": 1, "c": [1, 2]}, "d": [{"e": 1}], "f": None}
    two = {"run_id": "b", "storage": {"root": "y"}, "a": {"b": 1, "c": [1, 3]}, "d": [{"e": 1}, {"e": 2}], "f": None}
    assert differing({"a": one, "b": two}) == {"a.c": ["[1, 2]", "[1, 3]"], "d[1].e": ["—", "2"]}
    assert differing({"a": one, "b": one}) == {}


def test_runs_that_share_nothing(storage: Storage):
    recorded(storage, "one")
    settings(storage, "two")
    events(storage, "two", (0, "started", "prepare", {}))
    with pytest.raises(
        ValueError, match="runs one, two share nothing to lay over each other: two has no logged step yet"
    ):
        compare([read_run(storage, name) for name in ("one", "two")])


def test_losses_of_different_tokenizers_are_not_laid_over_each_other(storage: Storage, tmp_path: Path):
    dataset = make_run(run_config(str(tmp_path / "made"))).dataset
    runs = []
    for number, name in enumerate(("one", "two")):
        recorded(storage, name)
        tokenizer = dataset.tokenizer.model_copy(update={"sha256": str(number) * 64})
        run = read_run(storage, name)
        runs.append(type(run)(**{**run.__dict__, "dataset": dataset.model_copy(update={"tokenizer": tokenizer})}))
    page = Page(text := compare(runs))
    assert "the tokenizers differ (one: 000000000000; two: 111111111111)" in text
    assert "Loss" not in page.charts
    assert "Throughput" in page.charts


def test_too_many_runs(storage: Storage):
    recorded(storage, "one")
    with pytest.raises(ValueError, match="9 runs are too many to tell apart in a plot; give at most 8"):
        compare([read_run(storage, "one")] * 9)


def test_the_name_of_the_page():
    assert comparison_path(["a", "b"]) == "reports/a_b.html"
    many = [f"run-{number:036d}" for number in range(4)]
    assert comparison_path(many).startswith("reports/4-runs-")
    assert comparison_path(many) != comparison_path(many[::-1])
