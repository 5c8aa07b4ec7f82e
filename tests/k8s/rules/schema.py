"""Strict schemas of core kinds (two Kubernetes versions) and of custom resources, and the CEL rules inside the CRDs."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import celpy
import kubernetes_validate
import re2

from tests.k8s import crds
from tests.k8s.manifests import Manifest, canonical, is_custom, label

VERSIONS = ("1.34", "1.36")


def check(objects: list[Manifest]) -> list[str]:
    return [f"{label(item)}: {problem}" for item in objects for problem in _object(canonical(item))]


@functools.lru_cache(maxsize=4096)
def _object(text: str) -> tuple[str, ...]:
    item = json.loads(text)
    if is_custom(item):
        return (*crds.problems(item), *cel_problems(item))
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"Kubernetes {version}: {error}")
        except kubernetes_validate.SchemaNotFoundError:
            found.append(f"Kubernetes {version}: no {item['apiVersion']} {item['kind']}")
    return tuple(found)


def _split(text: Any, separator: Any) -> Any:
    return celpy.celtypes.ListType([celpy.celtypes.StringType(part) for part in str(text).split(str(separator))])


def _find(text: Any, pattern: Any) -> Any:
    found = re2.search(str(pattern), str(text))
    return celpy.celtypes.StringType(found.group() if found else "")


FUNCTIONS = {"split": _split, "find": _find}  # Kubernetes' additions to CEL that the CRDs use and cel-python lacks


# -- CEL inside CRDs -----------------------------------------------------------------------------------------------


def cel_problems(item: Manifest) -> list[str]:
    """Evaluate x-kubernetes-validations wherever the object has a value. Transition rules (oldSelf) do not apply to a create."""
    stored = crds.schema_of(item["apiVersion"], item["kind"])
    if stored is None:
        return []
    found = []
    for path, rule, value in _rules(stored, crds.with_defaults(stored, item), ""):
        if not bool(_program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)})):
            found.append(f"{path or '.'}: {rule.get('message', '')} ({rule['rule']})")
    return found


def evaluated_rules(item: Manifest) -> int:
    """How many CEL rules an object was held against: a check that checks nothing must not look like one."""
    stored = crds.schema_of(item["apiVersion"], item["kind"]) or {}
    return sum(1 for _ in _rules(stored, crds.with_defaults(stored, item), ""))


def _rules(schema: dict[str, Any], value: Any, path: str) -> Iterator[tuple[str, dict[str, str], Any]]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"]:
            yield path, rule, value
    if isinstance(value, dict):
        extra = schema.get("additionalProperties")
        for key, below in value.items():
            inner = schema.get("properties", {}).get(key, extra)
            if isinstance(inner, dict):
                yield from _rules(inner, below, f"{path}.{key}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, below in enumerate(value):
            yield from _rules(schema["items"], below, f"{path}[{index}]")


@functools.cache
def _program(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression), functions=FUNCTIONS)
