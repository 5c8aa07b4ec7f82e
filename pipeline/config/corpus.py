"""Settings of the data: the tokenizer, the sources with their filters and mixture, the layout of the packed shards."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config import conditions
from pipeline.config.decontamination import Decontamination
from pipeline.config.near import NearDuplicates
from pipeline.config.paragraphs import DuplicateParagraphs
from pipeline.config.rules import Rules
from pipeline.config.section import Section
from pipeline.config.values import Bytes, Count, Fraction, Location, NonNegativeFloat, PositiveFloat, PositiveInt

DEFAULT_EOS = "[EOS]"
DEFAULT_SPECIAL_TOKENS = ("[BOS]", DEFAULT_EOS, "[PAD]", "[UNK]")


class TokenizerConfig(Section):
    """Train a byte-level BPE with Moonlight's split pattern, or load one (`tokenizer.json` or Moonshot's `tiktoken.model`)."""

    path: Location | None = None  # folder or file to load; None trains one on the corpus
    vocab_size: Annotated[int, Field(gt=0, le=10_000_000)] = 8192  # of a trained one; includes the special tokens
    training_bytes: Bytes = 40_000_000  # text sampled from the corpus, spread over `sources`
    sources: dict[
        str, PositiveFloat
    ] = {}  # share of each source in that text; empty: all sources of the corpus, equally
    special_tokens: tuple[str, ...] | None = None  # None: [BOS] [EOS] [PAD] [UNK] if trained, any if loaded
    eos_token: str | None = None  # closes a document; None: [EOS] if trained, the tokenizer's own if loaded

    @property
    def trained_special_tokens(self) -> tuple[str, ...]:
        return DEFAULT_SPECIAL_TOKENS if self.special_tokens is None else self.special_tokens

    @model_validator(mode="after")
    def _eos_is_special(self) -> TokenizerConfig:
        known = self.trained_special_tokens if self.path is None else self.special_tokens
        eos = self.eos_token or (DEFAULT_EOS if self.path is None else None)
        if eos is not None and known is not None and eos not in known:
            raise ValueError(f"eos_token {eos!r} is not among special_tokens {list(known)}")
        if self.path is None and self.vocab_size < 256 + len(self.trained_special_tokens):
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small: 256 bytes + {len(self.trained_special_tokens)} special tokens"
            )
        return self


class FilterConfig(Section):
    """Language-independent document filters of one source; each rejection is counted by name."""

    min_characters: Annotated[int, Field(ge=0)] = 1
    max_characters: PositiveInt = 100_000_000
    max_repeated_line_fraction: Fraction = 1.0  # share of lines that are copies of an earlier line of the document
    min_alphanumeric_fraction: Fraction = 0.0  # share of characters that are letters or digits
    drop_exact_duplicates: bool = True  # by document hash, within the source
    where: tuple[str, ...] = ()  # conditions on fields that all must hold: score > 0.5, lang == "en"

    @field_validator("where")
    @classmethod
    def _are_conditions(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(conditions.parse(text).name for text in where)


class SourceConfig(Section):
    """One named source of documents. `languages: {en: 3, de: 1}` in it makes a source of each language (languages.py)."""

    name: str
    path: Location  # folder, file or s3:// prefix; `{stdlib}` and `{site_packages}` stand for the running Python's folders
    # auto: by name, where a name says it; anything else (code, say, as text) only if it is named here
    format: Literal["auto", "json", "jsonl", "parquet", "arrow", "csv", "tsv", "text", "warc"] = "auto"
    include: tuple[str, ...] = ("**/*",)  # globs relative to path
    exclude: tuple[str, ...] = ()
    max_bytes: Bytes | None = None  # take files in hash order until this many bytes
    text_field: str = "text"  # a field or column, or the path of a nested one: meta.text
    conversations: bool = (
        False  # text_field is a list of {role, content}, laid out by the tokenizer's chat template; JSON only
    )
    id_field: str | None = None
    weight: PositiveFloat = 1.0  # share of training sequences, normalised over sources
    max_epochs: PositiveFloat = 1.0  # how often a sequence of this source may be seen
    filters: FilterConfig = FilterConfig()
    rules: Rules = Rules()  # what is not given here is as corpus.rules has it; `false` switches a rule off

    @model_validator(mode="after")
    def _rules_are_for_prose(self) -> SourceConfig:
        if self.conversations and self.rules.any:
            raise ValueError(
                "rules are for documents, and conversations are true: score the conversations before, and use filters.where"
            )
        return self

    @model_validator(mode="after")
    def _conversations_are_json(self) -> SourceConfig:
        if self.conversations and self.format not in ("auto", "json", "jsonl"):
            raise ValueError(
                f"conversations are read from JSON and JSON lines, and format is {self.format!r}; convert them"
            )
        return self

    @field_validator("name")
    @classmethod
    def _name_is_a_path_segment(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
            raise ValueError(f"name {name!r} must be lower-case letters, digits, '.', '_' or '-'")
        return name


class MixtureStage(Section):
    """Source weights from the end of the previous stage until this position of training, in slots (see ScheduleConfig)."""

    until_tokens: PositiveInt
    weights: dict[str, NonNegativeFloat]


class CorpusConfig(Section):
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    mixture: tuple[MixtureStage, ...] = ()  # empty: `sources[].weight` throughout
    heldout_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01  # of documents, chosen by document hash
    heldout_max_documents: PositiveInt = 1000  # per source
    unit_bytes: Bytes = 2_000_000_000  # target size of a unit of work (2-5 minutes of one core)
    max_quarantined_fraction: Fraction = 0.5  # of a source's documents: more stop prepare, with the reasons
    max_document_bytes: Bytes = 32 * 1024 * 1024  # a larger record goes to quarantine
    drop_duplicates_across_sources: bool = False  # of equal documents that of the source named first stays
    keep_rejected: bool = False  # write what filters rejected, with the reason, to datasets/rejected/
    rules: Rules = Rules()  # of every source but conversations; sources[].rules comes first, rule by rule
    near_duplicates: NearDuplicates | None = None  # `near_duplicates: {}` looks for them, over all sources
    duplicate_paragraphs: DuplicateParagraphs | None = None  # `{}` takes out what other documents say, too
    decontamination: Decontamination | None = None  # `decontamination: {}` looks for the questions of evaluation.tasks
    max_dropped_fraction: Fraction = 0.9  # of a source's documents, by one rule: more stop prepare, with examples

    @model_validator(mode="after")
    def _names_agree(self) -> CorpusConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources: names must differ, got {names}")
        previous = 0
        for stage in self.mixture:
            unknown = sorted(set(stage.weights) - set(names))
            if unknown:
                raise ValueError(f"mixture: no source is named {unknown[0]!r}; sources are {names}")
            if stage.until_tokens <= previous:
                raise ValueError("mixture: until_tokens must increase from stage to stage")
            if sum(stage.weights.values()) <= 0:
                raise ValueError("mixture: weights of a stage must not all be zero")
            previous = stage.until_tokens
        return self


class DataConfig(Section):
    """Layout of the packed shards and the constants of the closed-form order (hashed into every checkpoint)."""

    sequence_length: PositiveInt = 8192  # tokens of a packed row: the longest length training may use
    packing: Literal["best_fit", "concat", "pad", "whole"] = "best_fit"  # whole: best fit, no document is ever cut
    max_documents_per_row: Count | None = (
        None  # None: as many as fit; document masks do not mind (data_prep/packing.py)
    )
    max_padding: Fraction = 0.02  # share of the slots of a source's packed rows; more is refused
    rows_per_group: Count = 256  # rows of a Parquet row group = one shuffle block = one ranged read
    groups_per_file: Count = 256
    lanes: Count = 1024  # D: independent read streams; a multiple of every rank count expected
    window_blocks: Count = 4  # W: blocks shuffled together within a lane
    mixture_block: PositiveInt = 2048  # M: positions of a lane over which source counts are exact
    cache_bytes: Bytes = 1 << 30  # decoded blocks kept per rank
    zstd_level: Annotated[int, Field(ge=-7, le=22)] = 3
