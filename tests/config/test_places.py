"""Paths: one rule for every setting that is a place, wherever the configuration lies."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import locate
from pipeline.config.load import load_config
from pipeline.config.places import places
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.storage import open_storage

GIVEN = {
    "storage": {"root": "out"},
    "tokenizer": {"path": "tok/tokenizer.json"},
    "corpus": {"sources": [{"name": "a", "path": "../texts"}, {"name": "b", "path": "{stdlib}"}]},
    "evaluation": {"task_folder": "tasks", "tasks": ["own"]},
    "training": {"initial_weights": "models/moonlight/step-1"},
}


def found(config: RunConfig) -> list[str]:
    return [place.path for place in places(RunConfig, config.model_dump(mode="json"))]


def test_every_setting_that_is_a_place_is_known_by_its_type() -> None:
    config = load_config("debug").model_dump(mode="json")
    values = {
        **config,
        **{section: {**config[section], **given} for section, given in GIVEN.items() if section != "corpus"},
    }
    values["corpus"] = {"sources": GIVEN["corpus"]["sources"]}
    values = copy.deepcopy(values)
    for place in list(places(RunConfig, values)):
        place.section[place.key] = f"MARK{place.kind.below_root}"
    marked = [(path, value) for path, value in _leaves(values) if str(value).startswith("MARK")]
    assert marked == [
        ("storage.root", "MARKFalse"),
        ("tokenizer.path", "MARKFalse"),
        ("corpus.sources.0.path", "MARKFalse"),
        ("corpus.sources.1.path", "MARKFalse"),
        ("training.initial_weights", "MARKTrue"),
        ("evaluation.task_folder", "MARKFalse"),
    ]


def _leaves(node: Any, at: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in _leaves(value, f"{at}.{key}".strip("."))]
    if isinstance(node, list | tuple):
        return [leaf for index, value in enumerate(node) for leaf in _leaves(value, f"{at}.{index}")]
    return [(at, node)]


def test_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text(yaml.safe_dump({"preset": "debug", **GIVEN}))
    monkeypatch.chdir(tmp_path)
    for config in (load_config("configs/run.yaml"), locate("configs/run.yaml", [])[0]):
        assert [os.path.realpath(path) if path.startswith("/") else path for path in found(config)] == [
            str(tmp_path.resolve() / "configs" / "out"),
            str(tmp_path.resolve() / "configs" / "tok" / "tokenizer.json"),
            str(tmp_path.resolve() / "texts"),
            "{stdlib}",
            "models/moonlight/step-1",  # below the storage root
            str(tmp_path.resolve() / "configs" / "tasks"),
        ]


def test_overrides_are_relative_to_the_folder_one_works_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("preset: debug\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = ["storage.root=out", "corpus.sources.0.path=texts", "evaluation.task_folder=tasks"]
    config, storage = locate("../run.yaml", given)
    here = str(Path.cwd())
    assert (config.storage.root, storage.root) == (f"{here}/out", f"{here}/out")
    assert config.corpus.sources[0].path == f"{here}/texts"
    assert config.evaluation.task_folder == f"{here}/tasks"


@pytest.mark.parametrize("text", ["preset: debug\n", "preset: debug\nstorage: {region: eu-west-1}\n"])
def test_a_file_that_names_no_root_has_it_beside_itself(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert os.path.realpath(load_config("../run.yaml").storage.root) == str(tmp_path.resolve() / "store")
    whole = load_config("debug").model_dump(mode="json", exclude={"storage"})
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    assert os.path.realpath(load_config("../whole.json").storage.root) == str(tmp_path.resolve() / "store")
    assert load_config("debug").storage.root == "store"


def test_relative_to_a_file_on_s3(s3_root: StorageConfig) -> None:
    storage = open_storage(s3_root)
    storage.write("configs/run.yaml", yaml.safe_dump({"preset": "debug", **GIVEN}).encode())
    where = [f"storage.endpoint_url={s3_root.endpoint_url}", f"storage.region={s3_root.region}"]
    config = load_config(storage.uri("configs/run.yaml"), where)
    assert found(config) == [
        storage.uri("configs/out"),
        storage.uri("configs/tok/tokenizer.json"),
        storage.uri("texts"),
        "{stdlib}",
        "models/moonlight/step-1",
        storage.uri("configs/tasks"),
    ]
