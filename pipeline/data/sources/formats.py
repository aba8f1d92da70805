"""From the records of each published format to rows; every message names file and line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config import SourceConfig
from pipeline.data.sources.corpus import Shelf, identifier
from pipeline.data.sources.records import Record
from pipeline.data.sources.row import Row, sample_texts, stable_hash

_MSMARCO_INSTRUCTION = "Retrieve text based on user query"
_MSMARCO_NEGATIVES = 15
_MSMARCO_INSTRUCTION_NEGATIVES = 3

_WIKIPEDIA = "Given a question, retrieve Wikipedia passages that answer the question"
# Instructions of the public E5 sets (Wang et al., arXiv 2401.00368, table 12). A set with several
# uses them in equal parts.
_E5_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "allnli": (
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Retrieve semantically similar text.",
    ),
    "eli5_question_answer": (
        "Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",
    ),
    "fever": ("Given a claim, retrieve documents that support or refute the claim",),
    "hotpot_qa": (
        "Given a multi-hop question, retrieve documents that can help answer the question",
    ),
    "miracl": (_WIKIPEDIA,),
    "mrtydi": (_WIKIPEDIA,),
    "msmarco_passage": (
        "Given a web search query, retrieve relevant passages that answer the query",
    ),
    "msmarco_document": (
        "Given a web search query, retrieve relevant documents that answer the query",
    ),
    "nq": (_WIKIPEDIA,),
    "quora_duplicates": (
        "Given a question, retrieve questions that are semantically equivalent to the given"
        " question",
        "Find questions that have the same meaning as the input question",
    ),
    "squad": ("Retrieve Wikipedia passages that answer the question",),
    "trivia_qa": ("Retrieve Wikipedia passages that answer the question",),
}
# Both sides are the same kind of text, so documents carry the instruction too.
_E5_SYMMETRIC = ("allnli", "quora_duplicates")


def _text(record: Record, key: str) -> str:
    """A text field, which may be missing in no record."""
    value = _field(record, key)
    if not isinstance(value, str):
        raise record.fail(f"{key!r} is {_kind_of(value)}", allowed="a text")
    return value


def _optional(record: Record, key: str) -> str:
    value = _field(record, key, required=False)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise record.fail(f"{key!r} is {_kind_of(value)}", allowed="a text or null")
    return value


def _field(record: Record, key: str, required: bool = True) -> Any:
    """Value at a dotted path of keys."""
    value = record.value
    for part in key.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif required:
            found = ", ".join(map(str, record.value))
            raise record.fail(f"field {key!r} is missing", allowed=f"fields found: {found}")
        else:
            return None
    return value


def _texts(record: Record, key: str, *, required: bool) -> tuple[str, ...]:
    """A text, a list of texts, or a list of {title, text}; null is an empty list."""
    value = _field(record, key, required=required)
    if value is None and not required:
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_passage(record, key, item) for item in items)


def _passage(record: Record, key: str, item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping) and isinstance(item.get("text"), str):
        title = item.get("title") or ""
        return f"{title} {item['text']}".strip() if isinstance(title, str) else item["text"]
    raise record.fail(
        f"{key!r} holds {_kind_of(item)}", allowed="texts, or objects with text and title"
    )


def _kind_of(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def read_columns(record: Record, source: SourceConfig, shelf: Shelf | None) -> Iterable[Row]:
    """Any record with a query and texts, its fields named by `columns`."""
    names = source.columns
    negatives = names.get("negatives", "negatives")
    concept = names.get("concept")
    scores = _field(record, names["scores"]) if "scores" in names else ()
    if not isinstance(scores, list | tuple) or not all(
        isinstance(score, int | float) and not isinstance(score, bool) for score in scores
    ):
        raise record.fail(f"{names['scores']!r} is {_kind_of(scores)}", allowed="a list of numbers")
    instruction = names.get("instruction")
    yield Row(
        query=_text(record, names.get("query", "query")),
        positives=_texts(record, names.get("positives", "positives"), required=True),
        negatives=_texts(record, negatives, required="negatives" in names),
        instruction=_optional(record, instruction) if instruction else source.instruction,
        document_instruction=source.document_instruction,
        concept=_optional(record, concept) if concept else "",
        scores=tuple(float(score) for score in scores),
    )


def read_reasonaug(record: Record, source: SourceConfig, shelf: Shelf | None) -> Iterable[Row]:
    """ReasonAug triplets; `instance` is the concept, `task` the instruction."""
    negative = _optional(record, "hard_negative_document")
    yield Row(
        query=_text(record, "user_query"),
        positives=(_text(record, "positive_document"),),
        negatives=(negative,) if negative else (),
        instruction=_optional(record, "task") or source.instruction,
        concept=_optional(record, "instance"),
    )


def read_e5(record: Record, source: SourceConfig, shelf: Shelf | None) -> Iterable[Row]:
    """Public E5 sets: `query, positive, negative`; the file's name says which set it is."""
    stem = record.file.rsplit("/", 1)[-1].split(".")[0]
    name = next((known for known in _E5_INSTRUCTIONS if stem.startswith(known)), "")
    query = _text(record, "query")
    instruction = source.instruction
    if not instruction:
        if not name:
            raise record.fail(
                f"{stem!r} is no known E5 set",
                allowed=", ".join(_E5_INSTRUCTIONS),
                fix=f"give source {source.name!r} an instruction",
            )
        choices = _E5_INSTRUCTIONS[name]
        instruction = choices[stable_hash(query) % len(choices)]
    yield Row(
        query=query,
        positives=_texts(record, "positive", required=True),
        negatives=_texts(record, "negative", required=False),
        instruction=instruction,
        document_instruction=instruction if name in _E5_SYMMETRIC else "",
    )


def read_msmarco(record: Record, source: SourceConfig, shelf: Shelf | None) -> Iterable[Row]:
    """MS MARCO with instructions: one positive; instruction negatives first, others sampled."""
    query = _text(record, "query")
    first = sample_texts(
        _texts(record, "new_negatives", required=False),
        _MSMARCO_INSTRUCTION_NEGATIVES,
        seed=query,
    )
    count = source.max_negatives if source.max_negatives is not None else _MSMARCO_NEGATIVES
    others = _texts(record, "negative_passages", required=False)
    yield Row(
        query=query,
        positives=_texts(record, "positive_passages", required=True)[:1],
        negatives=first + sample_texts(others, max(0, count - len(first)), seed=query),
        num_first_negatives=len(first),
        instruction=source.instruction or _MSMARCO_INSTRUCTION,
    )


def read_reasonir(record: Record, source: SourceConfig, shelf: Shelf | None) -> Iterable[Row]:
    """ReasonIR: `query` is [instruction, text], `pos` and `neg` lists of [instruction, text].

    In the hq set, the texts of `pos` are ids of BRIGHT documents, found on the shelf.
    """
    instruction, query = _pair(record, "query", _field(record, "query"))
    positives = [_pair(record, "pos", item) for item in _list(record, "pos")]
    negatives = [_pair(record, "neg", item) for item in _list(record, "neg")]
    texts = []
    for _, text in positives:
        found = shelf.document(text) if shelf else text
        if found is None:
            raise record.fail(
                f"document id {text!r} is not in {source.documents}",
                fix="give `documents` the whole set of BRIGHT documents",
            )
        texts.append(found)
    yield Row(
        query=query,
        positives=tuple(texts),
        negatives=tuple(text for _, text in negatives),
        instruction=instruction or source.instruction,
        document_instruction=source.document_instruction,
    )


def _list(record: Record, key: str) -> list[Any]:
    value = _field(record, key)
    if not isinstance(value, list):
        raise record.fail(f"{key!r} is {_kind_of(value)}", allowed="a list")
    return value


def _pair(record: Record, key: str, value: Any) -> tuple[str, str]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(part, str) for part in value)
    ):
        raise record.fail(f"{key!r} holds {_kind_of(value)}", allowed="[instruction, text]")
    return value[0], value[1]


def read_lines(record: Record, source: SourceConfig, shelf: Shelf | None) -> Iterable[Row]:
    """One text per line, its own positive (SimCSE: dropout makes the two views differ)."""
    text = _text(record, "text")
    yield Row(query=text, positives=(text,), instruction=source.instruction)


def read_mteb(record: Record, source: SourceConfig, shelf: Shelf | None) -> Iterable[Row]:
    """A query of a folder in mteb's layout; documents judged 0 are hard negatives."""
    assert shelf is not None
    positives: list[str] = []
    negatives: list[str] = []
    for document, score in shelf.judgements.get(identifier(record), []):
        text = shelf.document(document)
        if text is None:
            raise record.fail(f"judged document {document!r} is not in the corpus")
        (positives if score > 0 else negatives).append(text)
    if positives:
        yield Row(
            query=_text(record, "text"),
            positives=tuple(positives),
            negatives=tuple(negatives),
            instruction=_optional(record, "instruction") or source.instruction,
            document_instruction=source.document_instruction,
        )
