"""Which settings are places: found by their type in the schema, so that one which is added later is treated like all others."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pipeline.config.section import Section
from pipeline.config.values import Place


@dataclass(frozen=True)
class Setting:
    """One place among plain values, as YAML and JSON have them."""

    section: dict[str, Any]
    key: str
    kind: Place

    @property
    def path(self) -> Any:
        return self.section[self.key]

    @property
    def is_relative(self) -> bool:
        """To whatever names it: no URI, no home, nothing that stands for a folder of the running Python."""
        path = self.path
        return isinstance(path, str) and bool(path.strip()) and ":/" not in path and path[0] not in "/~{$"


def places(schema: type[Section], values: Any) -> Iterator[Setting]:
    """Those that are given. What is wrong otherwise is left to the schema."""
    if not isinstance(values, dict):
        return
    for name, field in schema.model_fields.items():
        if values.get(name) is None:
            continue
        kind = _first([*field.metadata, field.annotation], Place)
        inner = _inner(field.annotation)
        if kind is not None:
            yield Setting(values, name, kind)
        elif inner is not None:
            given = values[name]
            for each in given if isinstance(given, list | tuple) else [given]:
                yield from places(inner, each)


def put_beside(schema: type[Section], values: dict[str, Any], folder: str) -> None:
    """Make what is relative in a file absolute: relative to the file's folder, a path or s3:// URI."""
    for place in places(schema, values):
        if place.is_relative and not place.kind.below_root:
            scheme, separator, path = folder.rpartition("://")
            place.section[place.key] = scheme + separator + posixpath.normpath(posixpath.join(path, place.path))


def make_absolute(schema: type[Section], values: dict[str, Any], expand: Callable[[str], str]) -> None:
    """Stages run in other folders. What stands for a folder of the Python that runs them stays, and what is below the storage root."""
    for place in places(schema, values):
        if not place.path.startswith("{") and not (place.kind.below_root and place.is_relative):
            place.section[place.key] = expand(place.path)


def _first(parts: list[Any], wanted: type[Place]) -> Place | None:
    for part in parts:
        if isinstance(part, wanted):
            return part
        found = _first([*getattr(part, "__metadata__", ()), *get_args(part)], wanted)
        if found is not None:
            return found
    return None


def _inner(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part)) is not None), None)
