"""YAML as this project reads and writes it: 1.1 with repairs.

`1e-4` is a number (1.1 reads text; quoted it stays text), and one that is whole, like `1e6`, an integer. A key given twice is an
error (the last one would win in silence). Aliases that grow without bound are refused: nine lines can stand for a billion
values. `Dumper` writes by the same rules, so what it writes reads back as it was.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_VALUES = 100_000


class TooMuch(ValueError):
    """More than a configuration can mean."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float | int:
        value: float = super().construct_yaml_float(node)
        whole = _EXPONENT.fullmatch(node.value) and abs(value) < 2**53 and value.is_integer()
        return int(value) if whole else value


class Dumper(yaml.SafeDumper):
    pass


_EXPONENT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
for _rules in (_Loader, Dumper):
    _rules.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("+-.0123456789"))


def parse(data: bytes | str) -> Any:
    """The value. Raises ValueError with one line; TooMuch for what would take all memory or time."""
    try:
        loader = _Loader(data)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise TooMuch(f"more than {MOST_VALUES:,} values, most likely by aliases of aliases; write it out")
        return loader.construct_document(node)
    except RecursionError:
        raise TooMuch("lists or mappings nested hundreds deep; write it flat") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except ValueError as error:
        if isinstance(error, TooMuch):
            raise
        raise TooMuch(f"a value that cannot be ({' '.join(str(error).split())[:100]}); correct it") from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values it stands for, every alias written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise TooMuch("an alias that holds itself; write it out")
        return known[id(node)]
    known[id(node)] = 0  # being counted
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for pair in inner for part in (pair if isinstance(pair, tuple) else (pair,))]
    known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]
