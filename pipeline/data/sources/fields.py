"""Fields of a record as texts and numbers; every message names the file, the line and the field."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pipeline.data.sources.blocks import Record
from pipeline.data.sources.files import kind_of

# The largest number that the shards' float32 holds.
_LARGEST_NUMBER = 3.4028234663852886e38


def field_of(record: Record, key: str, *, required: bool = True) -> Any:
    """Return the value of a field, or at a dotted path of keys."""
    value: Any = record.value
    # A name that holds a dot is itself before it is a path.
    parts = [key] if isinstance(value, Mapping) and key in value else key.split(".")
    for part in parts:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif required:
            found = ", ".join(map(str, record.value))
            raise record.fail(f"field {key!r} is missing", allowed=f"fields found: {found}")
        else:
            return None
    return value


def fields_of(record: Record, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each field; a glob stands for all fields that match, in order.

    Numbers within names are ordered as numbers: negative_2 precedes negative_10.
    """
    for name in names:
        if not re.search(r"[*?\[]", name) or name in record.value:
            yield name, field_of(record, name)
            continue
        matching = [str(key) for key in record.value if fnmatch.fnmatchcase(str(key), name)]
        if not matching:
            found = ", ".join(map(str, record.value))
            raise record.fail(f"no field matches {name!r}", allowed=f"fields found: {found}")
        for key in sorted(matching, key=_natural):
            yield key, record.value[key]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def required_text(record: Record, key: str) -> str:
    """Return a text, which may be missing in no record."""
    value = field_of(record, key)
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
    """Return a text, or the messages of a chat as one."""
    value = field_of(record, key)
    return _chat(record, key, value) if _is_chat(value) else required_text(record, key)


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
    """Return the texts of a field that must be there."""
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
    """Return the contents of messages, one after the other on lines of their own."""
    contents = []
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list | tuple) else [content]
        for part in parts:
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
        entries = [(f"entry {place} of {key!r}", item) for place, item in enumerate(value, 1)]
    else:
        entries = [(repr(key), value)]
    return tuple(_number(record, name, item, allow_bools) for name, item in entries)


def _number(record: Record, name: str, value: Any, allow_bools: bool) -> float:
    allowed = "a number" if isinstance(value, str | None | Mapping | list) else "a finite float32"
    # A table of text has texts for numbers.
    if isinstance(value, str) and kind_of(record.file) == "csv":
        try:
            value = float(value)
        except ValueError as error:
            raise record.fail(
                f"{name} is {_shown(value) or 'empty'}", allowed="a number"
            ) from error
    if isinstance(value, bool) and not allow_bools:
        raise record.fail(f"{name} is {kind_name(value)}", allowed="a number")
    if not isinstance(value, int | float | Decimal):
        raise record.fail(f"{name} is {kind_name(value)}", allowed=allowed)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > _LARGEST_NUMBER:
        raise record.fail(f"{name} is {_shown(str(value))}", allowed="a finite float32")
    return number


def _shown(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:20]}... ({len(value)} characters)"


def kind_name(value: Any) -> str:
    """Return what a value is, for messages."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"a {type(value).__name__}"


def equals(value: Any, wanted: bool | int | float | str) -> bool:
    """Whether a field has the value that a config asks for, however either is written."""
    if value is None:
        return False
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    return str(value) == str(wanted)
