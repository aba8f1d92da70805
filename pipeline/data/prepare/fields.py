"""Refuse a misspelt field of a column that rows may lack.

A row without negatives, instruction or concept is fine; a field that no row of a source has is a
mistake, which would otherwise silently read nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import SourceConfig
from pipeline.data.prepare.build import CollectSummary
from pipeline.data.sources.records import Record, has_field
from pipeline.errors import UserError

_MAY_BE_ABSENT = ("negatives", "instruction", "concept")


class FieldsFound:
    """The fields of a block's rows.

    Attributes:
        absent: columns whose field no row so far has; all of them before the first row.
        first: the fields of the first row, for messages.
    """

    def __init__(self, source: SourceConfig) -> None:
        self._columns = source.columns
        self.absent = {name for name in _MAY_BE_ABSENT if name in source.columns}
        self.first = ""

    def add(self, record: Record) -> None:
        """Take a row."""
        self.first = self.first or record.fields_found
        for column in list(self.absent):
            of = self._columns[column]
            if any(has_field(record, name) for name in ((of,) if isinstance(of, str) else of)):
                self.absent.remove(column)


def refuse_absent_fields(source: SourceConfig, blocks: Sequence[CollectSummary]) -> None:
    """Refuse a column whose field is in no row of any block of a source.

    Raises:
        UserError: there is one.
    """
    read = [block for block in blocks if block.fields]
    if not read:
        return
    for column in sorted(set.intersection(*(set(block.absent) for block in read))):
        raise UserError(
            f"sources.{source.name}.columns.{column}: no row has the field "
            f"{source.columns[column]!r}",
            allowed=read[0].fields,
            fix=f"correct the name, or leave {column} out",
        )
