"""Personal data by rules: mail and IP addresses, telephone and card numbers are replaced by stated placeholders.

Rules find what has the form; they know no names and no streets. What is an address is decided by `ipaddress` (public ranges alone:
127.0.0.1, 10.0.0.1 and version numbers such as 1.2.3 stay), what is a card number by its length and Luhn's check. Telephone
numbers are those with + and a country's number (7 to 15 digits, E.164), and North American ones that are written with separators.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator

from pipeline.config.rules import PersonalData

_DOMAIN = re.compile(r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,63}(?![A-Za-z0-9@-])")
_LOCAL_PART = re.compile(r"[A-Za-z0-9_+](?:[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{0,62}[A-Za-z0-9_+-])?\Z")
_RUN = re.compile(r"[0-9][0-9 ().-]{5,}[0-9]")  # what may hold a number; searched for first, as most text holds none
_NUMBER = re.compile(
    r"(?<![0-9A-Za-z_.])(?:"
    r"(?P<ip_address>[0-9]{1,3}(?:\.[0-9]{1,3}){3})"
    r"|(?P<card_number>[2-6][0-9]{3}(?:([ -]?)[0-9]{4}\3[0-9]{4}\3[0-9]{1,7}|([ -]?)[0-9]{6}\4[0-9]{5}))"
    r"|(?P<phone_number>\+[1-9](?:[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]){6,14}"
    r"|(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4})"
    r")(?![0-9A-Za-z_]|[.-][0-9])"
)
_IPV6_TAIL = re.compile(r":{1,2}[0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){1,6}(?![0-9A-Za-z:]|\.[0-9])")
_IPV6_HEAD = re.compile(r"(?<![0-9A-Za-z:.])[0-9A-Fa-f]{1,4}\Z")


def replaced(text: str, settings: PersonalData) -> tuple[str, Counter[str]]:
    """The text with placeholders, and how many of each kind there are in it."""
    spans = [span for span in _found(text) if getattr(settings, span[2]) is not None]
    if not spans:
        return text, Counter()
    parts, here = list[str](), 0
    counts: Counter[str] = Counter()
    for start, stop, kind in sorted(spans):
        if start >= here:
            parts += [text[here:start], getattr(settings, kind)]
            here = stop
            counts[kind] += 1
    return "".join([*parts, text[here:]]), counts


def _found(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, stop, kind); of two that overlap the first one counts."""
    for domain in _DOMAIN.finditer(text):
        at = domain.start()
        local = _LOCAL_PART.search(text, max(0, at - 64), at)
        if local:
            yield local.start(), domain.end(), "email"
    for run in _RUN.finditer(text):  # + and ( may stand before it; what follows it decides whether it ends there
        for number in _NUMBER.finditer(text, max(0, run.start() - 2), run.end() + 2):
            kind, value = number.lastgroup, number.group()
            assert kind is not None
            if (kind != "card_number" or luhn(value)) and (kind != "ip_address" or is_public(value)):
                yield *number.span(), kind
    for tail in _IPV6_TAIL.finditer(text):
        head = _IPV6_HEAD.search(text, max(0, tail.start() - 5), tail.start())
        if head and is_public(text[head.start() : tail.end()]):
            yield head.start(), tail.end(), "ip_address"


def is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def luhn(number: str) -> bool:
    """ISO/IEC 7812-1, annex B: every second digit from the right is doubled; the digits of all add up to a multiple of ten."""
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0
