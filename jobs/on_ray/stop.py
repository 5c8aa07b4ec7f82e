"""SIGTERM and SIGINT to a command end in a checkpoint: the workers are asked to commit one and leave.

The command keeps its main thread for signals and waits for the group in another one (Ray Train, in the main thread, would answer
SIGINT itself, by killing its workers). A signal is passed on through a small actor that rank 0 asks once a second: no step
waits for it. A second signal ends the command at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.on_ray.signals import Interrupted

ASK_S = 1.0


class Asked(Protocol):
    """Something that workers can be asked for, in an actor."""

    def asked(self) -> bool: ...


def beside_the_driver() -> dict[str, Any]:
    """Options of an actor that must not go with a node of the workers."""
    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


class StopFlag:
    """A handle to the actor; picklable, so it goes to the workers."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(_Flag).options(num_cpus=0, max_restarts=-1, **beside_the_driver()).remote()

    def ask(self) -> None:
        self._actor.ask.remote()

    def asked(self) -> bool:
        return bool(ray.get(self._actor.asked.remote()))


class _Flag:
    def __init__(self) -> None:
        self._asked = False

    def ask(self) -> None:
        self._asked = True

    def asked(self) -> bool:
        return self._asked


@contextmanager
def listening(flag: Asked) -> Iterator[threading.Event]:
    """In a worker: an event that is set soon after somebody has asked to stop."""
    stop, ended = threading.Event(), threading.Event()

    def listen() -> None:
        while not ended.wait(ASK_S):
            try:
                if flag.asked():
                    stop.set()
                    return
            except (
                ray.exceptions.RayError
            ):  # the actor is being restarted, or the command is gone and this worker will be
                continue

    thread = threading.Thread(target=listen, name="stop-flag", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        ended.set()
        thread.join()


def run_until_signal(work: Callable[[], Any], flag: StopFlag) -> tuple[Any, int | None]:
    """`work()` in a thread; what it returned, and the signal that was passed on to `flag` meanwhile, if one was.

    Raises what `work` raises, and Interrupted on the second signal.
    """
    outcome: dict[str, Any] = {}
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    def do() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=do, name="training", daemon=True)
    thread.start()
    try:
        passed_on = False
        while thread.is_alive():
            thread.join(0.2)
            if signals and not passed_on:
                passed_on = True
                print(
                    f"{signal.Signals(signals[0]).name}: committing a checkpoint before leaving; once more leaves at once",
                    flush=True,
                )
                flag.ask()
            if len(signals) > 1:
                raise Interrupted(signals[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"], signals[0] if signals else None
