"""Strict validation of custom resources by the schemas taken from their CRDs.

What the pinned releases' CRDs say is kept in crd_facts.json. `MOONLIGHT_CRD_SCHEMAS` names a folder of `<group>_<version>_<Kind>.json` files to use
instead, e.g. another release's (`python -m tests.k8s.fetch_crds FOLDER` makes one, see crds.lock.json).

A CRD schema is OpenAPI, not JSON schema: objects are closed (the API server prunes or, strictly, refuses unknown fields) unless
they preserve unknown fields, `nullable` and int-or-string are keywords of their own, and defaults are applied before validation.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import jsonschema

from tests.k8s import crd_facts

FOLDER = os.environ.get("MOONLIGHT_CRD_SCHEMAS")


@functools.cache
def schema_of(api_version: str, kind: str) -> dict[str, Any] | None:
    """The CRD's openAPIV3Schema, not to be changed, or None for a kind that is not there."""
    name = f"{api_version.replace('/', '_')}_{kind}"
    if not FOLDER:
        return crd_facts.kept().get(name)
    path = Path(FOLDER) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


@functools.cache
def _validator(api_version: str, kind: str) -> tuple[dict[str, Any], jsonschema.Validator] | None:
    stored = schema_of(api_version, kind)
    if stored is None:
        return None
    return stored, jsonschema.Draft7Validator(_strict(copy.deepcopy(stored), top=True))


def problems(manifest: dict[str, Any]) -> list[str]:
    """What a strict API server would say of this object; LookupError if its kind is unknown."""
    found = _validator(manifest["apiVersion"], manifest["kind"])
    if found is None:
        raise LookupError(f"no CRD schema for {manifest['apiVersion']} {manifest['kind']}")
    stored, validator = found
    defaulted = with_defaults(stored, manifest)
    return [
        f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message[:200]}"
        for error in validator.iter_errors(defaulted)
    ]


def with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """The value with the schema's defaults filled in and nulls pruned, as the API server stores it."""
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
        filled = {}
        for key, item in value.items():
            below = properties.get(key, extra if isinstance(extra, dict) else {})
            if item is None and not below.get("nullable"):
                continue
            filled[key] = with_defaults(below, item)
        for key, below in properties.items():
            if key not in filled and "default" in below:
                filled[key] = copy.deepcopy(below["default"])
        return filled
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    return value


def _strict(schema: Any, top: bool = False) -> Any:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {
        key: _strict(value) if key not in ("default", "enum", "x-kubernetes-validations") else value
        for key, value in schema.items()
    }
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["type"] = ["integer", "string"]
    if "(?i)" in str(schema.get("pattern", "")):  # Go allows the flag anywhere, Python only at the start
        schema["pattern"] = "(?i)" + schema["pattern"].replace("(?i)", "")
    if top:
        schema["properties"] |= {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
        }
    preserves = schema.pop("x-kubernetes-preserve-unknown-fields", False)
    embedded = schema.pop("x-kubernetes-embedded-resource", False)
    if (
        isinstance(schema.get("properties"), dict)
        and "additionalProperties" not in schema
        and not preserves
        and not embedded
    ):
        schema["additionalProperties"] = False
    if schema.pop("nullable", False) and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema
