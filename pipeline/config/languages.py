"""A source that is mixed by language: `languages: {en: 3, de: 1}` makes a source of each, `web-en` and `web-de`.

Each keeps its language and has its share of the source's weight, so stages of the mixture, epochs, counts and held-out documents are by language
like those of any source. The files are read once for each language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def with_languages(values: dict[str, Any]) -> dict[str, Any]:
    """A run's plain values, with rules handed down (rules.py), every such source replaced by those of its languages. Raises ValueError."""
    corpus = values.get("corpus")
    if not isinstance(corpus, dict) or not isinstance(corpus.get("sources"), list):
        return values
    sources = [each for index, source in enumerate(corpus["sources"]) for each in _of_languages(source, index)]
    return {**values, "corpus": {**corpus, "sources": sources}}


def _of_languages(source: Any, index: int) -> list[Any]:
    if not isinstance(source, dict) or "languages" not in source:
        return [source]
    where, shares = f"corpus.sources.{index}.languages", source["languages"]
    if not isinstance(shares, dict) or not shares or not all(_is_share(share) for share in shares.values()):
        raise ValueError(f"{where}: give each language its share, a number over 0: {{en: 3, de: 1}}")
    if source.get("conversations"):
        raise ValueError(f"{where}: conversations are true, and have no rules; name a source for each language")
    rules = source.get("rules") or {}
    rule = rules.get("languages", {}) if isinstance(rules, dict) else {}
    if rule is None or (isinstance(rule, dict) and rule.get("keep")):
        said = "false" if rule is None else f"{{keep: {rule['keep']}}}"
        raise ValueError(
            f"{where} and rules.languages: {said} contradict: leave the latter out, the former keeps its languages"
        )
    weight, total = source.get("weight", 1.0), sum(shares.values())
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        return [{name: value for name, value in source.items() if name != "languages"}]  # refused by its own name
    made = []
    for code, share in shares.items():
        own = {**rules, "languages": {**rule, "keep": [str(code)]}} if isinstance(rule, dict) else rules
        named = {"name": f"{source.get('name')}-{code}", "weight": weight * share / total, "rules": own}
        made.append({name: value for name, value in {**source, **named}.items() if name != "languages"})
    return made


def is_of_one(name: str, keep: Sequence[str]) -> bool:
    """Whether a source is one of these, by its name and what its rule keeps."""
    return len(keep) == 1 and name.endswith(f"-{keep[0]}")


def _is_share(share: Any) -> bool:
    return isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < float("inf")
