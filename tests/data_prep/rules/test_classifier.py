"""A classifier of one's own: verdicts by its scores, what it may not return, and the same bytes wherever it runs and dies."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.mapping import map_on_ray
from data_prep.plan import Unit
from data_prep.prepare import prepare
from data_prep.records import shard_path
from data_prep.rules.actors import TRIES, classifier_actors
from data_prep.rules.apply import apply
from data_prep.rules.classifier import Scores, in_process
from data_prep.units import unpacked
from jobs.main import main
from pipeline.config.classifier import Classifier
from pipeline.config.load import ConfigError
from pipeline.config.rules import Rules
from pipeline.config.schema import RunConfig
from pipeline.file_index import open_index
from pipeline.report.data import data
from pipeline.storage import open_storage
from tests.data_prep.plugs import score
from tests.data_prep.test_prepare import objects

Make = Callable[..., RunConfig]
SMALL = {"cluster__classifier_actors": 2, "cluster__classifier_cpus": 0.25, "cluster__prepare_memory_bytes": "50MB"}
SECTION = {
    "function": "tests.data_prep.plugs:score",
    "version": "1",
    "min_score": 0.2,
    "max_score": 0.9,
    "batch_size": 7,
}


def with_classifier(
    run_config: Make, jsonl: Path, name: str = "score", version: str = "1", **more: object
) -> RunConfig:
    section = {**SECTION, "version": version, "function": f"tests.data_prep.plugs:{name}"}
    given = {"corpus__unit_bytes": 300_000, "corpus__keep_rejected": "true", "corpus__heldout_fraction": 0.0, **more}
    return run_config(jsonl, source={"rules": {"classifier": section}}, **given)


def test_thresholds_on_what_other_rules_leave() -> None:
    texts = [
        f"Text {number} of some words that say nothing of it to anybody at all, a@example.org." for number in range(40)
    ]
    texts[3], texts[20] = "short", "short"
    rules = Rules.model_validate(
        {"gopher_quality": {"min_words": 3, "min_stop_words": 0}, "classifier": SECTION, "personal_data": {}}
    )
    outcomes = apply(texts, rules)
    judged = [number for number in range(40) if number not in (3, 20)]
    expected: dict[int, float] = {}
    for start in range(0, len(judged), 7):
        batch = judged[start : start + 7]
        expected.update(zip(batch, score([texts[number] for number in batch]).tolist()))
    for number, outcome in enumerate(outcomes):
        assert outcome.score == expected.get(number)
        want = "gopher_quality.min_words" if number in (3, 20) else ""
        if number in expected:
            want = {True: "classifier.min_score"}.get(
                expected[number] < 0.2, "classifier.max_score" if expected[number] > 0.9 else ""
            )
            assert ("[EMAIL]" in outcome.text) is (want == "")
        assert outcome.rejected == want
    assert {outcome.rejected for outcome in outcomes} == {
        "",
        "gopher_quality.min_words",
        "classifier.min_score",
        "classifier.max_score",
    }


def test_prepare_drops_counts_and_keeps_them(run_config: Make, jsonl: Path, texts: list[str]) -> None:
    config = with_classifier(run_config, jsonl)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    filtered = dataset.sources[0].counts.filtered
    assert set(filtered) == {"classifier.min_score", "classifier.max_score"}
    rejected = [
        row
        for file in open_index(storage, dataset).rejected[0]
        for row in pq.read_table(storage.open(file.path)).to_pylist()
    ]
    assert len(rejected) == sum(filtered.values())
    assert {row["text"] for row in rejected} < set(texts)
    scores = dataset.sources[0].scores
    assert scores is not None
    assert sum(scores.counts) == len(texts)
    for threshold, documents in (
        (0.2, filtered["classifier.min_score"]),
        (0.9, 120 - filtered["classifier.max_score"]),
    ):
        begun = [count for edge, count in zip(scores.edges, scores.counts) if edge < threshold]
        assert sum(begun[:-1]) <= documents <= sum(begun)
    page = data(dataset, (), {})
    assert "Scores of the classifier" in page
    assert f"120 documents, {len(rejected)} left out by their score" in page
    newer = with_classifier(run_config, jsonl, version="2")
    changed = prepare(newer, storage)
    assert changed.identity != dataset.identity  # of another version, though the scores are the same
    assert changed.sources[0].counts == dataset.sources[0].counts


WRONG = [
    ("one_too_few", "returned 6 scores for 7 texts; it has to return one for each, in order"),
    ("no_number", "returned nan for the text '.*'; it has to return a finite number for every text"),
    ("a_column", r"returned an array of shape \(7, 1\) for 7 texts"),
    ("no_array", "raises ValueError: could not convert string to float"),
    ("raises", "raises KeyError: 'model.bin'; mend it"),
    ("nowhere", "cannot be loaded .*nowhere.*install its package on every node"),
    ("versioned", "is of version '2', and the setting says '1'; set version to '2'"),
    ("a_constant", "is a int; name a function that takes a list of texts"),
]


@pytest.mark.parametrize(("name", "why"), WRONG)
def test_what_it_may_not_do(run_config: Make, jsonl: Path, name: str, why: str) -> None:
    config = with_classifier(run_config, jsonl, name)
    with pytest.raises(
        ConfigError, match=rf"corpus.sources\[0\].rules.classifier.function: tests.data_prep.plugs:{name} {why}"
    ) as error:
        prepare(config, open_storage(config.storage))
    assert "\n" not in str(error.value)
    before_any_unit = name in ("nowhere", "versioned", "a_constant")
    assert ("(unit " in str(error.value)) is not before_any_unit


def sample_of(jsonl: Path, folder: Path, classifier: dict[str, Any]) -> list[str]:
    """The command."""
    source = {"name": "web", "path": str(jsonl), "rules": {"classifier": classifier}}
    corpus = json.dumps({"sources": [source]})
    return ["data", "sample", "--config", "debug", f"storage.root={folder / 'root'}", f"corpus={corpus}"]


def test_a_command_refuses_with_exit_code_2(tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, why in (
        ("no.such.package:score", "No module named 'no'"),
        ("tests.data_prep.plugs:one_too_few", "63 scores for 64 texts"),
    ):
        section = {"function": name, "version": "1", "min_score": 0.1}
        assert main(sample_of(jsonl, tmp_path, section)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: corpus.sources[0].rules.classifier.function: {name} ")
        assert why in error
        assert error.count("\n") == 1


def test_sample_shows_scores(tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sample_of(jsonl, tmp_path, SECTION)) == 0
    told = capsys.readouterr().out
    assert "    classifier.min_score " in told
    assert "    classifier.max_score " in told
    assert "  classifier's scores of 120, 10 %, 25 %, median, 75 %, 90 %: 0." in told


def test_a_unit_that_is_tried_alone_asks_its_parent(run_config: Make, jsonl: Path, tmp_path: Path) -> None:
    """A child process has no way to actors: the batches come to the parent, and the bytes are the same."""
    clean = with_classifier(run_config, jsonl, storage__root=str(tmp_path / "clean"), corpus__unit_bytes=10**9)
    dataset = prepare(clean, open_storage(clean.storage))
    config = with_classifier(run_config, jsonl, corpus__unit_bytes=10**9)
    storage = open_storage(config.storage)
    (unit,) = open_storage(clean.storage).list("datasets/units")
    for number in range(2):
        storage.create(shard_path("attempts", Path(unit.path).stem, f"/{number}"), b"")
    asked: list[int] = []

    def classify(settings: Classifier, batches: Sequence[Sequence[str]]) -> list[Scores | str]:
        asked.extend(map(len, batches))
        return in_process(settings, batches)

    assert prepare(config, storage, classify=classify).digest == dataset.digest
    assert sum(asked) == 120
    assert objects(storage) == objects(open_storage(clean.storage))


def test_a_childs_refusal_is_the_parents(run_config: Make, jsonl: Path) -> None:
    config = with_classifier(run_config, jsonl, corpus__unit_bytes=10**9)
    storage = open_storage(config.storage)
    units: list[Unit] = []

    def planning(_function: object, items: Sequence[bytes]) -> object:
        units.extend(map(unpacked, items))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        prepare(config, storage, map_units=planning)
    for number in range(2):
        storage.create(shard_path("attempts", units[0].id, f"/{number}"), b"")
    with pytest.raises(ConfigError, match=rf"plugs:score is not well \(unit {units[0].id}\)$"):
        prepare(config, storage, classify=lambda _settings, batches: ["is not well"] * len(batches))


def test_actors_on_ray(run_config: Make, jsonl: Path, tmp_path: Path, ray_cluster: None) -> None:
    """The same bytes as in one process, by two actors of which two processes are killed; and one line for what they may not do."""
    kills = [tmp_path / "first kill", tmp_path / "second kill"]
    for number, path in enumerate(kills):
        (jsonl / f"part-{2 * number}.jsonl").open("a").write(json.dumps({"text": f"kill once, {path}"}) + "\n")
        path.touch()
    clean = with_classifier(run_config, jsonl, storage__root=str(tmp_path / "clean"))
    dataset = prepare(clean, open_storage(clean.storage))
    for path in kills:
        path.unlink()
    config = with_classifier(run_config, jsonl, **SMALL)
    storage = open_storage(config.storage)
    with classifier_actors(config) as classify:
        found = prepare(config, storage, map_units=map_on_ray(config.cluster), classify=classify)
    assert all(path.exists() for path in kills)
    assert found.digest == dataset.digest
    assert objects(storage) == objects(open_storage(clean.storage))
    wrong = with_classifier(run_config, jsonl, "one_too_few", **SMALL)
    with (
        classifier_actors(wrong) as classify,
        pytest.raises(ConfigError, match=r"returned 6 scores for 7 texts.* \(unit [0-9a-f]{32}\)$"),
    ):
        prepare(wrong, storage, map_units=map_on_ray(wrong.cluster), classify=classify)


@pytest.mark.long
def test_a_function_that_kills_its_processes(run_config: Make, jsonl: Path, ray_cluster: None) -> None:
    config = with_classifier(run_config, jsonl, "dies", **SMALL)
    with (
        classifier_actors(config) as classify,
        pytest.raises(ConfigError, match=rf"plugs:dies kills its process: {TRIES} times over"),
    ):
        prepare(config, open_storage(config.storage), map_units=map_on_ray(config.cluster), classify=classify)
