"""What is done is what the records say: over the life of a run, and after its settings change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from data_prep.handed_listing import ENVIRONMENT, forget, hand_over, handed
from data_prep.identity import identity, list_corpus
from data_prep.listing import InputFile, Listing, list_source
from data_prep.prepare import prepare
from jobs import stages
from jobs.commit import git_commit
from jobs.stages import MissingInput, find, run
from jobs.stages.prepare import check_supply, outcome
from jobs.stages.records import HeldDataset, Records, held_dataset, held_path, hold_dataset
from pipeline.config.load import ConfigError, load_config
from pipeline.config.near import NearDuplicates
from pipeline.config.schema import RunConfig, SourceConfig, StorageConfig
from pipeline.evaluation.heldout import evaluate
from pipeline.evaluation.result import manifest_path
from pipeline.file_index import dataset_path
from pipeline.manifest import DatasetManifest, DocumentCounts, TrainManifest
from pipeline.publishing.export import publish
from pipeline.storage import Storage, open_storage
from pipeline.training.commits import train_folder
from pipeline.training.identity import run_identity
from pipeline.workflow.record import read_events
from tests.evaluation.make import TEXTS, MadeRun, make_run, run_config
from tests.jobs.conftest import Prepared


class Living(NamedTuple):
    """A run whose stages are done one by one by the library, without Ray."""

    config: RunConfig
    storage: Storage
    made: MadeRun
    dataset: DatasetManifest
    train: TrainManifest


@pytest.fixture
def living(tmp_path: Path) -> Living:
    """The corpus is there, and what the stages will make of it; nothing of it is committed for this run."""
    plain = run_config(str(tmp_path / "root"))
    sources = []
    for source in plain.corpus.sources:
        folder = tmp_path / source.name
        folder.mkdir()
        for number, text in enumerate(TEXTS[source.name]):
            (folder / f"{number}.txt").write_text(text)
        sources.append(source.model_copy(update={"path": str(folder), "max_epochs": 1e6}))
    corpus = plain.corpus.model_copy(update={"sources": tuple(sources)})
    data = plain.data.model_copy(update={"lanes": 2, "mixture_block": 8, "rows_per_group": 1})
    config = plain.model_copy(update={"corpus": corpus, "data": data})
    made = make_run(config)
    dataset = made.dataset.model_copy(update={"identity": identity(config, list_corpus(config))})
    train = made.train.model_copy(update={"identity": run_identity(config, dataset)})
    return Living(config, made.storage, made, dataset, train)


def done(config: RunConfig, storage: Storage) -> list[str]:
    records = find(config, storage)
    return [stage for stage in stages.names() if records.done(stage)]


def change(config: RunConfig, section: str, **changes: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def finish(living: Living) -> None:
    config, storage = living.config, living.storage
    storage.create(dataset_path(living.dataset.identity), living.dataset.to_json())
    storage.write(f"{train_folder(config.run_id)}/manifest.json", living.train.to_json())
    evaluation = evaluate(config, living.dataset, living.made.checkpoint, storage, report=lambda _: None)
    publish(config, living.train, evaluation, living.dataset, storage, report=lambda _: None)


def test_over_the_life_of_a_run(living: Living) -> None:
    config, storage = living.config, living.storage
    assert find(config, storage) == Records()
    storage.create(dataset_path(living.dataset.identity), living.dataset.to_json())
    assert done(config, storage) == ["prepare"]
    storage.write(f"{train_folder(config.run_id)}/manifest.json", living.train.to_json())
    assert done(config, storage) == ["prepare", "train"]
    assert find(config, storage).checkpoint == living.train.checkpoint
    evaluation = evaluate(config, living.dataset, living.made.checkpoint, storage, report=lambda _: None)
    assert done(config, storage) == ["prepare", "train", "evaluate"]
    model = publish(config, living.train, evaluation, living.dataset, storage, report=lambda _: None)
    records = find(config, storage)
    assert (records.dataset, records.train, records.evaluation) == (living.dataset, living.train, evaluation)
    assert records.model == model

    for stage in stages.names():  # done: nothing is run, nothing is written, Ray is not asked for
        run(stage, config, storage)
    assert read_events(storage, config.run_id) == []


def test_other_settings_under_the_same_run_id_are_not_done(living: Living, tmp_path: Path) -> None:
    finish(living)
    config, storage = living.config, living.storage
    assert done(config, storage) == stages.names()
    assert done(change(config, "publishing", dtype="bf16"), storage) == ["prepare", "train", "evaluate"]
    assert done(change(config, "evaluation", sequence_length=32), storage) == ["prepare", "train"]
    assert done(change(config, "optimizer", weight_decay=0.3), storage) == ["prepare"]
    assert done(config.model_copy(update={"seed": 1}), storage) == ["prepare"]
    assert done(change(config, "corpus", heldout_fraction=0.2), storage) == []
    # decides no byte of what is published
    assert done(change(config, "checkpoint", every_steps=7), storage) == stages.names()
    assert done(change(config, "cluster", cpus_per_worker=3.0), storage) == stages.names()
    (tmp_path / "prose" / "0.txt").write_text("The corpus changed.")
    assert done(config, storage) == []


def test_a_run_that_trains_keeps_its_dataset_whatever_is_installed(
    living: Living, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of a library, or of our own rules, would give other bytes; what is there stays there."""
    finish(living)
    config, storage = living.config, living.storage
    older = HeldDataset(dataset=living.dataset.identity, settings=identity(config, {}))  # as earlier code wrote it
    storage.write(held_path(config.run_id), older.to_json())
    assert done(config, storage) == stages.names()
    hold_dataset(config, storage, living.dataset)
    monkeypatch.setattr("data_prep.identity.versions", lambda: {"pyarrow": "99"})
    monkeypatch.setattr("data_prep.plan.FORMAT_VERSION", 99)
    assert done(config, storage) == stages.names()
    assert done(change(config, "corpus", heldout_fraction=0.2), storage) == []
    storage.delete(train_folder(config.run_id))  # before training prepare makes what it would make now
    assert done(config, storage) == []


def test_a_run_that_trains_keeps_its_dataset_though_names_say_more_now(living: Living) -> None:
    """They did not say whether copies in other sources go, where near-duplicates do; nor that filters judge what is said."""
    finish(living)
    near = change(living.config, "corpus", near_duplicates=NearDuplicates())
    both = change(near, "corpus", drop_duplicates_across_sources=True)
    older = HeldDataset(dataset=living.dataset.identity, settings=identity(near, {}))
    living.storage.write(held_path(near.run_id), older.to_json())
    assert held_dataset(both, living.storage) == living.dataset.identity
    assert held_dataset(change(both, "corpus", heldout_fraction=0.2), living.storage) is None


def test_a_command_lists_its_corpus_once(living: Living, monkeypatch: pytest.MonkeyPatch) -> None:
    config, storage, listed = change(living.config, "data", max_padding=1.0), living.storage, list[str]()

    def counting(source: SourceConfig, index: int, storage: StorageConfig) -> Listing:
        listed.append(source.name)
        return list_source(source, index, storage)

    monkeypatch.setattr("data_prep.identity.list_source", counting)
    records = find(config, storage)
    stages.check(["prepare"], config, storage, records)
    prepare(config, storage, listings=find(config, storage, "prepare", records).corpus(config))
    assert sorted(listed) == sorted(source.name for source in config.corpus.sources)


def test_a_lost_record_is_a_stage_to_do_again(living: Living) -> None:
    finish(living)
    storage = living.storage
    storage.delete(manifest_path(living.config, living.made.checkpoint))
    assert done(living.config, storage) == ["prepare", "train"]


def test_a_stage_without_its_input_says_which_command_makes_it(living: Living) -> None:
    config, storage = living.config, living.storage
    for stage, earlier in (("train", "prepare"), ("evaluate", "prepare"), ("publish", "prepare")):
        with pytest.raises(MissingInput, match=rf"{stage} needs the result of {earlier}.*python -m jobs.{earlier}"):
            run(stage, config, storage)
    storage.create(dataset_path(living.dataset.identity), living.dataset.to_json())
    with pytest.raises(MissingInput, match=r"evaluate needs the result of train"):
        run("evaluate", config, storage)
    assert read_events(storage, config.run_id) == []


def test_a_checkpoint_that_is_not_there(living: Living) -> None:
    finish(living)
    with pytest.raises(ConfigError, match=r"evaluation.checkpoint 7: no such checkpoint; there are \[50\]"):
        find(change(living.config, "evaluation", checkpoint=7), living.storage)
    named = find(change(living.config, "evaluation", checkpoint=50), living.storage)
    assert (named.checkpoint, named.done("evaluate")) == (living.made.checkpoint, True)


def test_a_demand_that_the_prepared_data_cannot_meet(living: Living) -> None:
    living.storage.create(dataset_path(living.dataset.identity), living.dataset.to_json())
    sources = tuple(source.model_copy(update={"max_epochs": 1.0}) for source in living.config.corpus.sources)
    with pytest.raises(ConfigError, match=r"source 'code' would be seen up to"):
        find(change(living.config, "corpus", sources=sources), living.storage)


def test_a_failed_stage_leaves_its_reason(living: Living, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("worker died\nof something")

    monkeypatch.setattr(stages.prepare, "do", broken)
    with pytest.raises(RuntimeError, match="worker died"):
        run("prepare", living.config, living.storage)
    started, failed = read_events(living.storage, living.config.run_id)
    assert (started["event"], started["stage"]) == ("started", "prepare")
    assert (failed["event"], failed["error"]) == ("failed", "RuntimeError: worker died\nof something")
    assert failed["seconds"] >= 0


def supply(files: list[InputFile], tokens: int, *more: str) -> None:
    """One source with `files`, two epochs of it allowed, `tokens` wanted."""
    source = {"name": "web", "path": "/x", "max_epochs": 2}
    schedule = {
        "total_tokens": tokens,
        "learning_rate": [{"until_tokens": tokens, "shape": "constant", "start": 1e-3, "end": 1e-3}],
        "global_batch": [{"until_tokens": tokens, "sequences": 16}],
        "bias_rate": [{"until_tokens": tokens, "rate": 0.0}],
    }
    overrides = [
        f"corpus={json.dumps({'sources': [source]})}",
        f"schedule={json.dumps(schedule)}",
        'tokenizer={"vocab_size": 4096}',
        *more,
    ]
    check_supply(load_config("debug", overrides), {"web": files})


def test_a_demand_that_no_tokenizer_could_meet() -> None:
    texts = [InputFile("a.txt", 1_000_000, ""), InputFile("b.txt", 500_000, "")]
    supply(texts, 5_000_000)
    with pytest.raises(ConfigError) as error:
        supply(texts, 50_000_000)
    message = str(error.value)
    assert message.startswith("schedule.total_tokens 50,000,000 asks for 50,000,000 tokens of source 'web', whose 1,5")
    assert "raise corpus.sources[0].max_epochs" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.txt.zst"])
def test_nothing_bounds_a_compressed_corpus(name: str) -> None:
    supply([InputFile(name, 1000, "")], 50_000_000)


def test_a_source_too_small_for_its_weight() -> None:
    """Enough text in all, but not of the source that half of the tokens should come from."""
    config = load_config(
        "debug",
        [
            "corpus.sources=[{name: big, path: /b, max_epochs: 9}, {name: small, path: /s}]",
            'tokenizer={"vocab_size": 4096}',
        ],
    )
    listings = {"big": [InputFile("x.txt", 10**9, "")], "small": [InputFile("y.txt", 10**4, "")]}
    with pytest.raises(ConfigError, match=r"asks for 491,520 tokens of source 'small'.*corpus.sources\[1\].max_epochs"):
        check_supply(config, listings)
    mixture = "corpus.mixture=[{until_tokens: 983040, weights: {big: 0.999, small: 0.001}}]"
    check_supply(
        load_config("debug", [f"corpus.sources={_plain(config)}", 'tokenizer={"vocab_size": 4096}', mixture]), listings
    )


def _plain(config: RunConfig) -> str:
    return json.dumps([source.model_dump(mode="json") for source in config.corpus.sources])


def test_the_commit_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONLIGHT_GIT_COMMIT", "abc")
    assert git_commit() == "abc"
    monkeypatch.setenv("MOONLIGHT_GIT_COMMIT", "unknown")  # what an image without the build argument has
    assert git_commit() != "abc"
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_commit() == "unknown"


def test_the_real_dataset_of_a_run(prepared) -> None:  # type: ignore[no-untyped-def]
    assert find(prepared.config, open_storage(prepared.config.storage)).dataset == prepared.dataset


def test_prepare_ends_with_what_became_of_every_document(prepared: Prepared) -> None:
    said = outcome(prepared.dataset)
    counts = [source.counts for source in prepared.dataset.sources]
    found = re.findall(r"([\d,]+) (kept|held|dupl|filt|quar)", re.sub(r" \([^)]*\)", "", said))
    numbers = {name: int(value.replace(",", "")) for value, name in found}
    assert said.startswith(f"prepare   {sum(each.docs_in for each in counts):,} documents in: ")
    assert sum(numbers.values()) == sum(each.docs_in for each in counts)
    assert numbers["kept"] == sum(each.docs_out for each in counts)
    assert numbers["held"] == sum(each.heldout for each in counts)
    assert numbers["quar"] == sum(sum(each.quarantined.values()) for each in counts) > 0
    for reason in {reason for each in counts for reason in each.quarantined}:
        assert f"{reason} " in said
    assert said.endswith(f"{prepared.dataset.tokens:,} tokens, {prepared.dataset.padding:.2%} padding")


def test_duplicates_and_filters_are_told_by_reason(prepared: Prepared) -> None:
    counts = DocumentCounts(
        docs_in=1110, docs_out=1000, heldout=10, filtered={"exact_duplicate": 50, "heldout_copy": 7, "min_words": 40, "max_words": 0}, quarantined={"empty": 3},
    )  # fmt: skip
    assert counts.balanced()
    source = prepared.dataset.sources[0].model_copy(update={"counts": counts})
    said = outcome(prepared.dataset.model_copy(update={"sources": (source,)}))
    assert (
        "1,110 documents in: 1,000 kept, 10 held out, 57 (exact_duplicate 50, heldout_copy 7) duplicates, "
        "40 (min_words 40) filtered, 3 (empty 3) quarantined; "
    ) in said


def test_a_job_takes_the_list_of_the_driver_that_told_it(living: Living, monkeypatch: pytest.MonkeyPatch) -> None:
    config, storage = living.config, living.storage
    listed = list_corpus(config)
    told = hand_over(config, storage, listed)
    assert handed(config, storage) == {}  # who was not told lists for itself
    monkeypatch.setenv(ENVIRONMENT, told)
    found = handed(config, storage)
    assert {name: (files.root, list(files)) for name, files in found.items()} == {
        name: (files.root, list(files)) for name, files in listed.items()
    }
    monkeypatch.setattr("jobs.stages.records.list_corpus", lambda _: pytest.fail("listed once more"))
    records = stages.find(config, storage, "prepare", Records(listings=found))
    assert identity(config, records.corpus(config)) == living.dataset.identity
    monkeypatch.setenv(ENVIRONMENT, "0" * 64)  # of another driver
    assert handed(config, storage) == {}
    monkeypatch.setenv(ENVIRONMENT, told)
    written = storage.list(f"runs/{config.run_id}/listing")
    assert len(written) == len(listed)
    storage.write(written[0].path, storage.read(written[0].path)[:-100])  # torn
    assert handed(config, storage) == {}
    forget(config, storage)
    assert handed(config, storage) == {}
    assert not storage.list(f"runs/{config.run_id}/listing")
