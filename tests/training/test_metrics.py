"""Numbers of a run reach every tracker, once for each step."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.training import metrics
from pipeline.training.metrics import (
    Comparison,
    JsonLines,
    Tracker,
    open_trackers,
    require_trackers,
)


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; it is in the track extra")


def interrupted(open_tracker: Any) -> dict[int, float]:
    """Log steps 0 to 4, then again from 3 on, as a run that resumes there; return the lines due."""
    for first, stop in ((0, 5), (3, 7)):
        tracker: Tracker = open_tracker(first)
        for step in range(first, stop):
            tracker.log(step, {"loss": float(10 * first + step)})
        tracker.close()
    return {step: float(step if step < 3 else 30 + step) for step in range(7)}


def test_lines_of_an_interrupted_run_stand_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    wanted = interrupted(lambda first: JsonLines(path, first))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == list(wanted.items())


def test_what_is_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "metrics.jsonl", 0)
    tracker.log(0, {"loss": math.nan, "lr": 0.5})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 0, "loss": None, "lr": 0.5}


def test_a_curve_in_tensorboard_continues_where_a_run_resumes(tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def start(first: int) -> Tracker:
        (tracker,) = open_trackers(["tensorboard"], run_dir=tmp_path, config={}, first_step=first)
        return tracker

    wanted = interrupted(start)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert {event.step: event.value for event in found} == wanted
    assert len(found) == len(wanted)


def test_runs_in_wandb_are_told_apart_by_their_folders_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("wandb")
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for number, name in enumerate(("long/dream", "theorem/dream", "long/dream")):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (tracker,) = open_trackers(["wandb"], run_dir=folder, config={"seed": 1}, first_step=0)
        assert wandb.run is not None
        ids.append(wandb.run.id)
        assert wandb.run.name == name
        tracker.log(0, {"loss": 0.123456789 + number})
        tracker.close()
        assert wandb.run is None
    assert ids[0] == ids[2] != ids[1]
    wandb.teardown()  # its process writes behind our back
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("offline-run-*/*.wandb"))
    for number in range(3):
        assert b"%d.123456789" % number in written


def test_a_tracker_that_is_not_installed_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="trackers: wandb is not installed here"):
        require_trackers(["wandb"])
    require_trackers([])


def test_lines_that_a_full_disk_did_not_take_follow_with_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonLines(path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker.log(0, {"loss": 0.0})
    try:
        # The kernel cuts a write short at this size, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 2.0})
        lines_meanwhile = path.read_text().splitlines()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log(3, {"loss": 3.0}, "rows#2")
    tracker.close()
    assert len(lines_meanwhile) == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line.get("kind") for line in lines] == [None, None, None, "rows#2"]
    assert "its lines wait for the next step" in capsys.readouterr().out


def test_a_line_of_a_log_tells_what_somebody_who_watches_wants_to_see(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    tracker = metrics.Progress(0, 10)
    values = {"loss": 1.5, "lr": 1e-4, "accuracy@1": 0.25, "tokens_per_second": 1234.0}
    values["peak_memory_gib"] = 2.0
    for step in range(3):
        tracker.log(step, values, "rows#1")
        now[0] += 60
    lines = capsys.readouterr().out.splitlines()
    numbers = "loss 1.5000 (rows#1)  accuracy@1 0.250  lr 1.00e-04  1234 tokens/s  2.0 GiB"
    assert lines[0] == f"step 1/10  {numbers}"
    assert lines[2] == f"step 3/10  {numbers}  0:07:00 left"


def test_a_run_ends_with_what_was_predicted_and_observed_of_a_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first steps of a start do not count, wherever it resumed."""
    comparison = Comparison({"seconds": 0.5, "peak_memory_gib": 10.0})
    for step, seconds in enumerate([9.0, 9.0, 9.0, 0.4, 0.6, 0.7], start=100):
        comparison.log(step, {"seconds": seconds, "peak_memory_gib": 0.1 * step})
    comparison.log(106, {"loss": math.nan})  # a skipped step
    comparison.close()
    assert capsys.readouterr().out == (
        "a step: 0.5 s predicted, 0.6 s observed (median of 3 steps after the first 3); "
        "10.0 GiB predicted, 10.5 GiB observed at most\n"
    )
    for predicted in ({}, {"seconds": 0.5}):
        silent = Comparison(predicted)
        silent.log(0, {"seconds": 1.0})
        silent.close()
    assert capsys.readouterr().out == ""
