"""What Ray Data says on the screen while prepare runs."""

from __future__ import annotations

import logging

import ray.data

from data_prep.mapping import _quiet


def shown(level: int, text: str) -> bool:
    """Would the console have it?"""
    logger = logging.getLogger("ray.data")
    record = logger.makeRecord("ray.data", level, "streaming_executor.py", 1, text, (), None)
    (console,) = [handler for handler in logger.handlers if handler.get_name() == "console"]
    return bool(record.levelno >= console.level and console.filter(record))


def test_plans_and_phases_stay_in_its_file() -> None:
    ray.data.DataContext.get_current()
    assert any(handler.get_name() == "file" for handler in logging.getLogger("ray.data").handlers)
    _quiet()
    _quiet()  # of every phase
    assert not shown(logging.INFO, "Execution plan of Dataset tokenize_unit_0")
    assert not shown(logging.WARNING, "Progress bars disabled. To enable, set ...")
    assert shown(logging.WARNING, "Operator Map is out of memory")
    assert shown(logging.ERROR, "A task failed")
