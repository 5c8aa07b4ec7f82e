"""Personal data: what has the form is replaced, what only looks like it stays."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.rules.personal_data import luhn, replaced
from pipeline.config.rules import PersonalData


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to bob.smith+list@mail.example.co.uk.", "Write to [EMAIL]."),
        ("<a@b.org>, c_d@e-f.com", "<[EMAIL]>, [EMAIL]"),
        ("@decorator user@host a@b@c.org x@y.z1", "@decorator user@host a@[EMAIL] x@y.z1"),
        ("at 8.8.8.8, not 127.0.0.1, 10.1.2.3, 192.168.0.1 or 999.1.1.1", "at [IP_ADDRESS], not 127.0.0.1, 10.1.2.3, 192.168.0.1 or 999.1.1.1"),
        ("version 1.2.3 and 1.2.3.4.5", "version 1.2.3 and 1.2.3.4.5"),
        ("2001:4860:4860::8888 at 12:30:45, std::vector", "[IP_ADDRESS] at 12:30:45, std::vector"),
        ("+44 20 7946 0958, (212) 555-0123", "[PHONE_NUMBER], [PHONE_NUMBER]"),
        ("212-555-0123 or 1-800-555-0199 on 2024-01-15", "[PHONE_NUMBER] or [PHONE_NUMBER] on 2024-01-15"),
        ("4111 1111 1111 1111, 4111111111111112, 3782 822463 10005", "[CARD_NUMBER], 4111111111111112, [CARD_NUMBER]"),
        ("5500-0000-0000-0004 is one, 0000 0000 0000 0000 none", "[CARD_NUMBER] is one, 0000 0000 0000 0000 none"),
        ("1,000,000 and 3.14159265358979", "1,000,000 and 3.14159265358979"),
    ],
)  # fmt: skip
def test_forms(text: str, expected: str) -> None:
    found, counts = replaced(text, PersonalData())
    assert found == expected
    assert counts.total() == expected.count("[")


def test_placeholders_and_what_is_left_alone() -> None:
    settings = PersonalData(email="someone@example.com", ip_address=None)
    found, counts = replaced("a@b.org from 8.8.8.8", settings)
    assert (found, dict(counts)) == ("someone@example.com from 8.8.8.8", {"email": 1})


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789 +-().:@ab", max_size=60))
def test_what_was_replaced_is_not_found_again(text: str) -> None:
    found, counts = replaced(text, PersonalData())
    assert replaced(found, PersonalData())[0] == found
    assert (found == text) == (not counts)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789", min_size=12, max_size=18))
def test_one_check_digit_satisfies_luhn(number: str) -> None:
    assert sum(luhn(number + digit) for digit in "0123456789") == 1
