"""What training put before queries and documents, in the form that sentence-transformers takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pipeline.config import Template


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTexts:
    """What the examples of a training run held.

    Attributes:
        instructions: of queries, with the number of queries that had each; empty for none.
        document_prefixes: what stood before documents, with how many of a sample had each; without
            an entry, what the template says.
    """

    instructions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    document_prefixes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def instruction(self) -> str | None:
        """The one instruction of every query, empty if none had any; None if they differ."""
        found = list(self.instructions) or [""]
        return found[0] if len(found) == 1 else None


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A prefix, cut in two where pooling leaves it out.

    sentence-transformers counts a prompt's tokens right where the prompt does not end in a space,
    which most tokenizers join with the word behind it. So that space belongs to the text.

    Attributes:
        before: for `prompts` and `prompt=`.
        joint: what a text must begin with by itself.
    """

    before: str
    joint: str

    @classmethod
    def of(cls, prefix: str, *, pooled: bool) -> Prompt:
        """Split a template's prefix; `pooled` is whether its tokens are part of the vector."""
        before = prefix if pooled else prefix.rstrip()
        return cls(before, prefix[len(before) :])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The prompts of an export.

    Attributes:
        query: of the one instruction of training; without text where there were several.
        document: of documents.
        example: of a query in an example: that of the most frequent instruction.
    """

    query: Prompt
    document: Prompt
    example: Prompt

    @classmethod
    def of(cls, template: Template, texts: TrainedTexts, *, pooled: bool) -> Prompts:
        """Choose the prompts that match what training saw."""
        counts = texts.instructions
        frequent = max(counts, key=lambda text: counts[text]) if counts else ""
        prefixes = list(texts.document_prefixes)
        document = prefixes[0] if len(prefixes) == 1 else template.document_prefix()
        return cls(
            query=Prompt.of(template.query_prefix(texts.instruction or ""), pooled=pooled),
            document=Prompt.of(document, pooled=pooled),
            example=Prompt.of(template.query_prefix(frequent), pooled=pooled),
        )
