"""Bad rows of one task: listed as dropped, or counted for the message that refuses them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config import SourceConfig
from pipeline.data.sources.blocks import BadRowError
from pipeline.errors import UserError

_UNUSABLE = "cannot be used"
# So many are shown in a message.
_NUM_SHOWN = 5
# A dropped text is shown by its beginning.
EXCERPT = 160


@dataclasses.dataclass(slots=True)
class BadRows:
    """What a source's `on_bad_row` makes of each bad row.

    Attributes:
        dropped: entries of dropped.jsonl, where they are dropped.
        count: how many there are, where they stop the build.
        first: what is wrong with the first few of them, and how to mend it.
    """

    source: SourceConfig
    dropped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    count: int = 0
    first: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, bad: BadRowError) -> None:
        """Take a bad row."""
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
            "text": _whole_characters(text[:EXCERPT]),
        }
        self.dropped.append(entry | ({"detail": _whole_characters(detail)} if detail else {}))

    @property
    def summary(self) -> dict[str, Any]:
        """For `refuse_bad_rows`, as JSON."""
        dropped = sum(entry["reason"] == _UNUSABLE for entry in self.dropped)
        return {"bad": self.count, "bad_dropped": dropped, "first_bad": self.first}


def _whole_characters(text: str) -> str:
    return text.encode(errors="replace").decode()


def refuse_bad_rows(name: str, summaries: Iterable[Mapping[str, Any]], num_read: int) -> None:
    """Refuse the bad rows of a source, all at once.

    Args:
        name: of the source.
        summaries: of its tasks, in order.
        num_read: rows read in all; 0 if they were not counted.

    Raises:
        UserError: there are bad rows, or all rows were dropped as such; it shows the first few.
    """
    summaries = list(summaries)
    count = sum(summary["bad"] for summary in summaries)
    dropped = sum(summary["bad_dropped"] for summary in summaries)
    if dropped and dropped == num_read:
        count = dropped  # nothing is left to build from
    if not count:
        return
    shown = [entry for summary in summaries for entry in summary["first_bad"]][:_NUM_SHOWN]
    fix = shown[0][1] or f"mend the {'row' if count == 1 else 'rows'}"
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
            UserError: the count, and what is wrong with the first few.
        """
        if self.count == 1:
            raise self.first[0]
        if self.count:
            texts = [f"{bad.where}: {bad.reason}" for bad in self.first]
            fixes = dict.fromkeys(bad.fix for bad in self.first if bad.fix)
            fix = "; ".join(fixes) or "mend the rows, or leave them out"
            raise UserError(_list_bad(self.key, texts, self.count), fix=fix)


def _list_bad(key: str, texts: list[str], count: int, *, num_read: int = 0) -> str:
    """Say what is wrong with the first rows of an input, and how many there are."""
    if count == 1:
        return texts[0]
    of = f" of {num_read}" if num_read else ""
    more = f"; and {count - len(texts)} more" if count > len(texts) else ""
    return f"{key}: {count}{of} rows cannot be used: {'; '.join(texts)}{more}"
