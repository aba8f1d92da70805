"""What an evaluation found, gathered from its results: all that a report shows."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.report.bootstrap import Strata, interval, paired_difference
from pipeline.evaluation.report.by_step import Curves, read_curves
from pipeline.evaluation.report.references import published_scores
from pipeline.evaluation.score.results import changed_inputs, read_result
from pipeline.evaluation.tasks.elements import Element, lengths_of, list_elements
from pipeline.files import read_json_lines

# Name in the report -> model -> what the element wrote. The name is the task's, with @LENGTH where
# a task is run at several.
Results = dict[str, dict[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What the pages, tables and plots of a report are made of.

    Attributes:
        models: names, in the order of the config.
        results: what the elements wrote.
        tasks: an entry of report.json for each of them.
        curve: lines of the training run's metrics that hold a loss.
        by_step: scores of the training run's checkpoints.
    """

    models: list[str]
    results: Results
    tasks: list[dict[str, Any]]
    curve: list[dict[str, float]]
    by_step: Curves

    @property
    def training(self) -> dict[str, Any] | None:
        """The training run in a few numbers; None without one."""
        if not self.curve:
            return None
        return {"num_steps": len(self.curve), **compare_ends(self.curve)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """What the report reads of a line of metrics; a loss that was not finite is null."""

    step: int
    loss: float | None = None


def find(config: EvaluateConfig) -> Findings:
    """Read and compare everything.

    Raises:
        UserError: an element has no valid result, or the training run has no metrics.
    """
    results = collect(config)
    models = [model.name for model in config.models]
    return Findings(
        models=models,
        results=results,
        tasks=[summarise(name, models, by_model) for name, by_model in results.items()],
        curve=read_curve(config.training_run),
        by_step=read_curves(config.training_run),
    )


def collect(config: EvaluateConfig) -> Results:
    """Results of all elements by name and model.

    Raises:
        UserError: some are missing, or were computed from other exports, data or settings than
            those of now; the message gives their indices for the array.
    """
    results: Results = {}
    missing = []
    for element in list_elements(config):
        result = read_result(element)
        if result is None:
            missing.append((element, "not scored"))
        elif changed := _changed_inputs(config, element, result):
            missing.append((element, f"changed since it was scored: {', '.join(changed)}"))
        else:
            single = len(lengths_of(config, element.task)) == 1
            name = element.task if single else f"{element.task}@{element.max_length}"
            results.setdefault(name, {})[element.model.name] = result
    if missing:
        first, why = missing[0]
        raise UserError(
            f"{len(missing)} of {len(list_elements(config))} evaluation elements have no valid "
            f"result, the first: {first.model.name} {first.task}, {why}",
            fix="their logs say why; submit the evaluation again, or run elements "
            + ",".join(str(element.index) for element, _ in missing),
        )
    return results


def _changed_inputs(
    config: EvaluateConfig, element: Element, result: dict[str, Any]
) -> tuple[str, ...]:
    try:
        return changed_inputs(config, element, result)
    except UserError:
        return ()  # an export may be deleted once it is scored; see `by_step.give_back`


def summarise(name: str, models: list[str], by_model: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One task's entry of report.json."""
    first, last = by_model[models[0]], by_model[models[-1]]
    task = first["task"]
    # A replica's score must not stand beside a published one.
    local = any(result["dataset_revision"] == "local" for result in by_model.values())
    entry: dict[str, Any] = {
        "name": name,
        "task": task,
        "benchmark": first["benchmark"],
        "metric": first["metric"],
        **{model: by_model[model]["score"] for model in models},
        "chance": first["chance"],
        "intervals": {model: interval(by_model[model]["per_query"]) for model in models},
        "by_split": {model: by_model[model]["by_split"] for model in models},
        "other_scores": {model: by_model[model]["other_scores"] for model in models},
        "replica": local,
        "num_queries": sum(len(scores) for scores in first["per_query"].values()),
        "max_length": first["max_length"],
    }
    entry["published"] = {} if local else published_scores(entry)
    if len(models) > 1:
        entry |= _difference(last["per_query"], first["per_query"])
        entry["split_differences"] = {
            split: _difference(_within(split, last), _within(split, first))
            for split in first["by_split"]
        }
    if len(models) > 2:
        entry["pairs"] = [
            {
                "model": over,
                "minus": under,
                **_difference(by_model[over]["per_query"], by_model[under]["per_query"]),
            }
            for under, over in itertools.combinations(models, 2)
        ]
    return entry


def _within(split: str, result: dict[str, Any]) -> Strata:
    """Query scores of one split, in all of its subsets; strata are named `subset/split`."""
    strata: Strata = result["per_query"]
    return {name: scores for name, scores in strata.items() if name.endswith(f"/{split}")}


def _difference(over: Strata, under: Strata) -> dict[str, Any]:
    difference, low, high = paired_difference(over, under)
    return {
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        "significant": low > 0 or high < 0,
    }


def compare_ends(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the loss at both ends of a run, over batches of one kind.

    Kinds differ in loss by more than training changes it, so that the first line and the last say
    little about a run.

    Returns:
        `kind`, the one with the most batches; `averaged`, how many of its first and of its last
        batches the means `first_loss` and `last_loss` are over.
    """
    kinds = Counter(line.get("kind", "") for line in curve)
    kind = kinds.most_common(1)[0][0]
    losses = [line["loss"] for line in curve if line.get("kind", "") == kind]
    count = max(1, min(10, len(losses) // 4))
    return {
        "kind": kind,
        "averaged": count,
        "first_loss": fmean(losses[:count]),
        "last_loss": fmean(losses[-count:]),
    }


def read_curve(training_run: Path | None) -> list[dict[str, float]]:
    """Lines of the training run's metrics.jsonl that hold a loss; empty without a run."""
    if training_run is None:
        return []
    path = training_run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"training_run: no {path}", fix="correct training_run, or leave it out")
    fix = "correct training_run, or leave it out"
    lines = [line for _, line in read_json_lines(path, _Line, fix=fix)]
    if not lines:
        raise UserError(f"{path}: no step in it", fix=fix)
    return [line for line in lines if line.get("loss") is not None]
