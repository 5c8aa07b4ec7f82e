"""A small dataset prepared from the standard library's own text, for the commands that read one, and a cluster by its kubeconfig."""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
import yaml

from data_prep.prepare import prepare
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage
from pipeline.workflow import heartbeat
from tests.workflow.driver import filled
from tests.workflow.fake_kubernetes import FakeKubernetes

TEXT = "The moon rose late. " * 200
LOOKING = "debug: looking at its run and its data\n"  # the first line of a driver


@pytest.fixture(autouse=True)
def no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own tests; on a busy machine anything may take ten seconds."""
    monkeypatch.setattr(heartbeat, "QUIET_S", math.inf)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray of other tests may be there: what counts is that none is started or joined."""

    def refuse(**_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)


def override(path: Path, **source: object) -> str:
    """The folder as the only source of a corpus."""
    return "corpus=" + json.dumps({"sources": [{"name": "web", "path": str(path), **source}]})


class Prepared(NamedTuple):
    arguments: list[str]  # of a command: --config and overrides
    config: RunConfig
    storage: Storage
    dataset: DatasetManifest
    texts: dict[str, dict[str, str]]  # by source and document name


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("prepared")
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts: dict[str, dict[str, str]] = {}
    for number, name in enumerate(("even", "odd")):
        (root / name).mkdir()
        chosen = [path for path in modules if 500 < path.stat().st_size < 30_000][number::2][:40]
        texts[name] = {path.name: path.read_text() for path in chosen}
        texts[name] |= {f"short-{path.name}": path.read_text()[200:700] for path in chosen}  # several fit into a row
        texts[name]["empty.py"] = ""  # goes to quarantine
        for path, text in texts[name].items():
            (root / name / path).write_text(text)
    sources = [
        {"name": name, "path": str(root / name), "format": "text", "weight": 2 - number, "max_epochs": 9}
        for number, name in enumerate(texts)
    ]
    overrides = [
        f"storage.root={root / 'storage'}",
        'tokenizer={"vocab_size": 600, "training_bytes": 200000}',
        "model.vocab_size=600",
        "corpus=" + json.dumps({"sources": sources, "unit_bytes": 200_000, "heldout_fraction": 0.05}),
        "data.rows_per_group=4",
        "data.max_padding=1.0",
        "data.groups_per_file=8",
        "data.mixture_block=6",
        "schedule.total_tokens=491520",
    ]
    config = load_config("debug", overrides)
    storage = open_storage(config.storage)
    return Prepared(["--config", "debug", *overrides], config, storage, prepare(config, storage), texts)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    """The fake API server with our templates and queues; its kubeconfig is `tmp_path / "kubeconfig"`, and this process's."""
    fake = filled()
    server = f"http://127.0.0.1:{fake.server.server_port}"
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
        "clusters": [{"name": "fake", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": {"token": "t"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    yield fake
    fake.close()
