"""Classifiers in Ray actors of their own: as many for each function as `cluster.classifier_actors` says, on GPUs if it wants them.

The tasks that read units hold handles of the actors and hand them batches in turn, which waits for no CPU: a task that waits gives its own
back. An actor that dies is started again, wherever there is room, and its batches are sent again (a function of the texts alone, so the
scores are the same); a batch that lets it die TRIES times is at fault itself. Actors end with the stage, or with the driver.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.rules.classifier import Scores, called
from pipeline.config.classifier import Classifier
from pipeline.config.schema import RunConfig

TRIES = 6  # of a batch, each in a process that died


class ClassifierActor:
    """Of one function; Ray makes it an actor."""

    def score(self, settings: Classifier, texts: Sequence[str]) -> Scores | str:
        return called(settings, texts)


class Actors:
    """A `Call` that may be sent to tasks."""

    def __init__(self, handles: dict[str, list[Any]]) -> None:
        self._handles = handles  # by function

    def __call__(self, settings: Classifier, batches: Sequence[Sequence[str]]) -> list[Scores | str]:
        import ray
        from ray.exceptions import RayActorError

        handles = self._handles[settings.function]
        first = random.randrange(len(handles))  # tasks that begin together begin at different ones
        asked = [
            handles[(first + place) % len(handles)].score.remote(settings, batch) for place, batch in enumerate(batches)
        ]
        try:
            return list(ray.get(asked))
        except RayActorError as error:
            why = " ".join(str(error).split())[:200]
            return [
                f"kills its process: {TRIES} times over the same texts; mend it, or lower batch_size if memory was short ({why})"
            ] * len(batches)


@contextlib.contextmanager
def classifier_actors(config: RunConfig) -> Iterator[Actors]:
    """Those of all sources, on an initialised Ray."""
    wanted = sorted({source.rules.classifier.function for source in config.corpus.sources if source.rules.classifier})
    if not wanted:
        yield Actors({})
        return
    import ray

    cluster = config.cluster
    remote = ray.remote(ClassifierActor).options(
        num_cpus=cluster.classifier_cpus,
        num_gpus=cluster.classifier_gpus,
        max_restarts=-1,
        max_task_retries=TRIES - 1,
    )
    handles: dict[str, list[Any]] = {
        function: [remote.remote() for _ in range(cluster.classifier_actors)] for function in wanted
    }
    try:
        yield Actors(handles)
    finally:
        for handle in (handle for each in handles.values() for handle in each):
            ray.kill(handle)
