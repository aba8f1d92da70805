"""Write the report on generated data: `quality/README.md`, `quality.json` and plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from pipeline.evaluation.tables import markdown_table
from pipeline.files import write_json, write_text
from ReasonAug.quality import BLEU_TEXTS, NAMED, PERCENTILES, SIDES, SIMILAR, WORDS, Figures, share
from ReasonAug.synthesis.config import StrictConfig


def write_quality(figures: Figures, thresholds: StrictConfig, folder: Path) -> Path:
    """Write the report (Markdown, JSON, plots) to `quality/` below a folder; return the page."""
    folder = folder / "quality"
    tree = {
        field.name: getattr(figures, field.name)
        for field in dataclasses.fields(figures)
        if field.name != "histograms"
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "quality.json", tree)
    _plot_yield(folder / "yield.png", figures)
    _plot_lengths(folder / "lengths.png", figures)
    page = folder / "README.md"
    write_text(page, quality_page(figures, thresholds))
    return page


def quality_page(figures: Figures, thresholds: StrictConfig) -> str:
    """Return the report as Markdown."""
    sections = {
        "Summary": (["figure", "value", "allowed"], _summary_rows(figures, thresholds)),
        "Yield": (["stage", "domain", "kept", "of", "share", "dropped"], _yield_rows(figures)),
        "Solutions": (
            ["domain", "checked", "second agree", "share", "programs pass", "share"],
            _solution_rows(figures),
        ),
        "Leakage": (
            ["kind", "rows", "query and positive name the concept", "share"],
            _leaks(figures),
        ),
        "Repetition and diversity of problems": (
            ["measure", *figures.texts],
            [
                [name, *(_number(found[name]) for found in figures.texts.values())]
                for name in figures.texts["own"]
            ],
        ),
        "Lengths in tokens": (
            ["text", *(f"{p} %" for p in PERCENTILES)],
            [[kind, *map(str, found.values())] for kind, found in figures.lengths.items()],
        ),
    }
    parts = ["# Quality"]
    for title, (header, rows) in sections.items():
        parts.append(f"## {title}\n\n{markdown_table(header, rows)}")
    notes = (
        f"Near-duplicates share {SIMILAR:.0%} of their word 5-grams (estimated). distinct_n: the "
        f"share of distinct n-grams in the same number of words of each column, at most "
        f"{WORDS:,}. self_bleu: BLEU of each of {BLEU_TEXTS} problems against the others. A row "
        f"leaks if query and positive name the concept; the summary leaves out "
        f"{' and '.join(NAMED)}, whose queries are or contain the name on purpose."
    )
    return "\n\n".join([*parts, notes, "![yield](yield.png)", "![lengths](lengths.png)"]) + "\n"


def _summary_rows(figures: Figures, thresholds: StrictConfig) -> list[list[str]]:
    allowed = {
        field.name.partition("_")[2]: f"{SIDES[field.name[:3]]} {value:g}"
        for field in dataclasses.fields(thresholds)
        if (value := getattr(thresholds, field.name)) is not None
    }
    return [
        [name, _number(value), allowed.get(name, "")]
        for name, value in sorted(figures.totals.items())
    ]


def _yield_rows(figures: Figures) -> list[list[str]]:
    rows = []
    for stage, domains in figures.stages.items():
        for domain, fates in domains.items():
            kept, total = fates.get("kept", 0), sum(fates.values())
            dropped = ", ".join(
                f"{count} {fate}" for fate, count in fates.items() if fate != "kept"
            )
            rows.append([stage, domain, *_parts(kept, total), dropped])
    return rows


def _solution_rows(figures: Figures) -> list[list[str]]:
    return [
        [
            domain,
            str(found["checked"]),
            f"{found['agreed']} of {found['second']}",
            _number(share(found["agreed"], found["second"])),
            f"{found['passed']} of {found['executed']}",
            _number(share(found["passed"], found["executed"])),
        ]
        for domain, found in figures.solutions.items()
    ]


def _leaks(figures: Figures) -> list[list[str]]:
    rows = []
    for kind, found in sorted(figures.rows.items()):
        rows.append([kind, str(found["rows"]), *_parts(found["leaking"], found["rows"])[::2]])
    return rows


def _parts(part: int, whole: int) -> list[str]:
    return [str(part), str(whole), _number(share(part, whole))]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _plot_yield(path: Path, figures: Figures) -> None:
    """Draw the share of problems that are left after each stage, a line per domain."""
    # Slow to import, and needed only where something is drawn.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    domains = dict.fromkeys(d for found in figures.stages.values() for d in found)
    for domain in domains:
        counts = [found.get(domain, {}) for found in figures.stages.values()]
        start = sum(counts[0].values()) or 1
        left = [each.get("kept", 0) / start for each in counts]
        axes.plot(list(figures.stages), left, marker="o", label=domain)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of written problems that are left")
    if domains:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _plot_lengths(path: Path, figures: Figures) -> None:
    """Draw histograms of lengths: problems and solutions, and the texts of rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = ("query", "positive", "negative")
    for kind, histogram in figures.histograms.items():
        axes = right if kind in rows else left
        values = np.array(sorted(histogram.elements()))
        bins = np.geomspace(1, max(2, values[-1]), 40)
        style = "dashed" if kind.startswith("reference") else "solid"
        axes.hist(values, bins, histtype="step", density=True, label=kind, linestyle=style)
    for axes, title in ((left, "problems"), (right, "rows")):
        axes.set_xscale("log")
        axes.set_xlabel("tokens")
        axes.set_title(title, fontsize=10)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
