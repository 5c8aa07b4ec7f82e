"""Forked processes are as free as spawned ones: an order of sets of their own, and what surrounds the test that starts them."""

import importlib
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.forks import fork

WHEN_IMPORTED = time.monotonic()


def told(pipe: Connection, *_: Any) -> None:
    print("said by the child")
    found = (hash("a set of strings"), os.environ.get("OF_THIS_TEST"), os.getcwd(), os.getppid(), WHEN_IMPORTED)
    pipe.send(found)


def dies(pipe: Connection) -> None:
    raise KeyError("lost on purpose")


def run(number: int, *args: Any) -> tuple[Any, ...]:
    _, pipe = fork(number, told, *args)
    found = pipe.recv()
    with pytest.raises(EOFError):
        pipe.recv()  # it has ended
    return found


@pytest.mark.skipif("PYTHONHASHSEED" in os.environ, reason="all processes hash alike")
def test_neighbours_order_sets_differently() -> None:
    hashes = [run(number)[0] for number in range(4)]
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]


def test_it_has_what_the_test_has_and_imports_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, _, before, server, imported = run(0)
    assert before == os.getcwd()
    monkeypatch.setenv("OF_THIS_TEST", "there")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert run(0, b"x" * 10_000_000)[1:] == ("there", str(tmp_path), server, imported)
    assert capfd.readouterr().out == "said by the child\n"
    monkeypatch.undo()
    assert run(0)[1:3] == (None, before)


def test_an_error_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    _, pipe = fork(1, dies)
    with pytest.raises(EOFError):
        pipe.recv()
    assert "KeyError: 'lost on purpose'" in capfd.readouterr().err


def test_a_module_that_starts_a_thread_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another thread holds would be held for ever in the fork."""
    thread = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    (tmp_path / "starts_a_thread.py").write_text(f"import threading, time\n{thread}\ndef target(pipe): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(forks, "SERVERS", 3)  # one that no other test uses
    with pytest.raises(RuntimeError, match="importing starts_a_thread starts a thread"):
        fork(2, importlib.import_module("starts_a_thread").target)
