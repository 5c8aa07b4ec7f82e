"""A task beside training, in a process of its own, runs where nobody else wants the core."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from jobs.on_ray.task import _call

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="of Linux")


def classes() -> list[int]:
    """Of this thread, and of one that begins now."""
    found = [os.sched_getscheduler(0)]
    thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
    thread.start()
    thread.join()
    return found


def test_it_and_its_threads_are_in_the_idle_class() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(_call, classes, (), 1, False).result() == [os.SCHED_OTHER] * 2
        assert process.submit(_call, classes, (), 1, True).result() == [os.SCHED_IDLE] * 2
