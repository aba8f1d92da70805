"""Describe an evaluation from its folder: elements that are scored, run, failed or wait, by task.

    results/MODEL/TASK/LENGTH/result.json   scored
    jobs/diffembed-evaluate-JOB_I.out       log of element I of the array: runs, or has failed
    step-*/evaluate.yaml, jobs/evaluate-*.yaml, or the config on the command line   all elements

Without a config, only what is scored can be shown. Without logs it is not known what runs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pipeline.config import EvaluateConfig, load_config
from pipeline.errors import UserError
from pipeline.watch.logs import element_logs, jobs_grid, newest_log, read_json_or_none, read_log
from pipeline.watch.view import Fact, Grid, Tone, View, age, duration, oldest_first

State = Literal["scored", "failed", "running", "silent", "waiting"]
_STATES: tuple[State, ...] = ("scored", "running", "silent", "failed", "waiting")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One model on one task at one length."""

    model: str
    task: str
    length: str
    index: int | None = None  # in the array; None: not known
    state: State
    line: str = ""  # the failing line, or the log's last one
    metric: str = ""
    score: float | None = None


def describe_evaluation(root: Path, config: Path | None = None) -> View:
    """Describe an evaluation as its files are now.

    Args:
        root: its `output_dir`.
        config: its YAML file, if it is known.
    """
    elements, faults = _elements(root, config)
    counts = Counter(element.state for element in elements)
    facts = [
        Fact(
            "elements",
            ", ".join(f"{counts[state]:,} {state}" for state in _STATES if counts[state])
            or "none yet",
            "fail" if counts["failed"] else "",
        ),
        *_blocks(root),
        *(Fact("config", fault, "warn") for fault in faults),
        *_report(root),
        *_failed_jobs(root / "jobs"),
    ]
    jobs = jobs_grid(root / "jobs")
    logged = any((root / "jobs").glob("*.out"))
    # Without all configs there may be more to come.
    all_known = not faults
    state, tone = _state(elements, counts, logged=logged, all_known=all_known)
    return View(
        title=f"evaluation {root}",
        state=state,
        tone=tone,
        done=counts["scored"] / len(elements) if elements and all_known else None,
        facts=tuple(facts),
        grids=(_by_task(elements), _unfinished(elements), _scores(elements), jobs),
    )


def _state(
    elements: Sequence[Scored], counts: Counter[State], *, logged: bool, all_known: bool
) -> tuple[str, Tone]:
    if elements and counts["scored"] == len(elements):
        return ("finished", "ok") if all_known else ("every element found is scored", "")
    if counts["running"]:
        return "running", "fail" if counts["failed"] else "ok"
    if counts["failed"]:
        return "failed", "fail"
    if counts["silent"]:
        return "no log has changed for a while", "warn"
    if not counts["scored"]:
        return "waiting", ""
    # Without Slurm's logs, a process may well be running.
    return ("not running", "warn") if logged else ("not finished", "")


def _elements(root: Path, config: Path | None) -> tuple[list[Scored], list[str]]:
    """Return all elements that are known, and a line for each config that cannot be read."""
    # Inside, because it reads the formats of own tasks too: a third of a second.
    from pipeline.evaluation.tasks import list_elements

    started = oldest_first((root / "jobs").glob("evaluate-*.yaml"))
    # Each step of a training run has a config of its own; otherwise the newest submission counts.
    paths = [config] if config else sorted(root.glob("step-*/evaluate.yaml")) or started[-1:]
    # Logs name an element by its index, which says nothing where several configs count from 0.
    logs = element_logs(root / "jobs", "evaluate") if len(paths) == 1 else {}
    found: dict[Path, Scored] = {}
    faults = []
    for path in paths:
        try:
            listed = list_elements(load_config(EvaluateConfig, path))
        except (UserError, OSError) as error:
            faults.append(str(error))
            continue
        for each in listed:
            # Frozen configs hold paths of the machine that submitted; the folder may be a copy.
            folder = root / "results" / each.model.name / each.task / str(each.max_length)
            found[folder] = _read(folder, each.index, logs.get(each.index))
    # Models and tasks that none of these configs has any more.
    for result in sorted(root.glob("results/*/*/*/result.json")):
        found.setdefault(result.parent, _read(result.parent, None, None))
    if not paths:
        faults.append("not known; `diffembed watch EVALUATE.yaml` shows what is left")
    return list(found.values()), faults


def _read(folder: Path, index: int | None, log: Path | None) -> Scored:
    """Describe the element of a folder: by its result, or else by the end of its log."""
    model, task, length = folder.parts[-3:]
    element = Scored(model=model, task=task, length=length, index=index, state="waiting")
    path = folder / "result.json"
    if path.is_file():
        result = read_json_or_none(path)
        score = result.get("score") if isinstance(result, dict) else None
        if not isinstance(score, int | float):
            return dataclasses.replace(element, state="failed", line=f"{path}: damaged")
        metric = str(result.get("metric", ""))
        return dataclasses.replace(element, state="scored", metric=metric, score=float(score))
    end = read_log(log) if log else None
    if end is None:
        return element
    if end.failed:
        return dataclasses.replace(element, state="failed", line=end.error)
    line = f"{end.line} ({duration(end.seconds)} ago)"
    return dataclasses.replace(element, state="silent" if end.is_silent else "running", line=line)


def _by_task(elements: Sequence[Scored]) -> Grid:
    """Return a row per task: the number of its elements in each state."""
    tasks: dict[str, Counter[State]] = {}
    for element in elements:
        tasks.setdefault(element.task, Counter())[element.state] += 1
    shown = [state for state in _STATES if any(counts[state] for counts in tasks.values())]
    rows = tuple(
        (task, *(str(counts[state] or "") for state in shown)) for task, counts in tasks.items()
    )
    tones: tuple[Tone, ...] = tuple(
        "fail" if counts["failed"] else "ok" if counts["scored"] == counts.total() else ""
        for counts in tasks.values()
    )
    return Grid("tasks", ("task", *shown), rows, tones)


def _unfinished(elements: Sequence[Scored]) -> Grid:
    """Return a row per element that has failed or runs, with the line of its log that shows it."""
    shown = [e for e in elements if e.state == "failed"]
    shown += [e for e in elements if e.state in ("running", "silent")]
    rows = tuple(
        ("" if e.index is None else str(e.index), e.model, e.task, e.length, e.state, e.line)
        for e in shown
    )
    by_state: dict[State, Tone] = {"failed": "fail", "silent": "warn"}
    tones = tuple(by_state.get(e.state, "") for e in shown)
    header = ("element", "model", "task", "length", "state", "line of its log")
    return Grid("failed and running elements", header, rows, tones)


def _scores(elements: Sequence[Scored]) -> Grid:
    """Return the table of scores: a row per task and length, a column per model."""
    models = list(dict.fromkeys(e.model for e in elements if e.score is not None))
    by_row: dict[tuple[str, str, str], dict[str, float]] = {}
    for element in elements:
        if element.score is not None:
            key = (element.task, element.length, element.metric)
            by_row.setdefault(key, {})[element.model] = element.score
    rows = tuple(
        (*key, *(f"{own[model]:.4f}" if model in own else "" for model in models))
        for key, own in by_row.items()
    )
    header = ("task", "length", "metric", *models)
    return Grid("scores", header, rows)


def _blocks(root: Path) -> Iterator[Fact]:
    """Count the embedded blocks of texts, where the evaluation distributes texts."""
    plans = oldest_first(root.glob("plan/*/plan.json"))
    if not plans:
        return
    plan = read_json_or_none(plans[-1])
    blocks = plan.get("blocks") if isinstance(plan, dict) else None
    total = f" of {len(blocks):,} a model" if isinstance(blocks, list) else ""
    for store in sorted(path for path in root.glob("store/*") if path.is_dir()):
        written = sum(1 for _ in store.glob("*/block-*.npy"))
        yield Fact(f"blocks of {store.name}", f"{written:,}{total}")


def _report(root: Path) -> Iterator[Fact]:
    path = root / "report" / "report.md"
    if (when := age(path)) is not None:
        yield Fact("report", f"{path}, {duration(when)} old")


def _failed_jobs(folder: Path) -> Iterator[Fact]:
    """Name the errors of jobs outside the array of tasks."""
    for name in ("evaluate-plan", "evaluate-score", "report"):
        if (end := newest_log(folder, name)) and end.failed:
            yield Fact(name, end.cited_error, "fail")
    failed = [
        end
        for path in element_logs(folder, "evaluate-embed").values()
        if (end := read_log(path)) and end.failed
    ]
    if failed:
        yield Fact("evaluate-embed", f"{len(failed)} elements failed: {failed[-1].error}", "fail")
