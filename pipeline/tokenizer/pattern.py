"""Moonlight's split pattern, and the byte alphabet in which Hugging Face writes tokens.

The pattern cuts text into pieces before BPE: a run of Han characters; a word with at most one leading
non-letter and an English contraction (upper-case and lower-case halves never contain Han); up to three digits;
punctuation with trailing line ends; line ends; spaces. `&&` is set intersection, which tiktoken's and Oniguruma's
dialects share. Source: `tokenization_moonshot.py` of moonshotai/Moonlight-16B-A3B.
"""

from __future__ import annotations

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte (GPT-2's table): 256 distinct characters, index = byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    table, spare = [], 256
    for byte in range(256):
        if byte in printable:
            table.append(chr(byte))
        else:
            table.append(chr(spare))
            spare += 1
    return table


_TO_CHARACTER = dict(enumerate(byte_alphabet()))
_OUTSIDE = "\uffff"  # no Latin-1 letter
_TO_LATIN_1 = {
    **dict.fromkeys(range(256), _OUTSIDE),
    **{ord(character): chr(byte) for byte, character in _TO_CHARACTER.items()},
}


def to_characters(token: bytes) -> str:
    return token.decode("latin-1").translate(_TO_CHARACTER)


def to_bytes(token: str) -> bytes:
    """Raises KeyError if the token is not written in the byte alphabet."""
    try:
        return token.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError as error:
        raise KeyError(token[error.start]) from None
