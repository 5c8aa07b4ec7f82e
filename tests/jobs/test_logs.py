"""Session logs reach the run's folder while the cluster lives and once more at its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import logs as command
from jobs.on_ray import logs
from pipeline.config.schema import StorageConfig
from pipeline.storage import open_storage


@pytest.fixture
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_only_what_changed_is_copied(tmp_path: Path) -> None:
    source, storage = tmp_path / "logs", open_storage(StorageConfig(root=str(tmp_path / "root")))
    (source / "train").mkdir(parents=True)
    (source / "a.log").write_text("one\n")
    (source / "train" / "b.log").write_text("two\n")
    seen: dict[str, tuple[int, int]] = {}
    assert logs.copy_changed(source, storage, "runs/r/logs/r-train-1", seen) == ["a.log", "train/b.log"]
    assert logs.copy_changed(source, storage, "runs/r/logs/r-train-1", seen) == []
    (source / "a.log").write_text("one\nmore\n")
    assert logs.copy_changed(source, storage, "runs/r/logs/r-train-1", seen) == ["a.log"]
    assert storage.read("runs/r/logs/r-train-1/a.log") == b"one\nmore\n"
    assert storage.read("runs/r/logs/r-train-1/train/b.log") == b"two\n"


def test_the_end_of_a_large_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 4)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("0123456789")
    storage = open_storage(StorageConfig(root=str(tmp_path / "root")))
    logs.copy_changed(tmp_path / "logs", storage, "x", {})
    assert storage.read("x/a.log") == b"6789"


def test_a_last_round_follows_the_signal_and_trouble_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("x")
    keep = logs.keep_copying

    def told_to_end(*given: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        keep(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(logs, "keep_copying", told_to_end)
    arguments = ["--name", "debug-train-1", "--config", "debug", "--source", str(tmp_path / "logs")]
    assert command.main([*arguments, f"storage.root={tmp_path / 'root'}"]) == 0
    assert (tmp_path / "root/runs/debug/logs/debug-train-1/a.log").read_text() == "x"
    (tmp_path / "file").write_text("")
    assert command.main([*arguments, f"storage.root={tmp_path / 'file' / 'below'}"]) == 0
    assert "logs not copied" in capsys.readouterr().err
