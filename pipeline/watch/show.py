"""Show views in a terminal, or as plain text where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.watch.view import Fact, Grid, Tone, View

_STYLES: dict[Tone, str] = {"": "", "ok": "green", "warn": "yellow", "fail": "red"}
# In a pipe, no line is cut or wrapped: programs search them.
_PIPE_WIDTH = 10_000


def make_console() -> Console:
    """Return a console for standard output, without colours and line breaks in a pipe."""
    console = Console(highlight=False, soft_wrap=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=_PIPE_WIDTH, color_system=None, legacy_windows=False)


def render(views: Sequence[View], console: Console) -> RenderableType:
    """Return everything as one block for rich."""
    return Group(*(part for view in views for part in _view(view, console)))


def _view(view: View, console: Console) -> Iterator[RenderableType]:
    yield Text.assemble((view.title, "bold"), "  ", (view.state, _STYLES[view.tone] or "bold"))
    if view.done is not None and console.is_terminal:
        yield ProgressBar(total=1.0, completed=view.done, width=min(60, console.width))
    if view.facts:
        yield _facts(view.facts)
    for grid in view.grids:
        yield _grid(grid)


def _facts(facts: Sequence[Fact]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(Text(fact.name), Text(fact.value, style=_STYLES[fact.tone]))
    return table


def _grid(grid: Grid) -> Table:
    table = Table(
        title=Text(grid.title, style="bold"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1)
    )
    for number, name in enumerate(grid.header):
        cells = [row[number] for row in grid.rows]
        right = number > 0 and all(_is_number(cell) for cell in cells)
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for number, row in enumerate(grid.rows):
        table.add_row(*map(Text, row), style=_STYLES[grid.tone_of(number)] or None)
    return table


def _is_number(cell: str) -> bool:
    return not cell or cell.replace(",", "").replace(".", "").replace("-", "").isdigit()
