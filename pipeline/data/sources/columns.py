"""Rows of any layout: the config says which fields hold query, documents, scores and so on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from pipeline.config import SourceConfig
from pipeline.data.sources.blocks import Record
from pipeline.data.sources.corpus import Shelf
from pipeline.data.sources.fields import (
    fields_of,
    numbers,
    optional_text,
    text_or_chat,
    texts_in,
)
from pipeline.data.sources.files import kind_of
from pipeline.data.sources.row import Row


def read_columns(record: Record, source: SourceConfig, shelf: Shelf | None) -> Iterable[Row]:
    """Any record with a query and texts, its fields named by `columns`."""
    names = {key: _listed(value) for key, value in source.columns.items()}
    query = text_or_chat(record, names.get("query", ("query",))[0])
    judged = "documents" in names
    positives, negatives, order = (_judged if judged else _separate)(record, names)
    scores = _scores(record, names.get("scores", ()), len(positives), len(negatives), judged)
    instruction, concept = names.get("instruction"), names.get("concept")
    yield Row(
        query=query,
        positives=positives,
        negatives=negatives,
        instruction=optional_text(record, instruction[0]) if instruction else source.instruction,
        document_instruction=source.document_instruction,
        concept=optional_text(record, concept[0]) if concept else "",
        scores=tuple(scores[place] for place in order) if scores else (),
    )


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


_Columns = dict[str, tuple[str, ...]]
# Positives, negatives, and the place in the record of each positive, then of each negative.
_Texts = tuple[tuple[str, ...], tuple[str, ...], list[int]]


def _separate(record: Record, names: _Columns) -> _Texts:
    """Positives and negatives from fields of their own; of several fields, some may be null."""
    # An empty cell of a table of text is what null is elsewhere.
    absent = (None, "") if kind_of(record.file) == "csv" else (None,)
    found = list(fields_of(record, names.get("positives", ("positives",))))
    if len(found) > 1 and any(value not in absent for _, value in found):
        found = [(key, value) for key, value in found if value not in absent]
    positives = [item for key, value in found for item in texts_in(record, key, value)]
    wanted = names.get("negatives", ("negatives",) if "negatives" in record.value else ())
    negatives = [
        item
        for key, value in fields_of(record, wanted)
        if value not in absent
        for item in texts_in(record, key, value)
    ]
    return tuple(positives), tuple(negatives), list(range(len(positives) + len(negatives)))


def _judged(record: Record, names: _Columns) -> _Texts:
    """Documents with a label each: positives where it is above 0."""
    documents = [
        item
        for key, value in fields_of(record, names["documents"])
        for item in texts_in(record, key, value)
    ]
    labels = [
        label
        for key, value in fields_of(record, names["labels"])
        for label in numbers(record, key, value, allow_bools=True)
    ]
    if len(labels) != len(documents):
        raise record.fail(f"{len(labels)} labels", allowed=f"{len(documents)}, one per document")
    order = sorted(range(len(labels)), key=lambda place: labels[place] <= 0)
    count = sum(label > 0 for label in labels)
    ordered = tuple(documents[place] for place in order)
    return ordered[:count], ordered[count:], order


def _scores(
    record: Record, names: tuple[str, ...], positives: int, negatives: int, judged: bool
) -> tuple[float, ...]:
    """The teacher's scores, one per document in the record's order."""
    if not names:
        return ()
    found = list(fields_of(record, names))
    # The lists of positives and negatives: one of them may be null where there is no document.
    sides = [positives, negatives] if len(found) == 2 and not judged else []
    values = [
        () if value is None and sides and not sides[place] else numbers(record, key, value)
        for place, (key, value) in enumerate(found)
    ]
    for (key, _), own, side in zip(found, values, sides, strict=False):
        if len(own) != side:
            raise record.fail(f"{len(own)} scores in {key!r}", allowed=f"{side}, one per document")
    scores = tuple(itertools.chain.from_iterable(values))
    if len(scores) != positives + negatives:
        raise record.fail(
            f"{len(scores)} scores",
            allowed=f"{positives + negatives}, one per positive and negative",
        )
    return scores
