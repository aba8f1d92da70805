"""Raw rows to a report by `diffembed submit all`, through every disturbance."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.tools.disturbed_chain import (
    EVERY,
    STRIDE,
    TASKS,
    ChainRun,
    a_node_without_power,
    curve_of,
    make_material,
    preemption,
    weights_of,
    write_chain,
)
from tests.training.trainer_command import run_trainer

# Real jobs, most of whose time is the start of Python.
pytestmark = pytest.mark.slurm

# A preempted job is requeued as `scontrol requeue` does it; the tool has all disturbances.
DISTURBANCES = (preemption, a_node_without_power)
# On a busy machine, a disturbance comes many steps later than wanted.
NUM_STEPS = (len(DISTURBANCES) + 6) * STRIDE


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journey")
    make_material(folder)
    return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rough:
    """A chain whose training was disturbed, and the step at which each disturbance came."""

    run: ChainRun
    reached: list[int]


@pytest.fixture(scope="module")
def rough(session_cluster: Cluster, material: Path) -> Iterator[Rough]:
    run = ChainRun(session_cluster, material, "rough", num_steps=NUM_STEPS, say=print)
    reached = [run.disturb(disturbance) for disturbance in DISTURBANCES]
    run.finish()
    yield Rough(run=run, reached=reached)
    session_cluster.cancel_all()


def test_a_chain_leads_from_raw_rows_to_a_report_through_every_disturbance(rough: Rough) -> None:
    run = rough.run

    assert list(run.ids) == ["prepare", "train", "export-latest", "evaluate", "report"]
    assert {row["name"] for row in run.scores()["tasks"]} == set(TASKS)
    for index, task in enumerate(TASKS):
        (log,) = run.folder.glob(f"jobs/diffembed-evaluate-*_{index}.out")
        assert f"element {index + 1}/2 trained {task}: " in log.read_text()


def test_no_disturbance_costs_more_than_the_steps_since_a_checkpoint(rough: Rough) -> None:
    log = rough.run.train_log()
    resumed = [int(step) for step in re.findall(r"resuming \S+ at step (\d+)", log)]

    assert len(resumed) == len(DISTURBANCES)
    lost = [before - after for before, after in zip(rough.reached, resumed, strict=True)]
    # Training does not wait for a checkpoint: it is whole a step or two after its own.
    assert max(lost) <= EVERY + 2


def test_a_disturbed_run_ends_as_the_undisturbed_one(rough: Rough, material: Path) -> None:
    calm = material / "calm"
    write_chain(material, calm, NUM_STEPS)
    done = run_trainer(calm / "train.yaml", "--deepspeed", "ds_configs/zero3.json", num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr

    # To the last bit, on CPUs.
    ours, theirs = rough.run.folder / "run", calm / "run"
    assert [step for step, _, _ in curve_of(theirs)] == list(range(NUM_STEPS))
    assert curve_of(ours) == curve_of(theirs)
    assert weights_of(ours) == weights_of(theirs)


def test_a_finished_chain_submitted_again_submits_nothing(rough: Rough) -> None:
    scores = rough.run.scores()

    assert rough.run.submit() == {}
    assert rough.run.scores() == scores
