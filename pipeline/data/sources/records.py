"""Hold raw records and rows, read a record's fields, and collect the errors of bad records.

FileBlock -> Record (raw fields, file and line) -> Row (query, documents, scores)
               `-> BadRowError -> BadRows (obeys the source's `on_bad_row`)
                               -> BadRecords (inputs without `on_bad_row`)
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from pipeline.config import SourceConfig
from pipeline.data.sources.paths import kind_of, open_bytes
from pipeline.errors import UserError
from pipeline.files import FileState, file_state


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A query, documents that answer it, and documents that do not.

    `negatives` lists the `num_first_negatives` most valuable ones first. `concept` names the topic
    of the example: examples of one source with the same concept are known false negatives of each
    other. `scores` are a teacher's, positives then negatives.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    num_first_negatives: int = 0
    instruction: str = ""
    document_instruction: str = ""
    concept: str = ""
    scores: tuple[float, ...] = ()


def stable_hash(*parts: str) -> int:
    """Hash texts to 63 bits that depend on nothing else: not on process, platform or work order."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # With its length, because ("ab", "c") and ("a", "bc") must differ. Half a surrogate pair is
        # refused by `read_rows`, after parsers have hashed it.
        encoded = part.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    # Not negative as int64, so that -1 can mean "no concept" in the shards.
    return int.from_bytes(digest.digest(), "little") & (2**63 - 1)


def sample_texts(texts: Sequence[str], count: int, *, seed: str) -> tuple[str, ...]:
    """Choose `count` texts by hash, so that the choice is the same on every machine."""
    if len(texts) <= count:
        return tuple(texts)
    ranked = sorted(range(len(texts)), key=lambda index: stable_hash(seed, str(index)))
    # In the order of the texts: only the choice is by hash.
    return tuple(texts[index] for index in sorted(ranked[:count]))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileBlock:
    """A stretch of one file that one task reads.

    start and stop count bytes of line files and delimited files, and rows of Parquet files, Arrow
    files and hub datasets; stop is -1 for a file that can only be read from start to end. At most
    max_rows records are taken.
    """

    file: str
    start: int
    stop: int
    max_rows: int | None = None


class BadRowError(UserError):
    """A record that cannot be used; the file as a whole can still be read.

    Attributes:
        where: `file:line` of the record.
        reason: the fault, without file and line.
    """

    def __init__(self, where: str, found: str, *, allowed: str = "", fix: str = "") -> None:
        super().__init__(f"{where}: {found}", allowed=allowed, fix=fix)
        self.where = where
        self.reason = found + (f" | allowed: {allowed}" if allowed else "")


OnBadRow = Callable[[BadRowError], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One raw record: number `number` (from 1) after byte `base` of the file."""

    value: Any
    file: str
    number: int
    base: int = 0

    @property
    def where(self) -> str:
        """`file:line`; counts lines, so only messages should read it."""
        above = _lines_above(self.file, self.base, file_state(self.file)) if self.base else 0
        return f"{self.file}:{above + self.number}"

    @property
    def fields_found(self) -> str:
        """The names of the fields, for messages."""
        return f"fields found: {', '.join(map(str, self.value))}"

    def fail(self, found: str, allowed: str = "", fix: str = "") -> BadRowError:
        """Return an error that names this record's file and line."""
        return BadRowError(self.where, found, allowed=allowed, fix=fix)


def give_up(bad: BadRowError, on_bad: OnBadRow | None) -> None:
    """Hand a bad record to its collector; raise it where there is no collector."""
    if on_bad is None:
        raise bad
    on_bad(bad)


# A block's records have one base: its bad and dropped ones count the lines above only once.
@functools.lru_cache(maxsize=16)
def _lines_above(file: str, base: int, state: FileState) -> int:
    lines = 0
    with open_bytes(file) as handle:
        while base > 0 and (piece := handle.read(min(base, 2**20))):
            lines += piece.count(b"\n")
            base -= len(piece)
    return lines


_UNUSABLE = "cannot be used"
# Bad rows that a message shows.
_NUM_SHOWN = 5
# Characters of a dropped text that reports show.
EXCERPT = 160


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadRowCounts:
    """The bad rows of one task, as later tasks need them.

    Attributes:
        bad: how many there are, where they stop the build.
        bad_dropped: how many were dropped instead.
        first_bad: fault and fix of the first few.
    """

    bad: int
    bad_dropped: int
    first_bad: list[tuple[str, str]]


@dataclasses.dataclass(slots=True)
class BadRows:
    """Bad rows of a source, dropped or counted as its `on_bad_row` demands.

    Attributes:
        dropped: entries of dropped.jsonl, where they are dropped.
        count: how many there are, where they stop the build.
        first: fault and fix of the first few of them.
    """

    source: SourceConfig
    dropped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    count: int = 0
    first: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, bad: BadRowError) -> None:
        """Take a bad row."""
        # Of dropped rows, too: if all are dropped, the build stops with their faults.
        if len(self.first) < _NUM_SHOWN:
            self.first.append((f"{bad.where}: {bad.reason}", bad.fix))
        if self.source.on_bad_row == "drop":
            self.drop(bad.where, "row", _UNUSABLE, "", detail=bad.reason)
        else:
            self.count += 1

    def drop(self, where: str, kind: str, reason: str, text: str, *, detail: str = "") -> None:
        """List something that is left out."""
        entry = {
            "source": self.source.name,
            "where": where,
            "dropped": kind,
            "reason": reason,
            "text": whole_characters(text[:EXCERPT]),
        }
        self.dropped.append(entry | ({"detail": whole_characters(detail)} if detail else {}))

    @property
    def summary(self) -> BadRowCounts:
        """The counts for `refuse_bad_rows`."""
        dropped = sum(entry["reason"] == _UNUSABLE for entry in self.dropped)
        return BadRowCounts(bad=self.count, bad_dropped=dropped, first_bad=self.first)


def whole_characters(text: str) -> str:
    """Replace halves of surrogate pairs, which no file can hold."""
    return text.encode(errors="replace").decode()


def refuse_bad_rows(name: str, summaries: Sequence[BadRowCounts], num_read: int) -> None:
    """Refuse the bad rows of a source, all at once.

    Args:
        name: of the source.
        summaries: of its tasks, in order.
        num_read: rows of all tasks; 0 if they were not counted.

    Raises:
        UserError: there are bad rows, or all rows were dropped as such; it shows the first few.
    """
    count = sum(summary.bad for summary in summaries)
    dropped = sum(summary.bad_dropped for summary in summaries)
    if dropped and dropped == num_read:
        count = dropped  # nothing is left to build from
    if not count:
        return
    shown = [entry for summary in summaries for entry in summary.first_bad][:_NUM_SHOWN]
    fix = shown[0][1] or f"correct the {'row' if count == 1 else 'rows'}"
    if not dropped:
        fix += f", or set sources.{name}.on_bad_row: drop"
    texts = [text for text, _ in shown]
    raise UserError(_list_bad(f"sources.{name}", texts, count, num_read=num_read), fix=fix)


@dataclasses.dataclass(slots=True)
class BadRecords:
    """Bad records of an input that has no `on_bad_row`, to be refused all at once.

    Attributes:
        key: config key or option that names the input.
        count: how many there are.
        first: the first few of them.
    """

    key: str
    count: int = 0
    first: list[BadRowError] = dataclasses.field(default_factory=list)

    def add(self, bad: BadRowError) -> None:
        """Take a bad record."""
        self.count += 1
        if len(self.first) < _NUM_SHOWN:
            self.first.append(bad)

    def refuse(self) -> None:
        """Refuse the input if it has bad records.

        Raises:
            UserError: the count, and the faults of the first few.
        """
        if self.count == 1:
            raise self.first[0]
        if self.count:
            texts = [f"{bad.where}: {bad.reason}" for bad in self.first]
            fixes = dict.fromkeys(bad.fix for bad in self.first if bad.fix)
            fix = "; ".join(fixes) or "correct the rows, or leave them out"
            raise UserError(
                _list_bad(self.key, texts, self.count), fix=fix, docs="trouble.md#bad-rows"
            )


def _list_bad(key: str, texts: list[str], count: int, *, num_read: int = 0) -> str:
    """Return a message with the faults of the first rows of an input, and their number."""
    if count == 1:
        return texts[0]
    of = f" of {num_read}" if num_read else ""
    more = f"; and {count - len(texts)} more" if count > len(texts) else ""
    return f"{key}: {count}{of} rows cannot be used: {'; '.join(texts)}{more}"


# The largest number that the shards' float32 holds.
_LARGEST_NUMBER = 3.4028234663852886e38


def field_of(record: Record, key: str, *, required: bool = True) -> Any:
    """Return the value of a field, or at a dotted path.

    A step of a path is a key, or the number of a list's entry. The key of a list of objects is a
    list of their values.
    """
    try:
        return _value_at(record, key)
    except LookupError as error:
        if not required:
            return None
        raise record.fail(f"field {key!r} is missing", allowed=record.fields_found) from error


def _value_at(record: Record, key: str) -> Any:
    value: Any = record.value
    # A field whose own name has dots is not a path.
    path = [key] if isinstance(value, Mapping) and key in value else key.split(".")
    for part in path:
        value = _step(value, part)
    return value


def _step(value: Any, part: str) -> Any:
    """Return what one step of a path leads to.

    Raises:
        LookupError: nothing is there.
    """
    if isinstance(value, Mapping):
        return value[part]
    if not isinstance(value, list | tuple):
        raise LookupError(part)
    if re.fullmatch(r"-?\d+", part):
        return value[int(part)]
    return [_step(item, part) for item in value]


def fields_of(
    record: Record, names: Sequence[str], *, required: bool = True
) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each field; a glob yields all fields that match, in order.

    Numbers within names are ordered as numbers: negative_2 precedes negative_10. Without `required`
    a missing field is left out.
    """
    for name in names:
        if not re.search(r"[*?\[]", name) or name in record.value:
            if required or has_field(record, name):
                yield name, field_of(record, name)
            continue
        matching = [str(key) for key in record.value if fnmatch.fnmatchcase(str(key), name)]
        if required and not matching:
            raise record.fail(f"no field matches {name!r}", allowed=record.fields_found)
        for key in sorted(matching, key=_natural):
            yield key, record.value[key]


def has_field(record: Record, name: str) -> bool:
    """Return whether a record has the field that a name, a dotted path or a glob means."""
    try:
        _value_at(record, name)
    except LookupError:
        return any(fnmatch.fnmatchcase(str(key), name) for key in record.value)
    return True


def _natural(name: str) -> list[tuple[int, str]]:
    # Pairs, because numbers and texts cannot be compared: at one place, texts precede numbers.
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def require_whole_characters(record: Record, *texts: str) -> None:
    """Refuse half a surrogate pair: JSON can hold it, but neither a file nor a tokenizer.

    A text that was cut in the middle of an emoji ends with one.

    Raises:
        BadRowError: one of the texts holds it.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise record.fail(
                f"a text with half a surrogate pair ({text[error.start]!r})",
                fix="repair the character in the source",
            ) from error


def required_text(record: Record, key: str) -> str:
    """Return a text that every record must have."""
    return _text(record, key, field_of(record, key))


def _text(record: Record, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise record.fail(f"{key!r} is {kind_name(value)}", allowed="a text")
    return value


def optional_text(record: Record, key: str) -> str:
    """Return a text; empty where the field is missing or null."""
    value = field_of(record, key, required=False)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise record.fail(f"{key!r} is {kind_name(value)}", allowed="a text or null")
    return value


def text_or_chat(record: Record, key: str) -> str:
    """Return a text, the messages of a chat as one, or the only text at a path through a list."""
    value = field_of(record, key)
    if _is_chat(value):
        return _chat(record, key, value)
    if key not in record.value and isinstance(value, list) and len(value) == 1:
        (value,) = value
    return _text(record, key, value)


def texts_in(record: Record, key: str, value: Any) -> tuple[str, ...]:
    """Return the texts of a field: one, a list of them, or a chat or chats.

    A text may be written as an object with `text` and perhaps `title`.
    """
    if _is_chat(value) or not isinstance(value, list | tuple):
        value = [value]
    return tuple(_document(record, key, item) for item in value)


def optional_texts(record: Record, key: str) -> tuple[str, ...]:
    """Return the texts of a field; none where it is missing or null."""
    value = field_of(record, key, required=False)
    return () if value is None else texts_in(record, key, value)


def required_texts(record: Record, key: str) -> tuple[str, ...]:
    """Return the texts of a field that every record must have."""
    return texts_in(record, key, field_of(record, key))


def _document(record: Record, key: str, item: Any) -> str:
    if isinstance(item, str):
        return item
    if _is_chat(item):
        return _chat(record, key, item)
    if isinstance(item, Mapping) and isinstance(item.get("text"), str):
        title = item.get("title") or ""
        return f"{title} {item['text']}".strip() if isinstance(title, str) else item["text"]
    if _is_message(item):
        return _chat(record, key, [item])
    raise record.fail(
        f"{key!r} holds {kind_name(item)}", allowed="texts, or objects with text and title"
    )


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and "content" in item


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_message, value))


def _chat(record: Record, key: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the contents of messages, each on a new line."""
    contents = []
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list | tuple) else [content]:
            if isinstance(part, Mapping) and part.get("type", "text") == "text":
                part = part.get("text")
            if not isinstance(part, str):
                raise record.fail(
                    f"{key!r}: a message whose content is {kind_name(part)}", allowed="texts"
                )
            contents.append(part)
    return "\n".join(contents)


def numbers(
    record: Record, key: str, value: Any, *, allow_bools: bool = False
) -> tuple[float, ...]:
    """Return a number or a list of them, all finite and within float32."""
    if isinstance(value, list | tuple):
        entries = [(f"entry {number} of {key!r}", item) for number, item in enumerate(value, 1)]
    else:
        entries = [(repr(key), value)]
    return tuple(_number(record, name, item, allow_bools) for name, item in entries)


def _number(record: Record, name: str, value: Any, allow_bools: bool) -> float:
    # The cells of a delimited file are texts, numbers among them.
    if isinstance(value, str) and kind_of(record.file) == "csv":
        try:
            value = float(value)
        except ValueError as error:
            raise record.fail(
                f"{name} is {_shown(value) or 'empty'}", allowed="a number"
            ) from error
    refused_bool = isinstance(value, bool) and not allow_bools
    # Decimals come from Parquet.
    if refused_bool or not isinstance(value, int | float | Decimal):
        raise record.fail(f"{name} is {kind_name(value)}", allowed="a number")
    try:
        number = float(value)
    except OverflowError:  # a JSON integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number) or abs(number) > _LARGEST_NUMBER:
        raise record.fail(f"{name} is {_shown(str(value))}", allowed="a finite float32")
    return number


def _shown(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:20]}... ({len(value)} characters)"


def kind_name(value: Any) -> str:
    """Return the kind of a value, for messages."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"a {type(value).__name__}"


def equals(value: Any, wanted: bool | int | float | str) -> bool:
    """Compare a field with the value in a config, whichever way either is spelt."""
    if value is None:
        return False
    # Python writes True where JSON, YAML and CSV files write true.
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    if str(value) == str(wanted):
        return True
    # pandas writes whole numbers as 1.0 where another row has none. A text is compared as one.
    if isinstance(wanted, str):
        return False
    try:
        return Decimal(str(value)) == Decimal(str(wanted))
    except InvalidOperation:
        return False
