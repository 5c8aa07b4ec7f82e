"""FineWeb's quality rules (Penedo et al. 2024, arXiv 2406.17557, section 3.6), as datatrove's `FineWebQualityFilter` counts them.

Verdicts are datatrove's where words are the same (tests/data_prep/rules/); words are those of words.py, not spaCy's, and only
`max_newline_word_ratio` asks for them.
"""

from __future__ import annotations

import numpy as np

from data_prep.rules.gopher_repetition import duplicates
from data_prep.rules.group import Group
from pipeline.config.rules import FineWeb

# First and last of the runs of characters that end a sentence: Unicode 15.1's Sentence_Terminal without presentation forms and signs of
# no living script, and three signs of Khmer, as the published pipeline has them
_TERMINAL_RUNS = (
    (0x21, 0x21),
    (0x2E, 0x2E),
    (0x3F, 0x3F),
    (0x589, 0x589),
    (0x61D, 0x61F),
    (0x6D4, 0x6D4),
    (0x700, 0x702),
    (0x7F9, 0x7F9),
    (0x837, 0x837),
    (0x839, 0x839),
    (0x83D, 0x83E),
    (0x964, 0x965),
    (0x104A, 0x104B),
    (0x1362, 0x1362),
    (0x1367, 0x1368),
    (0x166E, 0x166E),
    (0x1735, 0x1736),
    (0x17D4, 0x17D6),
    (0x17D9, 0x17DA),
    (0x1803, 0x1803),
    (0x1809, 0x1809),
    (0x1944, 0x1945),
    (0x1AA8, 0x1AAB),
    (0x1B5A, 0x1B5B),
    (0x1B5E, 0x1B5F),
    (0x1B7D, 0x1B7E),
    (0x1C3B, 0x1C3C),
    (0x1C7E, 0x1C7F),
    (0x203C, 0x203D),
    (0x2047, 0x2049),
    (0x2E2E, 0x2E2E),
    (0x2E3C, 0x2E3C),
    (0x2E53, 0x2E54),
    (0x3002, 0x3002),
    (0xA4FF, 0xA4FF),
    (0xA60E, 0xA60F),
    (0xA6F3, 0xA6F3),
    (0xA6F7, 0xA6F7),
    (0xA876, 0xA877),
    (0xA8CE, 0xA8CF),
    (0xA92F, 0xA92F),
    (0xA9C8, 0xA9C9),
    (0xAA5D, 0xAA5F),
    (0xAAF0, 0xAAF1),
    (0xABEB, 0xABEB),
    (0xFE52, 0xFE52),
    (0xFE56, 0xFE57),
    (0xFF01, 0xFF01),
    (0xFF0E, 0xFF0E),
    (0xFF1F, 0xFF1F),
    (0xFF61, 0xFF61),
    (0x10A56, 0x10A57),
    (0x10F55, 0x10F59),
    (0x10F86, 0x10F89),
    (0x11047, 0x11048),
    (0x110BE, 0x110C1),
    (0x11141, 0x11143),
    (0x111C5, 0x111C6),
    (0x111CD, 0x111CD),
    (0x111DE, 0x111DF),
    (0x11238, 0x11239),
    (0x1123B, 0x1123C),
    (0x112A9, 0x112A9),
    (0x1144B, 0x1144C),
    (0x115C2, 0x115C3),
    (0x115C9, 0x115D7),
    (0x11641, 0x11642),
    (0x1173C, 0x1173E),
    (0x11944, 0x11944),
    (0x11946, 0x11946),
    (0x11A42, 0x11A43),
    (0x11A9B, 0x11A9C),
    (0x11C41, 0x11C42),
    (0x11EF7, 0x11EF8),
    (0x11F43, 0x11F44),
    (0x16A6E, 0x16A6F),
    (0x16AF5, 0x16AF5),
    (0x16B37, 0x16B38),
    (0x16B44, 0x16B44),
    (0x16E98, 0x16E98),
    (0x1BC9F, 0x1BC9F),
    (0x1DA88, 0x1DA88),
)
TERMINAL = frozenset(chr(code) for first, last in _TERMINAL_RUNS for code in range(first, last + 1))


def verdicts(group: Group, settings: FineWeb) -> list[str]:
    """Of each text the rule that it fails first, or ''."""
    words = np.diff(group.words.first).tolist()
    return [_verdict(settings, text, count) for text, count in zip(group.texts, words)]


def _verdict(settings: FineWeb, text: str, words: int) -> str:
    every = text.split("\n")
    lines = [line for line in every if line and not line.isspace()]
    if not lines or not words:
        return "min_punctuated_line_fraction"
    punctuated = sum(line[-1] in TERMINAL for line in lines)
    if punctuated / len(lines) < settings.min_punctuated_line_fraction:
        return "min_punctuated_line_fraction"
    longest = settings.short_line_length
    if sum(size <= longest for size in map(len, lines)) / len(lines) > settings.max_short_line_fraction:
        return "max_short_line_fraction"
    characters = len(text) - len(every) + 1
    if duplicates(lines)[1] / characters > settings.max_duplicate_line_character_fraction:
        return "max_duplicate_line_character_fraction"
    return "max_newline_word_ratio" if (len(every) - 1) / words > settings.max_newline_word_ratio else ""
