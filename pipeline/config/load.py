"""From a preset name, a YAML file or an s3:// object, with `section.key=value` overrides, to a `RunConfig`.

Every mistake is a `ConfigError`: one line with the key's path, what was given and what is allowed.

A file may start from a preset with `preset: debug`. A relative path in a YAML file, on S3 as well, is relative to that file, also one
that it has from its preset, and the storage root if it names none; in a preset that is run as it is and in an override to the
folder one works in.
"""

from __future__ import annotations

import difflib
import json
import re
import site
import sysconfig
from pathlib import Path
from typing import Any

import yaml
from botocore.exceptions import BotoCoreError
from pydantic import ValidationError

from pipeline.config.languages import with_languages
from pipeline.config.outcome import with_preset_tasks
from pipeline.config.places import make_absolute, put_beside
from pipeline.config.rules import with_rules
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.config.shares import with_tokens
from pipeline.config.text import Dumper, TooMuch, parse
from pipeline.reach import check_s3
from pipeline.storage import open_storage

PRESETS = Path(__file__).parent / "presets"


SHOWN = 120  # characters of a wrong value that a message repeats


class ConfigError(ValueError):
    """Wrong configuration; the message is the one line a user needs."""


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(preset_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Load, override, validate. Raises ConfigError."""
    values = _read(preset_or_path, overrides)
    for override in overrides:
        _apply(values, override)
    return validate(values)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """What is relative is relative to the folder one works in; `training.initial_weights` to the storage root."""
    values = config.model_dump(mode="json")
    make_absolute(RunConfig, values, _absolute)
    return validate(values)


def validate(values: dict[str, Any]) -> RunConfig:
    """Validate plain values (as read from YAML or JSON)."""
    try:
        return RunConfig.model_validate_json(
            json.dumps(with_languages(with_rules(with_preset_tasks(with_tokens(_with_text_keys(values))))), default=str)
        )
    except ValidationError as error:
        raise ConfigError("; ".join(dict.fromkeys(_describe(problem) for problem in error.errors()))) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def dump_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back.

    Text outside of ASCII is escaped: PyYAML reads some of it (U+0085, U+FEFF) as line ends or marks where it stands bare.
    """
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)


def expand_path(path: str) -> str:
    """Replace `{stdlib}` and `{site_packages}` by the running Python's folders; make local paths absolute."""
    packages = sysconfig.get_paths()["purelib"] or site.getsitepackages()[0]
    path = path.replace("{stdlib}", sysconfig.get_paths()["stdlib"]).replace("{site_packages}", packages)
    return _absolute(path)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _read(preset_or_path: str, overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    folder = ""
    if preset_or_path.startswith("s3://"):
        path, data = preset_or_path, _read_s3(preset_or_path, overrides)
        folder = path.rpartition("/")[0]
    else:
        file = PRESETS / f"{preset_or_path}.yaml"
        if "/" in preset_or_path or not file.exists():
            file = Path(preset_or_path).expanduser()
            folder = str(file.resolve().parent)
        if not file.is_file():
            raise ConfigError(
                f"--config {preset_or_path}: no such preset or file; presets are {', '.join(preset_names())}"
            )
        try:
            path, data = str(file), file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"--config {preset_or_path}: cannot be read ({error.strerror}); look at its rights"
            ) from None
    try:
        values = parse(data)
    except ValueError as error:
        raise ConfigError(f"--config {path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected a mapping of sections, got {type(values).__name__}")
    values = _over_preset(values, path)
    if folder:
        if isinstance(values.setdefault("storage", {}), dict):
            values["storage"].setdefault("root", StorageConfig().root)
        put_beside(RunConfig, values, folder)
    return values


def _over_preset(values: dict[str, Any], path: str) -> dict[str, Any]:
    """A file may start from a preset (`preset: debug`): what it gives counts, section by section, what it does not is the preset's."""
    if "preset" not in values:
        return values
    name = values.pop("preset")
    if name not in preset_names():
        raise ConfigError(f"--config {path}: preset {name!r} is none of {', '.join(preset_names())}")
    return _merged(parse((PRESETS / f"{name}.yaml").read_bytes()), values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: (below[key], above[key]) for key in below.keys() & above.keys()}
    inner = {key: _merged(*pair) for key, pair in both.items() if all(isinstance(part, dict) for part in pair)}
    return {**below, **above, **inner}


def _read_s3(uri: str, overrides: list[str] | tuple[str, ...]) -> bytes:
    """A configuration in S3 cannot say where S3 is: the endpoint and region come from the overrides."""
    given: dict[str, Any] = {}
    for override in overrides:
        if override.startswith(("storage.endpoint_url=", "storage.region=")):
            _apply(given, override)
    folder, _, name = uri.rpartition("/")
    try:
        where = StorageConfig(root=folder, **given.get("storage", {}))
        check_s3(where)
        return open_storage(where).read(name)
    except (OSError, ValueError, BotoCoreError) as error:
        raise ConfigError(
            f"--config {uri}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `a.b.0.c=value`; the value is YAML, so numbers, lists and null work."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = parse(text)
    except ValueError as error:
        if isinstance(error, TooMuch):
            raise ConfigError(f"{key}: {error}") from None
        value = text
    parts = key.split(".")
    node: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or len(part) > 6 or int(part) >= len(node):
                raise ConfigError(f"{key}: {part!r} is not an index of a list of {len(node)}")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node.pop(
                    {"until": "until_tokens", "until_tokens": "until"}.get(part), None
                )  # one answer, the later one
                node[part] = value
            else:
                node = node.setdefault(part, {})
        else:
            raise ConfigError(f"{key}: {'.'.join(parts[:depth])} is a value, not a section")


def _with_text_keys(node: Any) -> Any:
    """YAML knows keys that are numbers and dates; JSON and the schema know text."""
    if isinstance(node, dict):
        return {str(key): _with_text_keys(value) for key, value in node.items()}
    return [_with_text_keys(value) for value in node] if isinstance(node, list) else node


def _describe(problem: Any) -> str:
    # pydantic puts the member of a union that did not fit into the path: `evaluation.checkpoint.int`
    where = ".".join(str(part) for part in problem["loc"] if not _UNION_MEMBER.fullmatch(str(part)))
    kind, message, given = problem["type"], problem["msg"], problem["input"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(problem['loc'])}"
    if kind == "missing":
        return f"{where}: required, but not given"
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    found = _shown(given)
    found = found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
    return f"{where}: {message[0].lower()}{message[1:]}, got {found}"


def _shown(given: Any) -> str:
    try:
        return repr(given)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"


_UNION_MEMBER = re.compile(r"int|constrained-int|literal\[.*\]")


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
