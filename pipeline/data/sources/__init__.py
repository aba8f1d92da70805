"""Read published retrieval data: the files of a source in, rows out.

    stage        example                                                  in
    paths        data/ -> data/train-00000-of-00002.jsonl.gz, ...         paths.py
    containers   a file -> blocks -> raw records with file and line       containers.py, columnar.py
    records      {"q": "fox", "pos": ["a red animal"], "neg_1": null}     records.py
    fields       "q" is the query, "pos" the positives, "neg_*" ...       records.py, `parse_...`
    references   (formats with ids) "d7" -> "a red animal"                corpus.py
    rows         Row(query="fox", positives=("a red animal",))            `parse_...`

A fault of a file stops the build at once; a fault of a record goes to `on_bad`, so that all of them
can be reported together. A new format is a function `parse_...` and an entry of `FORMATS`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.config import SourceConfig
from pipeline.data.sources.containers import plan_blocks, read_file, read_records
from pipeline.data.sources.corpus import (
    References,
    corpus_files,
    folder_part,
    has_references,
    identifier,
    judgement_files,
)
from pipeline.data.sources.paths import ChosenFiles, choose_files, kind_of
from pipeline.data.sources.records import (
    BadRowError,
    FileBlock,
    OnBadRow,
    Record,
    Row,
    equals,
    field_of,
    fields_of,
    give_up,
    kind_name,
    numbers,
    optional_text,
    optional_texts,
    require_whole_characters,
    required_text,
    required_texts,
    sample_texts,
    stable_hash,
    text_or_chat,
    texts_in,
)
from pipeline.errors import UserError


def parse_columns(
    record: Record, source: SourceConfig, references: References | None
) -> Iterable[Row]:
    """Parse any record with a query and texts, its fields named by `columns`."""
    columns = source.columns.items()
    names = {key: (of,) if isinstance(of, str) else tuple(of) for key, of in columns}
    query = text_or_chat(record, names.get("query", ("query",))[0])
    labelled = "documents" in names
    split = _split_labelled if labelled else _split_by_field
    positives, negatives, order = split(record, names)
    scores = _scores(record, names.get("scores", ()), len(positives), len(negatives), labelled)
    instruction, concept = names.get("instruction"), names.get("concept")
    own_instruction = optional_text(record, instruction[0]) if instruction else ""
    yield Row(
        query=query,
        positives=positives,
        negatives=negatives,
        instruction=own_instruction or source.instruction,
        document_instruction=source.document_instruction,
        concept=optional_text(record, concept[0]) if concept else "",
        scores=tuple(scores[index] for index in order) if scores else (),
    )


_ColumnNames = dict[str, tuple[str, ...]]
# Positives, negatives, and the index in the record of each positive, then of each negative.
_Split = tuple[tuple[str, ...], tuple[str, ...], list[int]]


def _split_by_field(record: Record, names: _ColumnNames) -> _Split:
    """Take positives and negatives from different fields; of several fields, some may be null."""
    # Delimited files have no null; an empty cell means the same.
    absent = (None, "") if kind_of(record.file) == "csv" else (None,)
    found = list(fields_of(record, names.get("positives", ("positives",))))
    # Nulls are fine where another field has a text; if all are null, the row is bad.
    if len(found) > 1 and any(value not in absent for _, value in found):
        found = [(key, value) for key, value in found if value not in absent]
    positives = _texts(record, found)
    wanted = fields_of(record, names.get("negatives", ("negatives",)), required=False)
    negatives = _texts(record, ((key, value) for key, value in wanted if value not in absent))
    return positives, negatives, list(range(len(positives) + len(negatives)))


def _split_labelled(record: Record, names: _ColumnNames) -> _Split:
    """Take documents with one label each: positives where it is above 0."""
    documents = _texts(record, fields_of(record, names["documents"]))
    labels = [
        label
        for key, value in fields_of(record, names["labels"])
        for label in numbers(record, key, value, allow_bools=True)
    ]
    if len(labels) != len(documents):
        raise record.fail(f"{len(labels)} labels", allowed=f"{len(documents)}, one per document")
    # Positives first; the sort is stable, so that both sides keep the order of the record.
    order = sorted(range(len(labels)), key=lambda index: labels[index] <= 0)
    count = sum(label > 0 for label in labels)
    ordered = tuple(documents[index] for index in order)
    return ordered[:count], ordered[count:], order


def _texts(record: Record, fields: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    return tuple(text for key, value in fields for text in texts_in(record, key, value))


def _scores(
    record: Record, names: tuple[str, ...], positives: int, negatives: int, labelled: bool
) -> tuple[float, ...]:
    """Return the teacher's scores, one per document in the record's order."""
    if not names:
        return ()
    found = list(fields_of(record, names))
    # Two fields are the scores of positives and of negatives; without documents one may be null.
    sides = [positives, negatives] if len(found) == 2 and not labelled else []
    values = [
        () if value is None and sides and not sides[index] else numbers(record, key, value)
        for index, (key, value) in enumerate(found)
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


_MSMARCO_INSTRUCTION = "Retrieve text based on user query"
# As published: this many negatives of a query, of which at most so many are of the instruction.
_MSMARCO_NEGATIVES = 15
_MSMARCO_INSTRUCTION_NEGATIVES = 3
_SIMILAR = "Retrieve semantically similar text"
_WIKIPEDIA = "Given a question, retrieve Wikipedia passages that answer the question"
# Instructions of the public E5 sets (Wang et al., arXiv 2401.00368, table 12). Where a set has
# several, each is used for an equal part of it.
_E5_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "allnli": (
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        _SIMILAR,
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
# Queries and documents are the same kind of text, so documents carry the instruction, too; except
# with the first instruction of allnli, where a premise retrieves its consequences.
_E5_SYMMETRIC = ("allnli", "quora_duplicates")
_E5_ENTAILMENT = _E5_INSTRUCTIONS["allnli"][0]


def parse_reasonaug(
    record: Record, source: SourceConfig, references: References | None
) -> Iterable[Row]:
    """Parse ReasonAug triplets; `instance` is the concept, `task` the instruction."""
    negative = optional_text(record, "hard_negative_document")
    yield Row(
        query=required_text(record, "user_query"),
        positives=(required_text(record, "positive_document"),),
        negatives=(negative,) if negative else (),
        instruction=optional_text(record, "task") or source.instruction,
        concept=optional_text(record, "instance"),
    )


def parse_e5(record: Record, source: SourceConfig, references: References | None) -> Iterable[Row]:
    """Parse public E5 sets: `query, positive, negative`; the file's name tells the set."""
    stem = record.file.rsplit("/", 1)[-1].split(".")[0]
    # By its start: files are named SET, SET_split1 and the like.
    name = next((known for known in _E5_INSTRUCTIONS if stem.startswith(known)), "")
    query = required_text(record, "query")
    instruction = source.instruction
    if not instruction:
        if not name:
            raise record.fail(
                f"{stem!r} is not a known E5 set",
                allowed=", ".join(_E5_INSTRUCTIONS),
                fix=f"give source {source.name!r} an instruction",
            )
        instruction = _e5_instruction(stem, name, query)
    is_symmetric = name in _E5_SYMMETRIC and instruction != _E5_ENTAILMENT
    yield Row(
        query=query,
        positives=required_texts(record, "positive"),
        negatives=optional_texts(record, "negative"),
        instruction=instruction,
        document_instruction=instruction if is_symmetric else "",
    )


def _e5_instruction(stem: str, name: str, query: str) -> str:
    """Return the instruction of a query: in `SET_split2` the second, in `SET` one by hash."""
    choices = _E5_INSTRUCTIONS[name]
    if stem in (f"{name}_split1", f"{name}_split2"):
        return choices[min(int(stem[-1]), len(choices)) - 1]
    return choices[stable_hash(query) % len(choices)]


def parse_msmarco(
    record: Record, source: SourceConfig, references: References | None
) -> Iterable[Row]:
    """Parse MS MARCO with instructions: one positive, instruction negatives, sampled negatives."""
    query = required_text(record, "query")
    first = optional_texts(record, "new_negatives")[:_MSMARCO_INSTRUCTION_NEGATIVES]
    count = source.max_negatives if source.max_negatives is not None else _MSMARCO_NEGATIVES
    others = optional_texts(record, "negative_passages")
    yield Row(
        query=query,
        positives=required_texts(record, "positive_passages")[:1],
        negatives=first + sample_texts(others, max(0, count - len(first)), seed=query),
        num_first_negatives=len(first),
        instruction=source.instruction or _MSMARCO_INSTRUCTION,
    )


def parse_reasonir(
    record: Record, source: SourceConfig, references: References | None
) -> Iterable[Row]:
    """Parse ReasonIR: `query` is [instruction, text], `pos` and `neg` lists of such pairs.

    In the hq set, the texts of `pos` are ids of BRIGHT documents.
    """
    instruction, query = _pair(record, "query", field_of(record, "query"))
    positives = [_pair(record, "pos", item) for item in _list(record, "pos")]
    negatives = [_pair(record, "neg", item) for item in _list(record, "neg")]
    texts = []
    for _, name in positives:
        found = references.document(name) if references else name
        if found is None:
            raise record.fail(
                f"document id {name!r} is not in {source.documents}",
                fix="give `documents` the whole set of BRIGHT documents",
            )
        texts.append(found)
    yield Row(
        query=query,
        positives=tuple(texts),
        negatives=tuple(text for _, text in negatives),
        # Without spaces and full stop, as published.
        instruction=instruction.strip().removesuffix(".") or source.instruction,
        document_instruction=source.document_instruction,
    )


def _list(record: Record, key: str) -> list[Any]:
    value = field_of(record, key)
    if not isinstance(value, list):
        raise record.fail(f"{key!r} is {kind_name(value)}", allowed="a list")
    return value


def _pair(record: Record, key: str, value: Any) -> tuple[str, str]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(part, str) for part in value)
    ):
        raise record.fail(f"{key!r} holds {kind_name(value)}", allowed="[instruction, text]")
    return value[0], value[1]


def parse_lines(
    record: Record, source: SourceConfig, references: References | None
) -> Iterable[Row]:
    """Parse one text per line, which is its own positive (SimCSE: dropout makes two views of it).

    Spaces around a line of a plain file are not part of its text; in a field they are.
    """
    text = required_text(record, "text")
    if kind_of(record.file) == "lines":
        text = text.strip()
    yield Row(query=text, positives=(text,), instruction=source.instruction)


def parse_mteb(
    record: Record, source: SourceConfig, references: References | None
) -> Iterable[Row]:
    """Parse a query of a folder in mteb's layout; documents judged 0 are hard negatives.

    Judged documents that the corpus lacks, and repeated queries, were reported by `check_queries`.
    """
    assert references is not None
    name = identifier(record)
    judgements = references.judgements.get(name, [])
    if not judgements:  # of another split, or never judged: `check_queries` counts these
        return
    query = required_text(record, "text")
    if query != references.first_texts.get(name, query):
        return
    positives: list[str] = []
    negatives: list[str] = []
    for document, score in judgements:
        text = references.document(document)
        if text is not None:
            (positives if score > 0 else negatives).append(text)
    yield Row(
        query=query,
        positives=tuple(positives),
        negatives=tuple(negatives),
        instruction=optional_text(record, "instruction") or source.instruction,
        document_instruction=source.document_instruction,
    )


_Parser = Callable[[Record, SourceConfig, References | None], Iterable[Row]]

FORMATS: dict[str, _Parser] = {
    "columns": parse_columns,
    "e5": parse_e5,
    "lines": parse_lines,
    "mteb": parse_mteb,
    "msmarco_instructions": parse_msmarco,
    "reasonaug": parse_reasonaug,
    "reasonir_hq": parse_reasonir,
    "reasonir_vl": parse_reasonir,
}


def expand_sources(sources: Iterable[SourceConfig]) -> tuple[SourceConfig, ...]:
    """Check formats; make one source of each set of an E5 folder, for caps and batches per set.

    Raises:
        UserError: a format is unknown, or a key that it needs is missing.
    """
    expanded = []
    for source in sources:
        if source.format not in FORMATS:
            raise UserError(
                f"sources.{source.name}.format: {source.format!r}", allowed=", ".join(FORMATS)
            )
        if source.format == "reasonir_hq" and source.documents is None:
            raise UserError(
                f"sources.{source.name}: positives of reasonir_hq are document ids",
                fix="set `documents` to the BRIGHT documents (id, content) they refer to",
            )
        files = source_files(source)
        if source.format == "e5" and len(files) > 1:
            for file in files:
                stem = file.rsplit("/", 1)[-1].split(".")[0]
                name = f"{source.name}.{stem}"
                expanded.append(dataclasses.replace(source, name=name, path=file))
        else:
            expanded.append(source)
    return tuple(expanded)


def source_files(source: SourceConfig) -> list[str]:
    """Return the files that a source's examples are read from, in order."""
    if source.format == "mteb":
        return folder_part(source, "queries")
    return _chosen_files(source).files


def source_note(source: SourceConfig) -> str:
    """Return a note on the files that are left out; empty where none are."""
    return "" if source.format == "mteb" else _chosen_files(source).note


def _chosen_files(source: SourceConfig) -> ChosenFiles:
    key = f"sources.{source.name}.path"
    return choose_files(source.path, key, split=source.split, default_split="train")


def input_files(source: SourceConfig) -> list[str]:
    """Return every file that a source's rows depend on, with documents and judgements."""
    files = source_files(source)
    if has_references(source):
        files += corpus_files(source)
    return files + judgement_files(source)


def plan_source(source: SourceConfig, *, block_bytes: int) -> Iterator[FileBlock]:
    """Cut a source into blocks, which any process may read in any order.

    Raises:
        UserError: the source is empty.
    """
    left, is_empty = source.max_rows, True
    for file in source_files(source):
        for block in plan_blocks(file, split=source.split, block_bytes=block_bytes, max_rows=left):
            is_empty = False
            yield block
        # `max_rows` counts over all files of a source: the next one may use what this one left.
        if left is not None:
            left = max(0, left - _count_rows(source, file, left))
            if left == 0:
                return
    if is_empty:
        raise UserError(
            f"sources.{source.name}: {source.path} holds no rows",
            fix="give another path, or leave this source out",
        )


def _count_rows(source: SourceConfig, file: str, most: int) -> int:
    """Count records of a file up to `most`, to find how much of a cap it uses up."""
    bad: list[BadRowError] = []
    records = read_file(file, split=source.split, max_rows=most, on_bad=bad.append)
    return sum(1 for _ in records) + len(bad)


def read_rows(
    source: SourceConfig,
    block: FileBlock,
    references: References | None,
    *,
    on_bad: OnBadRow | None = None,
    on_unwanted: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Record, Row]]:
    """Yield the rows of a block with the record each came from, filtered by `where`.

    Args:
        source: the source of the block.
        block: a stretch of it.
        references: the documents that its records refer to by id, if they do.
        on_bad: takes records that cannot be used; without it, the first one is raised.
        on_unwanted: called for each record that `where` leaves out.
    """
    parse = FORMATS[source.format]
    for record in read_records(block, split=source.split, on_bad=on_bad):
        rows: list[Row] = []
        try:
            found = {key: field_of(record, key, required=False) for key in source.where}
            if all(equals(found[key], wanted) for key, wanted in source.where.items()):
                # All at once: of a record with a fault no row is used.
                rows = list(parse(record, source, references))
            else:
                on_unwanted()
            for row in rows:
                texts = (row.query, row.instruction, row.document_instruction, row.concept)
                require_whole_characters(record, *texts, *row.positives, *row.negatives)
        except BadRowError as bad:
            give_up(bad, on_bad)
        else:
            for row in rows:
                yield record, row
