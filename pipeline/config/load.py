"""From a preset name or a YAML path, with `section.key=value` overrides, to a `RunConfig`.

Every mistake is a `ConfigError`: one line with the key's path, what was given and what is allowed.
"""

from __future__ import annotations

import difflib
import site
import sysconfig
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.schema import RunConfig

PRESETS = Path(__file__).parent / "presets"


class ConfigError(ValueError):
    """Wrong configuration; the message is the one line a user needs."""


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(preset_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Load, override, validate. Raises ConfigError."""
    values = _read(preset_or_path)
    for override in overrides:
        _apply(values, override)
    return validate(values)


def validate(values: dict[str, Any]) -> RunConfig:
    """Validate plain values (as read from YAML or JSON)."""
    try:
        return RunConfig.model_validate_json(_json(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(problem) for problem in error.errors())) from None


def dump_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def expand_path(path: str) -> str:
    """Replace `{stdlib}` and `{site_packages}` by the running Python's folders; make local paths absolute."""
    packages = sysconfig.get_paths()["purelib"] or site.getsitepackages()[0]
    path = path.replace("{stdlib}", sysconfig.get_paths()["stdlib"]).replace("{site_packages}", packages)
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _read(preset_or_path: str) -> dict[str, Any]:
    path = PRESETS / f"{preset_or_path}.yaml"
    if not path.exists():
        path = Path(preset_or_path)
        if not path.is_file():
            raise ConfigError(
                f"--config {preset_or_path}: no such preset or file; presets are {', '.join(preset_names())}"
            )
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected a mapping of sections, got {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `a.b.0.c=value`; the value is YAML, so numbers, lists and null work."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        value = _number(value)
    parts = key.split(".")
    node: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{key}: {part!r} is not an index of a list of {len(node)}")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                node = node.setdefault(part, {})
        else:
            raise ConfigError(f"{key}: {'.'.join(parts[:depth])} is a value, not a section")


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-4 as text; users mean a number."""
    try:
        return float(text) if any(c in text for c in "eE.") and text[0] in "+-.0123456789" else text
    except ValueError:
        return text


def _json(values: dict[str, Any]) -> str:
    import json

    def numbers(node: Any) -> Any:
        if isinstance(node, dict):
            return {str(key): numbers(value) for key, value in node.items()}
        if isinstance(node, list):
            return [numbers(value) for value in node]
        return _number(node) if isinstance(node, str) and node else node

    return json.dumps(numbers(values), default=str)


def _describe(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    kind, message, given = problem["type"], problem["msg"], problem["input"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(problem['loc'])}"
    if kind == "missing":
        return f"{where}: required, but not given"
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, got {given!r}"


def _suggestion(location: tuple[Any, ...]) -> str:
    """The nearest allowed key of the section, if any is near."""
    section: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        section = _section_class(field.annotation) if field else None
        if section is None:
            return ""
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed are {', '.join(names)}"


def _section_class(annotation: Any) -> Any:
    if hasattr(annotation, "model_fields"):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_class(inner)
        if found is not None:
            return found
    return None
