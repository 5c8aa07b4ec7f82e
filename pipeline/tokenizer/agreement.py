"""Which engines may encode for a tokenizer: those that give the reference's ids on a corpus of seams.

The corpus is made for the tokenizer at hand: the text of every token of its vocabulary, every added token in every
neighbourhood, what splits, normalizers and prefixes are about (spaces, line ends, digits, contractions, composed and
decomposed letters, scripts without spaces, long runs), letters that not every Unicode table has, and seeded mixtures of all
of these. It says nothing about documents it does not hold, so units check a sample of theirs, too (data_prep/tokenize_unit.py).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.tokenizer.engines import FAST, OTHER_TABLES, REFERENCE, Engine, engine, is_failure
from pipeline.tokenizer.files import TOKENIZER_JSON
from pipeline.tokenizer.given import token_bytes
from pipeline.tokenizer.newer_letters import RANGES, holds_newer_letters

SEAMS = (
    "", " ", "  ", "   a", " a  b   c    d     e      f", "\n", "\n\n", "\r\n\r\n", " \n \n", "\t\tx\t", "a\n\n  b \n c", "x \r\n y",
    "\u00a0a\u2003b\u3000c", "\u200bzero\ufeffwidth", "\x00\x01\x7f\x85",
    "don't DON'T we'LL  x's 'tis o'clock I'm'VE", "it’s ’Twas", "1234567890 12 345 6,789.01 ١٢٣٤٥ ²³ Ⅷ ½", "a1b22c333d4444",
    "x=1;y==2//z->w::v!=u", "://www.a-b_c.de/?q=1&r=%20#s", "camelCase PascalCase snake_case SCREAMING_CASE iOS McX", "...!!!???---___###",
    "漢字とかな混じり文 mixed中文text中文。「引用」、", "한국어 텍스트", "สวัสดีครับ", "नमस्ते दुनिया", "مرحبا بالعالم", "שלום", "Ελληνικά", "Русский",
    "naïve façade Ünïcödé Straße ŉ ǆ İi ﬁ ﬀ", "nai\u0308ve cafe\u0301 e\u0301\u0323 \u1e0b\u0323 q\u0307\u0323", "\u1100\u1161\u11a8 각 \uac00\u11a8",
    "ＡＢＣ　１２３ ｶﾞ ㌔ ℡ ™ ① Å Å Ω", "\u2126\u212a\u212b \u0958 \u2adc", "👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 ✨🇩🇪", "𝕳𝖊𝖑𝖑𝖔 𠀀𪜀 𐍈",
    "a" * 300, " " * 300, "=" * 120 + "\n" * 50, "ab" * 200, "\u0301" * 40, "<s></s><unk>[INST]<|im_start|><|endoftext|>", "Ġ Ċ ▁ ##x </w> <0x0A>",
)  # fmt: skip
AROUND = ("{}", "a{}b", " {} ", "  {}  ", "\n{}\n", "{}{}", "1{}2", ".{}!", "é{}漢", "a {} b", "_{}", "{}\u0301")
MIXTURES = 1500


@dataclass(frozen=True)
class Agreement:
    engines: tuple[str, ...]  # of documents, and of documents with newer letters if that is another one
    bytes_per_second: float  # of the first, per CPU-second, on the seams: a rough figure
    reasons: tuple[str, ...]  # why an engine before the first one cannot be used


def find_engines(files: dict[str, bytes]) -> Agreement:
    """The fastest engine that agrees with the reference, and one with the reference's Unicode tables if it has others.

    Raises ValueError for a tokenizer with which the reference fails.
    """
    plain, newer = seams(files)
    reference = engine(REFERENCE, files)
    try:
        expected, expected_newer = reference.encode(plain), reference.encode(newer)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ValueError(
            f"{TOKENIZER_JSON}: with its added_tokens Hugging Face's tokenizers fails on some texts ({error}); take lstrip and "
            "rstrip from tokens that may stand side by side"
        ) from None
    agree: dict[str, Engine] = {}
    reasons: list[str] = []
    for name in FAST:
        problem, built = _difference(name, files, plain, expected)
        if built is None:
            reasons.append(f"{name} {problem}")
        else:
            agree[name] = built
    agree[REFERENCE] = reference
    first = next(iter(agree))
    everywhere = next(
        name for name, built in agree.items() if name not in OTHER_TABLES and _same(built.encode(newer), expected_newer)
    )
    start = time.process_time()
    agree[first].encode(plain)
    rate = sum(map(len, plain)) / max(time.process_time() - start, 1e-6)
    faster = FAST.index(first) if first in FAST else len(FAST)
    return Agreement(tuple(dict.fromkeys([first, everywhere])), rate, tuple(reasons[:faster]))


def seams(files: dict[str, bytes]) -> tuple[list[bytes], list[bytes]]:
    """Documents without and with newer letters."""
    document = json.loads(files[TOKENIZER_JSON])
    added = [token["content"] for token in document["added_tokens"]]
    table = token_bytes(document)
    vocabulary = [table[token_id].decode(errors="replace") for token_id in sorted(document["model"]["vocab"].values())]
    pick = random.Random(0)
    shuffled = pick.sample(vocabulary, len(vocabulary))
    texts = list(SEAMS)
    texts += [around.replace("{}", token) for token in added for around in AROUND]
    texts += ["".join(added), " ".join(added)]
    texts += ["\n".join(vocabulary[start : start + 64]) for start in range(0, len(vocabulary), 64)]
    texts += ["".join(shuffled[start : start + 64]) for start in range(0, len(shuffled), 64)]
    pieces = [
        *SEAMS[1:-8],
        *(added * (1 + len(SEAMS) // (len(added) + 1))),
        *shuffled[: 4 * len(SEAMS)],
        " ",
        "  ",
        "\n",
    ]
    texts += ["".join(pick.choices(pieces, k=pick.randint(2, 12))) for _ in range(MIXTURES)]
    edges = sorted({point for pair in RANGES for point in pair})
    newer = [
        text.replace("{}", chr(point))
        for point in edges
        for text in ("a{}b A{}B 1{}1 {}. '{} \n{}\n  {}{} {}\u0334\u0301", "{}")
    ]
    newer += [chr(point).join(pick.choices(pieces, k=3)) for point in edges]
    documents = [text.encode() for text in texts]
    late = holds_newer_letters(documents)
    plain = [text for text, is_late in zip(documents, late) if not is_late]
    return plain, [text for text, is_late in zip(documents, late) if is_late] + [text.encode() for text in newer]


def _difference(
    name: str, files: dict[str, bytes], documents: Sequence[bytes], expected: tuple[np.ndarray, np.ndarray]
) -> tuple[str, Engine | None]:
    """Why this engine cannot be used, or "" and the engine."""
    try:
        built = engine(name, files)
        ids, offsets = built.encode(documents)
    except BaseException as error:
        if not is_failure(error):
            raise
        return f"cannot run it ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})", None
    if _same((ids, offsets), expected):
        return "", built
    for index, document in enumerate(documents):
        ours, theirs = (part[0][part[1][index] : part[1][index + 1]] for part in ((ids, offsets), expected))
        if not np.array_equal(ours, theirs):
            return f"gives other ids for {document.decode()[:60]!r}", None
    raise AssertionError("ids differ, but those of no document do")


def _same(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> bool:
    return np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
