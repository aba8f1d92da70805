"""Raw rows to a report by `diffembed submit all`, calmly and through every disturbance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from disturbed_chain import (
    EVERY,
    STRIDE,
    TASKS,
    ChainRun,
    a_node_without_power,
    make_material,
    preemption,
    scontrol_requeue,
)

# Two chains of real jobs, most of whose time is the start of Python.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

DISTURBANCES = (preemption, scontrol_requeue, a_node_without_power)
NUM_STEPS = (len(DISTURBANCES) + 2) * STRIDE


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journey")
    make_material(folder)
    return folder


@pytest.fixture(scope="module")
def calm(session_cluster: Cluster, material: Path) -> Iterator[ChainRun]:
    """A chain that nobody disturbed."""
    run = ChainRun(session_cluster, material, "calm", NUM_STEPS, print)
    run.finish()
    yield run
    session_cluster.cancel_all()


def test_a_chain_leads_from_raw_rows_to_a_report(calm: ChainRun) -> None:
    assert list(calm.ids) == ["prepare", "train", "export-latest", "evaluate", "report"]
    assert [step for step, _, _ in calm.curve()] == list(range(NUM_STEPS))
    assert {row["name"] for row in calm.scores()["tasks"]} == set(TASKS)
    for index, task in enumerate(TASKS):
        (log,) = calm.folder.glob(f"jobs/diffembed-evaluate-*_{index}.out")
        assert f"element {index + 1}/2 trained {task}: " in log.read_text()


def test_a_finished_chain_submitted_again_submits_nothing(calm: ChainRun) -> None:
    scores = calm.scores()

    assert calm.submit() == {}
    assert calm.scores() == scores


def test_a_disturbed_chain_ends_as_the_undisturbed_one(
    calm: ChainRun, session_cluster: Cluster, material: Path
) -> None:
    run = ChainRun(session_cluster, material, "rough", NUM_STEPS, print)
    reached = [run.disturb(disturbance) for disturbance in DISTURBANCES]
    run.finish()

    # To the last bit, on CPUs.
    assert run.curve() == calm.curve()
    assert run.scores() == calm.scores()
    resumed = [int(step) for step in re.findall(r"resuming \S+ at step (\d+)", run.train_log())]
    assert len(resumed) == len(DISTURBANCES)
    lost = [before - after for before, after in zip(reached, resumed, strict=True)]
    # Training does not wait for a checkpoint: it is whole a step or two after its own.
    assert max(lost) <= EVERY + 2
