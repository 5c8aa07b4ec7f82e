"""How a driver ends before its time."""

from __future__ import annotations

HELD = 3  # exit code: the run is somebody else's just now
CLOSED = 4  # a gate is closed: the model is not good enough to be published


class StageFailure(Exception):
    """A stage did not succeed; `exit_code` is the pipeline's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
