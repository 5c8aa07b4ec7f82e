"""What makes text of web pages (readers/warc.py): part of what a unit's bytes depend on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

VERSION = 1  # of readers/warc.py; changed with what it makes of a page
PACKAGES = ("warcio", "resiliparse")


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def versions() -> dict[str, Any]:
    """Raises PackageNotFoundError where the extra is not installed, which rules/check.py has said before."""
    return {"version": VERSION, "resiliparse": importlib.metadata.version("resiliparse")}
