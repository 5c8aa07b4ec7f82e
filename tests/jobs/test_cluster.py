"""The environment that Ray's processes inherit: a local cluster saves memory, one at RAY_ADDRESS is left as it is."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import sys
from collections.abc import Callable

import pytest
import ray

from jobs.on_ray.cluster import DEFAULTS, connect
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


def test_a_worker_of_ray_train_prints_a_line_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker's `sys.stdout` is Ray's file, as it is pytest's here; with its patch, Ray Train writes there twice."""
    from ray.train.v2._internal.logging.patch_print import patch_print_function

    handler, plain = logging.StreamHandler(sys.stdout), print
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    logging.getLogger().addHandler(handler)
    counts = []
    try:
        for patched in ("1", DEFAULTS["RAY_TRAIN_ENABLE_PRINT_PATCH"]):
            monkeypatch.setenv("RAY_TRAIN_ENABLE_PRINT_PATCH", patched)
            monkeypatch.setattr(builtins, "print", plain)
            patch_print_function()
            print("train  step 1")
            counts.append(capsys.readouterr().out.count("train  step 1"))
    finally:
        logging.getLogger().removeHandler(handler)
    assert counts == [2, 1]
