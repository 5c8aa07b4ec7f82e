#!/usr/bin/env bash
# Version: pydantic==2.14.3
# Behaviour: `model_validate_json` in strict mode takes a JSON array for a tuple, a string for an enum, ... ("JSON mode"). A
#   `model_validator(mode="before")` on the model, or on a model inside it, ends that below itself even if it returns its input
#   untouched: what it returns is validated as Python objects, so the same JSON is refused ("Input should be a valid tuple"). A strict schema
#   that gets such a validator stops reading every file with a list in that section. What fills values in must work on the plain
#   values before validation instead.
# Seen: pydantic 2.14.3: "without: (1, 2)", "with: tuple_type", "field validator: (1, 2)"
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"; "$folder/venv/bin/pip" -q install pydantic==2.14.3
"$folder/venv/bin/python" - <<'PYTHON' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
from typing import Any
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator


class Without(BaseModel):
    model_config = ConfigDict(strict=True)
    values: tuple[int, ...]


class With(Without):
    @model_validator(mode="before")
    @classmethod
    def untouched(cls, data: Any) -> Any:
        return data


class Field(Without):
    @field_validator("values", mode="after")
    @classmethod
    def untouched(cls, data: Any) -> Any:
        return data


def read(model: type[BaseModel]) -> str:
    try:
        return str(model.model_validate_json('{"values": [1, 2]}').values)
    except ValidationError as error:
        return error.errors()[0]["type"]


found = {"without": read(Without), "with": read(With), "field validator": read(Field)}
for name, answer in found.items():
    print(f"{name}: {answer}")
assert found == {"without": "(1, 2)", "with": "tuple_type", "field validator": "(1, 2)"}, found
PYTHON
