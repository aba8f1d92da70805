"""Prefetching through a real (local) hub, then scoring with nothing but what it fetched."""

from __future__ import annotations

import dataclasses

import benchmark_replicas as replicas
import pytest
from local_hub import serve

from pipeline.errors import UserError
from pipeline.evaluation.datasets import REVISION_FILE, get_task, localise, prefetch
from pipeline.evaluation.run import run_all

TASKS = ("Core17InstructionRetrieval", "BrightAopsRetrieval", "BrightBiologyRetrieval")


@pytest.fixture
def away(config, tmp_path):
    """A config whose snapshots are still to be fetched."""
    return dataclasses.replace(
        config, snapshots=tmp_path / "fetched", tasks=TASKS, models=config.models[:1]
    )


def test_fetched_snapshots_score_like_the_originals(away, config, snapshots, load):
    with serve(snapshots) as (address, sent):
        prefetch(away, endpoint=address)
        assert len({name for name in sent if name.startswith("mteb/BRIGHT/")}) > 3
        assert not [name for name in sent if name.startswith("xlangai/")]
        count = len(sent)
        prefetch(away, endpoint=address)
        assert len(sent) == count  # what is there is not fetched again
    fetched = run_all(away, load=load)
    there = dataclasses.replace(away, snapshots=snapshots, output_dir=away.output_dir / "there")
    assert [r["score"] for r in fetched] == [r["score"] for r in run_all(there, load=load)]


def test_a_snapshot_of_another_revision_is_refused(away, snapshots):
    with serve(snapshots) as (address, _):
        prefetch(away, endpoint=address)
    marker = away.snapshots / "mteb/BRIGHT" / REVISION_FILE
    assert marker.read_text().strip() == get_task(TASKS[1]).metadata.dataset["revision"]
    marker.write_text("0" * 40)
    with pytest.raises(UserError, match="revision 000000000000"):
        localise(get_task(TASKS[1]), away.snapshots)


def test_an_incomplete_data_set_is_noticed_while_there_is_a_network(away, tmp_path):
    replicas.write_follow_ir(tmp_path / "origin", without=("top_ranked",))
    away = dataclasses.replace(away, tasks=TASKS[:1])
    with serve(tmp_path / "origin") as (address, _), pytest.raises(UserError, match="candidates"):
        prefetch(away, endpoint=address)


def test_a_hub_without_the_data_set_is_the_users_error(away, tmp_path):
    with serve(tmp_path) as (address, _), pytest.raises(UserError, match="reaches the hub"):
        prefetch(away, endpoint=address)
    with pytest.raises(UserError, match="snapshots: not set"):
        prefetch(dataclasses.replace(away, snapshots=None))
