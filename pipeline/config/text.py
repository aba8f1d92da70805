"""How an instruction and a text become one string."""

from __future__ import annotations

import dataclasses

from pipeline.config.rules import require, strict


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How an instruction and a text become the string that is tokenised.

    One object serves training, export and evaluation, so the strings cannot differ.
    """

    query: str = "Instruct: {instruction}\nQuery: {text}"
    document: str = "{text}"

    def __post_init__(self) -> None:
        for key, template in (("query", self.query), ("document", self.document)):
            require(
                template.count("{text}") == 1 and template.endswith("{text}"),
                f"template.{key}",
                template,
                "a string that ends with {text} and names it once",
            )

    def query_prefix(self, instruction: str) -> str:
        """What stands before the query text; empty when there is no instruction."""
        if not instruction:
            return ""
        return self.query.removesuffix("{text}").replace("{instruction}", instruction)

    def document_prefix(self, instruction: str = "") -> str:
        """What stands before a document's text. Only symmetric sets give documents one."""
        if instruction:
            return self.query_prefix(instruction)
        return self.document.removesuffix("{text}")

    def format_query(self, text: str, instruction: str = "") -> str:
        """The string of a query."""
        return self.query_prefix(instruction) + text
