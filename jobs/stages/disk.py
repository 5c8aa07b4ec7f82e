"""Is there room for what a stage will write? A full disk is found in weeks otherwise. Of a folder; nobody knows how large a bucket may grow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.config.load import ConfigError
from pipeline.storage import Storage


def check_room(
    storage: Storage, wanted: int, what: str, remedy: str, written: Callable[[], float] = lambda: 0.0
) -> None:
    """Raises ConfigError if the folder's disk has fewer bytes free. `written`: what share of them an earlier try has written,
    asked where all of them do not fit."""
    if storage.config.is_s3:
        return
    folder = next(parent for parent in (Path(storage.root), *Path(storage.root).parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < wanted and free < (wanted := round(wanted * (1.0 - written()))):
        raise ConfigError(
            f"storage.root: {storage.root} has {free / 1e9:,.1f} GB free, and {what} want about {wanted / 1e9:,.1f}; "
            f"{remedy} or choose another folder"
        )
