"""Conditions on a document's fields: `score > 0.5`, `lang == "en"`, `meta.source not in ["a", "b"]`.

A field (quoted where its name holds blanks), an operator, a JSON value. A number is compared with numbers, a text with
texts (dates among them, as ISO 8601 writes them), true and false with themselves. Null, and NaN, meet no condition but
`== null` and, NaN, `!= null`. Anything else is a mistake in the condition or in the data, and raises TypeError.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

_PARTS = re.compile(r'\s*("(?:[^"\\]|\\.)+"|[^\s"=!<>]+)\s*(==|!=|<=|>=|<|>|not\s+in\b|in\b)\s*(.+?)\s*', re.DOTALL)
_BARE = re.compile(r'[^\s"=!<>]+')
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    field: str
    operator: str
    value: Any  # a tuple for `in` and `not in`

    @property
    def name(self) -> str:
        """As it is written, in one way: what is counted under."""
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        field = self.field if _BARE.fullmatch(self.field) else json.dumps(self.field, ensure_ascii=False)
        return f"{field} {self.operator} {json.dumps(value, ensure_ascii=False)}"

    @property
    def kind(self) -> str:
        """null, boolean, number or text."""
        return _kind(self.value[0] if isinstance(self.value, tuple) else self.value)

    def holds(self, value: Any) -> bool:
        """Raises TypeError where the value is of another kind than the condition's."""
        if self.value is None:
            return (value is None) == (self.operator == "==")
        if value is None:
            return False
        if _kind(value) != self.kind:
            raise TypeError(f"{self.name}: the field holds {value!r}, which is no {self.kind}")
        if isinstance(value, float | Decimal) and math.isnan(value):
            return False
        if isinstance(self.value, tuple):
            return (value in self.value) == (self.operator == "in")
        return _COMPARE[self.operator](value, self.value)


def parse(text: str) -> Condition:
    """Raises ValueError, in words for whoever wrote it."""
    parts = _PARTS.fullmatch(text)
    if parts is None:
        raise ValueError(
            f'{text!r} is no condition: write a field, one of == != < <= > >= in "not in", and a JSON value, as in \'lang == "en"\''
        )
    name, compared, written = parts.groups()
    compared = " ".join(compared.split())
    try:
        value = json.loads(written, parse_constant=_refuse)
    except ValueError:
        raise ValueError(f"{text!r}: {written} is no JSON value; text stands in double quotes") from None
    if name.startswith('"'):
        name = json.loads(name)
    if compared.endswith("in"):
        kinds = {_kind(one) for one in value} if isinstance(value, list) else set()
        if len(kinds) != 1 or kinds & {"null", "other"}:
            raise ValueError(f"{text!r}: `{compared}` takes a list of texts or of numbers")
        return Condition(name, compared, tuple(value))
    kind = _kind(value)
    if kind == "other" or (kind in ("null", "boolean") and compared not in ("==", "!=")):
        raise ValueError(f"{text!r}: {compared} does not compare with {written}")
    return Condition(name, compared, value)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float | Decimal):
        return "number"
    return "text" if isinstance(value, str) else "other"
