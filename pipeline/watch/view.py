"""Hold the numbers that `watch` shows, for terminal and page, and draw the page.

View ──> title, facts, tables          the same strings as in the terminal
     ──> plots by matplotlib, as SVG   thinned, so that a long run stays a small file

The page is one HTML file: no server, no script, nothing loaded.
"""

from __future__ import annotations

import dataclasses
import datetime
import html
import io
import itertools
import math
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

# Cells that are set right: numbers as tables write them (1,234, -0.5), and dates.
_NUMBER = re.compile(r"[,.-]*\d[\d,.-]*")
# Decides the colour: none, good, worth a look, failed.
Tone = Literal["", "ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One line: a name and its value."""

    name: str
    value: str
    tone: Tone = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """One table, not shown without rows; `tones` has the tone of each row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    tones: tuple[Tone, ...] = ()

    def tone_of(self, row: int) -> Tone:
        """Return the tone of a row."""
        return self.tones[row] if row < len(self.tones) else ""

    def is_numeric(self, column: int) -> bool:
        """Return True if a column holds numbers; the first one names its row."""
        cells = [row[column] for row in self.rows]
        return column > 0 and all(not cell or _NUMBER.fullmatch(cell) for cell in cells)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One plot of the page: points (x, y) by the name of their line."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Everything about one folder at one moment.

    Attributes:
        title: kind and path.
        state: in a few words: running, finished, ...
        done: the share of the work that is done, if it is known.
        curve: lines of metrics with a loss, for the page's plot of it.
    """

    title: str
    state: str
    tone: Tone = ""
    done: float | None = None
    facts: tuple[Fact, ...] = ()
    grids: tuple[Grid, ...] = ()
    plots: tuple[Plot, ...] = ()
    curve: tuple[dict[str, float], ...] = ()

    def fact(self, name: str) -> str:
        """Return the value of the fact with a name; empty without one."""
        return next((fact.value for fact in self.facts if fact.name == name), "")


def duration(seconds: float) -> str:
    """Return a duration as people say it: `45 s`, `12 min`, `3:05 h`, `2 days 4 h`."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60}:{minutes % 60:02} h"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"


def age(path: Path) -> float | None:
    """Return the seconds since a file was last changed; None without the file."""
    try:
        # A file server's clock may be ahead of this one.
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def oldest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort files by the time of their last change; files that vanish meanwhile come last."""

    def changed(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:
            return math.inf

    return sorted(paths, key=changed)


# Points of one line in a plot: more than the pixels of its width would only make the page larger.
_MAX_POINTS = 1000
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em;
       color: #222; background: #fff }
h1 { font-size: 1.3em; overflow-wrap: anywhere } h2 { font-size: 1.05em; margin: 1.6em 0 .4em }
table { border-collapse: collapse } td, th { padding: .2em 1.6em .2em 0; text-align: left;
       vertical-align: top; overflow-wrap: anywhere } thead th { border-bottom: 1px solid #888 }
tbody th { font-weight: normal; color: #777 } .number { text-align: right; overflow-wrap: normal }
td.number { white-space: nowrap }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(32em, 100%), 1fr));
       gap: 0 2em }
progress { width: 30em; max-width: 100% } .ok { color: #0a7a2f } .warn { color: #8a5a00 }
.fail { color: #b00020 } svg { max-width: 100%; height: auto } footer { color: #777; margin: 2em 0 }
"""


def page(views: Sequence[View], *, refresh_seconds: float | None) -> str:
    """Return the whole page; a browser reloads it after these seconds, None for never."""
    refresh = (
        f'<meta http-equiv="refresh" content="{refresh_seconds:.0f}">' if refresh_seconds else ""
    )
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    body = "\n".join(part for view in views for part in _view(view))
    title = html.escape(views[0].title if views else "nothing")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{refresh}'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f"<footer>diffembed watch, {now}</footer>\n</body></html>\n"
    )


def _view(view: View) -> Iterator[str]:
    state = f'<span class="{view.tone}">{html.escape(view.state)}</span>'
    yield f"<h1>{html.escape(view.title)}: {state}</h1>"
    if view.done is not None:
        yield f'<p><progress max="1" value="{view.done:.4f}"></progress> {view.done:.0%}</p>'
    if view.facts:
        rows = "".join(
            f'<tr class="{fact.tone}"><th>{html.escape(fact.name)}</th>'
            f"<td>{html.escape(fact.value)}</td></tr>"
            for fact in view.facts
        )
        yield f"<table><tbody>{rows}</tbody></table>"
    yield from (_grid(grid) for grid in view.grids if grid.rows)
    drawings = [("loss by step", _loss_svg(view.curve))] if view.curve else []
    drawings += [(plot.title, _plot_svg(plot)) for plot in view.plots]
    yield '<div class="plots">'
    for title, svg in drawings:
        yield f"<section><h2>{html.escape(title)}</h2>\n{svg}</section>"
    yield "</div>"


def _grid(grid: Grid) -> str:
    sides = [' class="number"' if grid.is_numeric(n) else "" for n in range(len(grid.header))]
    head = "".join(
        f"<th{side}>{html.escape(name)}</th>" for side, name in zip(sides, grid.header, strict=True)
    )
    rows = "".join(
        f'<tr class="{grid.tone_of(number)}">'
        + "".join(
            f"<td{side}>{html.escape(cell)}</td>" for side, cell in zip(sides, row, strict=True)
        )
        + "</tr>\n"
        for number, row in enumerate(grid.rows)
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
    return f"<h2>{html.escape(grid.title)}</h2>\n{table}"


def thin(points: Sequence[Any]) -> list[Any]:
    """Return at most `_MAX_POINTS` of the points, evenly spaced, with the first and the last."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    step = (len(points) - 1) / (_MAX_POINTS - 1)
    return [points[round(number * step)] for number in range(_MAX_POINTS)]


def _loss_svg(curve: Sequence[dict[str, float]]) -> str:
    """Draw the loss as the report of an evaluation does."""
    from pipeline.evaluation.tables import by_kind, plot_loss

    # Thinned by kind: a rare kind must not disappear. Then by step again, as the curve was: the
    # plot draws the learning rate through all lines in their order.
    kept = itertools.chain.from_iterable(thin(lines) for lines in by_kind(curve).values())
    lines = sorted(kept, key=lambda line: line["step"])
    # In a file, because a report's plots are files.
    with tempfile.TemporaryDirectory() as folder, _svg_settings("loss"):
        return _inline(plot_loss(Path(folder) / "loss.svg", lines).read_text())


def _plot_svg(plot: Plot) -> str:
    from matplotlib.figure import Figure

    from pipeline.evaluation.tables import as_label

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, points in plot.lines.items():
        thinned = thin(points)
        # A single point draws no line; many marks would hide it.
        mark = "." if len(thinned) < 50 else ""
        xs, ys = [point[0] for point in thinned], [point[1] for point in thinned]
        axes.plot(xs, ys, marker=mark, linewidth=1.2, label=as_label(name) or None)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    if any(plot.lines):  # a line without a name needs no legend
        axes.legend(fontsize=7)
    text = io.StringIO()
    with _svg_settings(plot.title):
        figure.savefig(text, format="svg")
    return _inline(text.getvalue())


def _svg_settings(name: str) -> Any:
    from matplotlib import rc_context

    # Text stays text, so that a browser can search it. Ids inside a drawing are hashes of the salt:
    # with one salt for all, a plot of the page would be clipped like another; without one they are
    # random, and the same numbers would give another page.
    return rc_context({"svg.fonttype": "none", "svg.hashsalt": name})


def _inline(svg: str) -> str:
    """Return the drawing without the prologue of a file, and without metadata and its addresses."""
    drawing = svg[svg.index("<svg") :]
    before, mark, rest = drawing.partition("<metadata>")
    return before + rest.partition("</metadata>")[2] if mark else drawing
