"""Documents near the thresholds of every quality rule, the same wherever they are made: only `Random.random` is drawn from."""

from __future__ import annotations

from random import Random

COUNT = 800
WORDS = [
    "the",
    "be",
    "to",
    "of",
    "and",
    "that",
    "have",
    "with",
    "moon",
    "tide",
    "harbour",
    "lamp",
    "keeper",
    "walked",
    "slowly",
    "across",
    "wet",
    "stones",
    "before",
    "dawn",
    "while",
    "gulls",
    "cried",
    "over",
    "boats",
    "she",
    "counted",
    "seven",
    "lights",
    "along",
    "coast",
    "nobody",
    "knew",
    "why",
    "they",
    "don't",
    "answer",
    "well-known",
    "John's",
    "U.S.",
    "e.g.",
    "café",
    "naïve",
    "Straße",
    "2024",
    "3.14",
    "10km",
    "a/b",
    "x=y",
    "can't",
    "漢字",
    "über",
    "state-of-the-art",
    "no",
]
ODD = (
    "- a point of the list", "• another point", "and then...", "it went on …", "# # # heading", "#tag", "{ brace }", "Lorem ipsum dolor.",
    "Enable JavaScript to go on.", "Read our terms of use here.", "We use cookies.", "Cited[12] twice [edit] here.", "a b c d e f g.",
    "incomprehensibilities counterrevolutionaries internationalization.", "1 2 3 4 5 6 7 8 9 0", "$ % & * ( ) +", "", "   ", "One. Two! Three?",
    "He said \"stop.\" Then e.g. this.", "short", "ends without a mark", "“Quoted,” she said. ‘So.’", "x" * 40, "終わり。 はい。",
)  # fmt: skip


def documents() -> list[str]:
    rng = Random(18)

    def pick(count: int) -> int:
        return int(rng.random() * count)

    found = []
    for _ in range(COUNT):
        clean, repeats = rng.random(), rng.random() < 0.4
        lines: list[str] = []
        for _ in range(1 + pick(24)):
            if lines and repeats and rng.random() < 0.4:
                line = lines[pick(len(lines))]
                cut = pick(len(line) + 1) if rng.random() < 0.5 else 0
                lines.append(line[cut:])
            elif rng.random() > clean:
                lines.append(ODD[pick(len(ODD))])
            else:
                words = [WORDS[pick(len(WORDS))] for _ in range(1 + pick(18))]
                lines.append(" ".join(words) + (".", ".", ".", "?", "")[pick(5)])
        found.append(("\n", "\n", "\n\n", " ")[pick(4)].join(lines) or "x")
    return found
