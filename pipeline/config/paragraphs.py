"""Settings of the search for paragraphs and lines that several documents have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section import Section


class DuplicateParagraphs(Section):
    """Of equal paragraphs, or lines, over the documents of all sources but conversations one document keeps its own."""

    by: Literal["paragraph", "line"] = "paragraph"  # what empty lines part, or a line
    min_characters: Annotated[int, Field(ge=1, le=1_000_000)] = 50  # shorter ones stay: titles, brackets, "Yes."
