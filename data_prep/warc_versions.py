"""What makes text of web pages (readers/warc.py): part of what a unit's bytes depend on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from pipeline.config.load import ConfigError

VERSION = 1  # of readers/warc.py; changed with what it makes of a page
PACKAGES = ("warcio", "resiliparse")
NEEDS = f"needs {' and '.join(PACKAGES)}; pip install 'moonlight-pipeline[warc]'"


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def versions() -> dict[str, Any]:
    """Raises ConfigError where the extra is not installed: a dataset's name, which every command begins with, has them in it."""
    if not is_installed():
        raise ConfigError(f"corpus.sources[].format: warc {NEEDS}")
    return {"version": VERSION, "resiliparse": importlib.metadata.version("resiliparse")}
