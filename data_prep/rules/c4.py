"""C4's rules (Raffel et al. 2020, JMLR 21/140, section 2.2), as datatrove's `C4QualityFilter` applies them: lines are removed, and
documents of which too few sentences are left.

Texts and verdicts are datatrove's but for sentences, which are not split by a model: one ends at a full stop, exclamation or question
mark, with closing quotes and brackets, before white space or at the line's end. spaCy's, with which datatrove counts, does not end one after
abbreviations that it knows (e.g., U.S.). The count decides only where fewer than `min_sentences` lines are left, for each has at least one.
The list of bad words is not applied; neither does datatrove in this filter.
"""

from __future__ import annotations

import re

from pipeline.config.rules import C4

END_PUNCTUATION = (".", "?", "!", '"', "'")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_SENTENCE = re.compile(r"""(?<!\.)[.!?。！？]+["'”’»)\]]*(?=\s|$)""")


def cleaned(text: str, settings: C4) -> tuple[str, str, int]:
    """The rule that the document fails first, or ''; the text that is left; how many lines were removed."""
    lower = text.lower()
    javascript = settings.remove_javascript_lines and "javascript" in lower
    policy = settings.remove_policy_lines and any(phrase in lower for phrase in POLICIES)
    lorem = settings.drop_lorem_ipsum and "lorem ipsum" in lower
    bracket = settings.drop_curly_bracket and "{" in text
    citations = settings.remove_citations and "[" in text
    special = javascript or policy or lorem or bracket
    few, longest = settings.min_words_per_line, settings.max_word_length
    lines = text.splitlines()
    kept = []
    for line in lines:
        line = line.strip()
        long = len(line) > longest and any(len(word) > longest for word in line.split())
        enough = len(line.split(None, few)) >= few if few else True
        if long:
            continue
        if citations:
            line = _CITATION.sub("", line)
        if settings.require_terminal_punctuation and (not line.endswith(END_PUNCTUATION) or line.endswith("...")):
            continue
        if not enough:
            continue
        if special:
            lower = line.lower()
            if lorem and "lorem ipsum" in lower:
                return "drop_lorem_ipsum", text, 0
            if javascript and "javascript" in lower:
                continue
            if bracket and "{" in line:
                return "drop_curly_bracket", text, 0
            if policy and any(phrase in lower for phrase in POLICIES):
                continue
        kept.append(line)
    if len(kept) < settings.min_sentences and sum(map(sentences, kept)) < settings.min_sentences:
        return "min_sentences", text, 0
    left = "\n".join(kept).strip()
    return ("" if left else "min_sentences"), left, len(lines) - len(kept)


def sentences(line: str) -> int:
    """Of a line that is not empty: those that end, and what follows the last one."""
    ends = [found.end() for found in _SENTENCE.finditer(line)]
    return len(ends) + (not ends or bool(line[ends[-1] :].strip()))
