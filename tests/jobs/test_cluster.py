"""The environment that Ray's processes inherit: a local cluster saves memory, one at RAY_ADDRESS is left as it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import pytest
import ray

from jobs.on_ray.cluster import connect
from pipeline.config.load import load_config


@pytest.fixture
def inherited(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], dict[str, str]]:
    """Start from these variables; what is set when Ray would start."""

    class Started(Exception):
        pass

    def init(**_: object) -> None:
        raise Started

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr("jobs.on_ray.cluster.local_cluster", lambda *_, **__: contextlib.nullcontext("127.0.0.1:1"))

    def start(environment: dict[str, str]) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", environment)
        with pytest.raises(Started):
            connect(load_config("debug", [])).__enter__()
        return environment

    return start


def test_a_local_cluster_saves_memory(inherited):
    found = inherited({})
    assert found["MALLOC_ARENA_MAX"] == "2"
    assert found["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
    assert found["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "0"
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("address", ["auto", "ray://head:10001"])
def test_any_other_cluster_watches_its_nodes_and_keeps_its_runs(inherited, address):
    found = inherited({"RAY_ADDRESS": address})
    assert "MALLOC_ARENA_MAX" not in found
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in found
    assert found["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"


def test_a_setting_of_the_user_wins(inherited):
    assert inherited({"MALLOC_ARENA_MAX": "8"})["MALLOC_ARENA_MAX"] == "8"
