"""Turn the scores of a report into intervals, tables and plots.

    query scores --> interval, paired_difference --> entries of report.json
    entries      --> *_rows: header and rows of strings --> markdown_table, latex_table, ...
    entries      --> plot_*: PNG files

`published.yaml` holds scores of other authors, with their sources and protocols.

Letters: N values, Q queries, R resamples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from huggingface_hub import EvalResult
from numpy.typing import NDArray

from pipeline.evaluation.tasks import BENCHMARKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Another seed then moves the ends of an interval by less than 1 % of its width.
_RESAMPLES = 10_000
_SEED = 20240817
# Query scores by `subset/split`; a task's score is the mean of its splits' means.
Strata = Mapping[str, Mapping[str, float]]
# Header and rows.
Table = tuple[list[str], list[list[str]]]


def interval(scores: Strata) -> tuple[float, float]:
    """Return the 95 % percentile interval of a task's score; queries are resampled per split."""
    # Sorted, because counts are drawn by position: another order would give another interval.
    return _confidence_interval([np.array([s[q] for q in sorted(s)]) for s in scores.values()])


def paired_difference(after: Strata, before: Strata) -> tuple[float, float, float]:
    """Return the score of `after` minus the score of `before`, with its 95 % interval.

    Both are resampled with the same queries: the part of a query's difficulty that both share
    cancels.

    Raises:
        ValueError: the two were not scored on the same queries.
    """
    if {k: set(v) for k, v in after.items()} != {k: set(v) for k, v in before.items()}:
        raise ValueError("two results to compare hold different queries")
    strata = [
        np.array([after[name][query] - before[name][query] for query in sorted(after[name])])
        for name in sorted(after)
    ]
    low, high = _confidence_interval(strata)
    return float(np.mean([stratum.mean() for stratum in strata])), low, high


def _confidence_interval(strata: list[np.ndarray]) -> tuple[float, float]:
    # One fixed seed: the same results always give the same report.
    generator = np.random.default_rng(_SEED)
    means_R = np.zeros(_RESAMPLES)
    for values in strata:
        # Multinomial counts are the resampled queries without their order: (R, Q) stays small.
        counts_RQ = generator.multinomial(
            len(values), np.full(len(values), 1 / len(values)), size=_RESAMPLES
        )
        # (R, Q) @ (Q,): the mean of each resample.
        means_R += counts_RQ @ values / len(values)
    low, high = np.quantile(means_R / len(strata), (0.025, 0.975))
    return float(low), float(high)


def score_rows(models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Table:
    """One row per task: every model's score, chance, and the difference with its interval."""
    header = ["task", "metric", *models, "chance"]
    if len(models) > 1:
        header += ["difference", "95 % interval"]
    rows = []
    for task in tasks:
        row = [task["name"], task["metric"], *(f"{task[model]:.4f}" for model in models)]
        row.append("" if task["chance"] is None else f"{task['chance']:.4f}")
        if len(models) > 1:
            row += [f"{task['difference']:+.4f}", _interval_cell(task)]
        rows.append(row)
    return header, rows


def card_rows(model: str, tasks: Sequence[dict[str, Any]]) -> Table:
    """One row per task for the card of a single model."""
    rows = []
    for task in tasks:
        low, high = task["intervals"][model]
        cells = [f"{task[model]:.4f}", f"[{low:.4f}, {high:.4f}]", str(task["max_length"])]
        rows.append([task["name"], task["metric"], *cells])
    return ["task", "metric", "score", "95 % interval", "max length"], rows


def card_results(model: str, tasks: Sequence[dict[str, Any]]) -> list[EvalResult]:
    """Return the scores of a single model as metadata of its card."""
    return [
        EvalResult(
            task_type="Retrieval",
            dataset_type=task["task"],
            dataset_name=task["name"],
            metric_type=task["metric"],
            metric_value=task[model],
            metric_args={"max_length": task["max_length"]},
        )
        for task in tasks
    ]


def pair_rows(tasks: Sequence[dict[str, Any]]) -> Table | None:
    """One row per pair of models: their difference on every task; None for less than three."""
    if "pairs" not in tasks[0]:
        return None
    rows = []
    for number, pair in enumerate(tasks[0]["pairs"]):
        found = [task["pairs"][number] for task in tasks]
        cells = [f"{entry['difference']:+.4f} {_interval_cell(entry)}" for entry in found]
        rows.append([f"{pair['model']} - {pair['minus']}", *cells])
    return ["models", *(task["name"] for task in tasks)], rows


def _interval_cell(entry: dict[str, Any]) -> str:
    # ns: not significant.
    mark = "" if entry["significant"] else " ns"
    return f"[{entry['ci_low']:+.4f}, {entry['ci_high']:+.4f}]{mark}"


def with_splits(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tasks that have several splits, usually one per document length."""
    return [task for task in tasks if len(next(iter(task["by_split"].values()))) > 1]


def split_rows(models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Table | None:
    """One row per split of the tasks with several, with the difference; None without such tasks."""
    header = ["task", "split", *models]
    if len(models) > 1:
        header += ["difference", "95 % interval"]
    rows = []
    for task in with_splits(tasks):
        for split in task["by_split"][models[0]]:
            scores = (f"{task['by_split'][model][split]:.4f}" for model in models)
            row = [task["name"], split, *scores]
            if len(models) > 1:
                found = task["split_differences"][split]
                row += [f"{found['difference']:+.4f}", _interval_cell(found)]
            rows.append(row)
    return (header, rows) if rows else None


def step_rows(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """One row per task, one column per step; empty where a step has no score yet."""
    steps = sorted({point["step"] for points in curves.values() for point in points})
    rows = []
    for task, points in curves.items():
        scores = {point["step"]: f"{point['score']:.4f}" for point in points}
        rows.append([task, points[0]["metric"], *(scores.get(step, "") for step in steps)])
    return ["task", "metric", *(f"step {step}" for step in steps)], rows


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PublishedColumn:
    """A published number: a task's score, or a part of it.

    Attributes:
        task: an mteb task.
        metric: a metric other than the task's main one.
        splits: mean over only these splits; over all splits if empty.
        part: label of the splits.
    """

    task: str
    metric: str = ""
    splits: tuple[str, ...] = ()
    part: str = ""

    def label(self, name: str) -> str:
        """Return the column's header; `name` is the task's in the report, with its length."""
        return f"{name} {self.metric or self.part}".strip()

    def ours(self, entry: Mapping[str, Any], model: str) -> float:
        """Return the same number of a model in the report, in percent."""
        if self.metric:
            return 100 * float(entry["other_scores"][model][self.metric])
        if self.splits:
            scores = [float(entry["by_split"][model][split]) for split in self.splits]
            return 100 * sum(scores) / len(scores)
        return 100 * float(entry[model])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """The content of `published.yaml`.

    Attributes:
        scores: model -> column -> percent.
        means: model -> benchmark -> percent, where only the mean was published.
    """

    scores: Mapping[str, Mapping[PublishedColumn, float]]
    means: Mapping[str, Mapping[str, float]]

    def columns(self, task: str) -> list[PublishedColumn]:
        """Return the published parts of a task's result."""
        # A dict as an ordered set.
        known = dict.fromkeys(column for scores in self.scores.values() for column in scores)
        return [column for column in known if column.task == task]


@functools.cache
def read_published() -> Published:
    """Read the scores of other authors."""
    path = Path(__file__).with_name("published.yaml")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    columns = {
        group: [
            PublishedColumn(**{**fields, "splits": tuple(fields.get("splits", ()))})
            for fields in found
        ]
        for group, found in tree["columns"].items()
    }
    scores = {
        model: {
            column: score
            for group, row in groups.items()
            for column, score in zip(columns[group], row, strict=True)
            if score is not None
        }
        for model, groups in tree["scores"].items()
    }
    return Published(scores=scores, means=tree["means"])


def published_scores(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the published scores of a task: column header -> model -> percent."""
    published = read_published()
    return {
        column.label(entry["name"]): {
            model: scores[column] for model, scores in published.scores.items() if column in scores
        }
        for column in published.columns(entry["task"])
    }


def published_table(models: Sequence[str], tasks: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return our numbers and published ones in percent, a row per model; None without published.

    Args:
        models: our models.
        tasks: entries of report.json; replicas of a data set are left out.
    """
    published = read_published()
    tasks = [entry for entry in tasks if not entry["replica"]]
    columns = [(column, entry) for entry in tasks for column in published.columns(entry["task"])]
    means = _whole_benchmarks(tasks)
    if not columns and not means:
        return None
    header = ["model", *(column.label(entry["name"]) for column, entry in columns)]
    header += [f"{benchmark} mean" for benchmark in means]
    rows = []
    for model in models:
        scores = [column.ours(entry, model) for column, entry in columns]
        scores += [100 * sum(e[model] for e in own) / len(own) for own in means.values()]
        rows.append([model, *(f"{score:.1f}" for score in scores)])
    # Models with scores first, then models with only means.
    for name in dict.fromkeys((*published.scores, *published.means)):
        # Models without a number in any of these columns get no row.
        row = [published.scores.get(name, {}).get(column) for column, _ in columns]
        row += [published.means.get(name, {}).get(benchmark) for benchmark in means]
        if any(score is not None for score in row):
            rows.append([name, *("" if score is None else f"{score:.1f}" for score in row)])
    return header, rows


def _whole_benchmarks(
    tasks: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    """Return the entries of each benchmark with published means whose tasks were all scored."""
    found = {}
    for benchmark in dict.fromkeys(b for means in read_published().means.values() for b in means):
        own = [entry for entry in tasks if entry["task"] in BENCHMARKS[benchmark]]
        # Lists, not sets: a task at two lengths appears twice, and has no single mean.
        if sorted(entry["task"] for entry in own) == sorted(BENCHMARKS[benchmark]):
            found[benchmark] = own
    return found


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first column left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in [header, rule, *rows]
    )


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a LaTeX tabular of the booktabs package."""
    lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in [header, *rows]]
    columns = "l" + "r" * (len(header) - 1)
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    )


def _latex(cell: str) -> str:
    # Backslashes do not occur in names, metrics and numbers.
    for symbol in "&%$#_{}":
        cell = cell.replace(symbol, "\\" + symbol)
    return cell


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format columns aligned with spaces, for a terminal or a job's log, whatever its width."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )


# Further kinds of batches are drawn in gray, without a name.
_NAMED_KINDS = 10


def _figure(width: float, height: float) -> Figure:
    # Slow to import, and needed only where something is drawn: not at the top.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_label(name: str) -> str:
    """Return a user's name for a plot, as matplotlib writes it unchanged.

    It takes text between two dollars for a formula, which may be none, and keeps names that begin
    with an underscore out of legends.
    """
    label = name.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def plot_scores(path: Path, models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Path:
    """Draw bars per task and model with 95 % intervals; a dashed line at chance level."""
    figure = _figure(max(6.0, 1.6 * len(tasks)), 4.2)
    axes = figure.subplots()
    centers = np.arange(len(tasks))
    # The bars of a task share 0.8 of its unit on the axis.
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        scores = np.array([task[model] for task in tasks])
        bounds = np.array([task["intervals"][model] for task in tasks])
        # A percentile interval need not contain the score itself, but bars reject negative errors.
        reach = np.maximum([scores - bounds[:, 0], bounds[:, 1] - scores], 0)
        at = centers + (number - (len(models) - 1) / 2) * width
        axes.bar(at, scores, width, yerr=reach, capsize=2, label=as_label(model))
    for center, task in zip(centers, tasks, strict=True):
        if task["chance"] is not None:
            left, right = center - 0.45, center + 0.45
            axes.hlines(task["chance"], left, right, "black", "dashed", linewidth=1)
    labels = [f"{task['name'].removesuffix('Retrieval')}\n{task['metric']}" for task in tasks]
    axes.set_xticks(centers, labels, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("score (dashes: chance)")
    axes.legend()
    return _save(figure, path)


def plot_splits(path: Path, models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Path:
    """Draw a panel per task: every model's score by split, that is, by document length."""
    figure = _figure(5.5 * len(tasks), 4.0)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for model in models:
            scores = task["by_split"][model]
            names = [split.removeprefix("test_") for split in scores]
            axes.plot(names, list(scores.values()), marker="o", markersize=3, label=as_label(model))
        axes.set_title(task["name"].removesuffix("Retrieval"), fontsize=10)
        axes.set_xlabel("split")
        axes.set_ylabel(task["metric"])
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="x", rotation=45)
    # The colors are the same in all panels.
    panels[0].legend(fontsize=8)
    return _save(figure, path)


def plot_loss(path: Path, curve: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the loss by step, running means for each kind of batch, and the learning rate."""
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    for number, (kind, lines) in enumerate(by_kind(curve).items()):
        steps = [line["step"] for line in lines]
        losses = np.array([line["loss"] for line in lines])
        color = f"C{number % 10}" if number < _NAMED_KINDS else "lightgray"
        axes.plot(steps, losses, ".", color=color, markersize=2, alpha=0.4)
        label = as_label(kind) if number < _NAMED_KINDS else None
        axes.plot(steps, running_mean(losses), color=color, linewidth=1.5, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (dots: batches, lines: running means)")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
    if all("lr" in line for line in curve):
        right = axes.twinx()
        steps = [line["step"] for line in curve]
        right.plot(steps, [line["lr"] for line in curve], color="black", linewidth=0.7, alpha=0.5)
        right.set_ylabel("learning rate")
        right.spines[:].set_visible(False)  # the same frame as the other axis's
    return _save(figure, path)


def by_kind(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group the lines of a curve by the kind of their batch, the most frequent kind first."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for line in curve:
        kinds.setdefault(line.get("kind", ""), []).append(line)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N,) means over a twentieth of the values around each one, fewer at the ends."""
    reach = len(values) // 40
    # Differences of running sums: N operations for a window of any width.
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    means: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return means


def plot_steps(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Draw the scores of checkpoints by step, with 95 % intervals; one line per task."""
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    for task, points in curves.items():
        steps = [point["step"] for point in points]
        scores = [point["score"] for point in points]
        (line,) = axes.plot(steps, scores, marker="o", label=as_label(task))
        low, high = ([point[key] for point in points] for key in ("ci_low", "ci_high"))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("score")
    axes.legend(fontsize=7)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
