"""Collective calls of every kind of run keep to NCCL's rules, recorded over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.comm import CONTROL_TIMEOUT
from pipeline.data.shards import Dataset
from tests.mined_data import mine_by_hand
from tests.nccl_rules import first_difference
from tests.support import PATIENCE, launch_ranks

WORKER = Path(__file__).with_name("rules_worker.py")
BROKEN = "broken rank: "


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def reports(
    request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Return the records of every rank in all runs of the worker."""
    folder = tmp_path_factory.mktemp("rules")
    train, evaluate = folder / "train.yaml", folder / "evaluate.yaml"
    train.write_text(recipe.read_text())
    model = {"name": "unused", "path": "unused"}
    tasks = {"output_dir": "unused", "models": [model], "tasks": ["BrightAopsRetrieval"]}
    evaluate.write_text(yaml.safe_dump(tasks))
    shards = yaml.safe_load(train.read_text())["data"]["path"]
    mined = mine_by_hand(Dataset.open(Path(shards)), folder / "mined")
    launch_ranks(request.param, WORKER, str(train), str(evaluate), str(mined))
    files = [folder / f"rank-{rank}-of-{request.param}.json" for rank in range(request.param)]
    return [json.loads(file.read_text()) for file in files]


def test_every_run_ends_as_it_should_on_all_ranks(reports: list[dict[str, Any]]) -> None:
    starts = {
        "stopped": "Stopped: SIGUSR1 after step 3 of 4",
        "damaged": "UserError: checkpoint ",
        "stopped within a step": "Stopped: SIGUSR1 after step 3 of 6",
        "broken rank": "RuntimeError",
    }
    for report in reports:
        for name, outcome in report["outcomes"].items():
            assert outcome.startswith(starts.get(name, "done")), (name, outcome)
        # The file that only the last rank reads is named by all.
        damage = f"-of-{len(reports):05d}.safetensors differs from its recorded size or SHA-256"
        assert damage in report["outcomes"]["damaged"]
    *others, broken = reports
    assert "broken rank" not in broken["outcomes"]
    assert all("broken rank" in report["outcomes"] for report in others)


def test_fixed_orders_of_sums_change_no_loss_of_a_cpu(reports: list[dict[str, Any]]) -> None:
    losses = reports[0]["losses"]
    assert len(losses["cache"]) == 3
    assert losses["cache, deterministic"] == losses["cache"]


def test_only_the_control_group_waits_for_hours(reports: list[dict[str, Any]]) -> None:
    """DeepSpeed's own groups have the main group's timeout, not torch's default."""
    for timeouts in (report["timeouts"] for report in reports):
        assert timeouts.pop("control") == CONTROL_TIMEOUT.total_seconds()
        assert len(timeouts) > 1
        assert set(timeouts.values()) == {PATIENCE}, timeouts


def test_all_ranks_make_the_same_calls_in_the_same_order(reports: list[dict[str, Any]]) -> None:
    calls = [[c for c in report["calls"] if not c.startswith(BROKEN)] for report in reports]
    assert len(calls[0]) > 1000
    assert first_difference(calls) == ""


def test_ranks_make_the_same_calls_until_one_breaks(reports: list[dict[str, Any]]) -> None:
    *others, broken = [[c for c in r["calls"] if c.startswith(BROKEN)] for r in reports]
    for calls in others:
        assert calls[: len(broken)] == broken
        assert len(calls) > len(broken)  # in the call that has told them


def test_no_call_breaks_a_rule_of_nccl(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["faults"] == []


def test_the_recorder_finds_every_kind_of_fault(reports: list[dict[str, Any]]) -> None:
    for found in (report["mistakes"] for report in reports):
        assert len(found) == 6, found
        strides, types, overlap, barrier, objects, thread = found
        assert strides.endswith("strides (1, 2)")
        assert types.endswith("NCCL has no torch.int16")
        assert overlap.endswith("while main is at work")
        assert barrier.endswith("barrier: belongs in the control group")
        assert "broadcast_object_list" in objects
        assert thread.endswith("in thread saver")
