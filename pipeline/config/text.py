"""How an instruction and a text become one string."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pipeline.config.rules import require, strict

_TEXT, _INSTRUCTION = "{text}", "{instruction}"


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How an instruction and a text become the string that is tokenised.

    One object serves training, export and evaluation, so the strings cannot differ. A query without
    an instruction is written without what its template says around one: `Instruct: {instruction}`
    up to the text is left out as a whole. What wraps all of it stays, as in
    `[INST] {instruction}; {text} [/INST]`: where something follows the text, so does what stands
    before the instruction. What follows the text is kept when the text is cut.
    """

    query: str = "Instruct: {instruction}\nQuery: {text}"
    document: str = "{text}"

    def __post_init__(self) -> None:
        for key, template in (("query", self.query), ("document", self.document)):
            require(
                template.count(_TEXT) == 1,
                f"template.{key}",
                template,
                "a string that names {text} once",
            )
        require(
            _INSTRUCTION not in self.query.partition(_TEXT)[2],
            "template.query",
            self.query,
            "a string that names {instruction} before {text} only",
        )
        require(
            _INSTRUCTION not in self.document,
            "template.document",
            self.document,
            "a string without {instruction}; a document that has one is written as a query",
        )

    def query_prefix(self, instruction: str) -> str:
        """Return what stands before the query text."""
        before, _, after = self.query.partition(_TEXT)
        if instruction or _INSTRUCTION not in before:
            return before.replace(_INSTRUCTION, instruction)
        return before.partition(_INSTRUCTION)[0] if after else ""

    def query_suffix(self) -> str:
        """Return what stands behind the query text, with an instruction and without."""
        return self.query.partition(_TEXT)[2]

    def document_prefix(self, instruction: str = "") -> str:
        """Return what stands before a document's text. Only symmetric sets give documents one."""
        if instruction:
            return self.query_prefix(instruction)
        return self.document.partition(_TEXT)[0]

    def document_suffix(self, instruction: str = "") -> str:
        """Return what stands behind a document's text."""
        return self.query_suffix() if instruction else self.document.partition(_TEXT)[2]

    def frame(self, role: Literal["query", "document"], instruction: str = "") -> tuple[str, str]:
        """Return what stands before and behind a text of one role."""
        if role == "query":
            return self.query_prefix(instruction), self.query_suffix()
        return self.document_prefix(instruction), self.document_suffix(instruction)

    def format_query(self, text: str, instruction: str = "") -> str:
        """Return the string of a query."""
        return self.query_prefix(instruction) + text + self.query_suffix()

    def format_document(self, text: str, instruction: str = "") -> str:
        """Return the string of a document."""
        return self.document_prefix(instruction) + text + self.document_suffix(instruction)
