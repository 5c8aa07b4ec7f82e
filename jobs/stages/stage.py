"""What a room of this package answers. A stage is a function from the records before it and its configuration to one record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from jobs.stages.records import Records
from pipeline.config.schema import RunConfig
from pipeline.manifest import Record
from pipeline.storage import Storage
from pipeline.workflow.record import StageProgress


class Stage(Protocol):
    """A module with these names is a stage: it is one once `jobs.stages.STAGES` lists it."""

    NAME: str
    SUMMARY: str  # its line in `--help`
    GAUGES: dict[str, str]  # what Prometheus sees of it: names (without `ray_moonlight_`) and what they mean

    def find(self, config: RunConfig, storage: Storage, records: Records) -> Record | None:
        """Is it done? Its record, if it is there and was made from exactly this configuration and the records before it.

        Raises ConfigError where what is there cannot be used with this configuration.
        """

    def check(self, config: RunConfig, storage: Storage, records: Records, *, here: bool) -> None:
        """What can be wrong before it, as far as the records before it are there. Starts nothing and writes nothing.

        `here=False` where another machine does the work: it may reach what this one does not. Raises ConfigError.
        """

    def do(self, config: RunConfig, storage: Storage, records: Records, report: Callable[[Any], None]) -> None:
        """Do it on the connected Ray cluster; `report` goes to where the work is done. The stages before it are done."""

    def progress(self) -> Callable[[Any], StageProgress]:
        """How does its progress read? A fresh function for what `do` reports; picklable."""
