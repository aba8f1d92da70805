"""A rank that fails ends all ranks, soon and with its reason, whatever launched them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import run_together
from tests.training.launches import ROOT, Launch

WORKER = Path(__file__).with_name("failure_worker.py")


@pytest.fixture
def run_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[int], str]]:
    """Return exit codes and stderr of a run on two ranks that no launcher ends."""

    def run(fault: str, *arguments: str | Path) -> tuple[list[int], str]:
        monkeypatch.setenv("FAULT", fault)
        words = [WORKER, *arguments, "--deepspeed", "ds_configs/zero3.json"]
        ranks = run_together([words] * 2, folder=ROOT, end_together=False)
        return [rank.returncode for rank in ranks], "".join(rank.stderr for rank in ranks)

    return run


def test_a_broken_rank_ends_all_with_its_reason(recipe: Path, tmp_path: Path) -> None:
    """Under deepspeed; test_kills.py kills a rank under torchrun."""
    arguments = (recipe, "--deepspeed", "ds_configs/zero3.json", f"output_dir={tmp_path}")
    with Launch("deepspeed", WORKER, *arguments, environment={"FAULT": "raises"}) as run:
        code = run.wait()
        run.require_nothing_left()
        assert code != 0
        assert "RuntimeError: this rank broke" in run.output()


def test_a_damaged_shard_ends_all_ranks_and_is_named(
    recipe: Path, tmp_path: Path, run_alone: Callable[..., tuple[list[int], str]]
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(recipe.parent / "shards", shards)
    (shard, *_) = sorted(shards.rglob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    codes, stderr = run_alone(
        "none", recipe, f"output_dir={tmp_path / 'run'}", f"data.path={shards}"
    )
    assert 0 not in codes
    assert -9 not in codes
    assert "UserError" in stderr
    assert shard.name in stderr


def test_a_loss_that_is_not_a_number_stops_all_ranks_with_a_dump(
    recipe: Path, tmp_path: Path, run_alone: Callable[..., tuple[list[int], str]]
) -> None:
    codes, stderr = run_alone("nan", recipe, f"output_dir={tmp_path}", "schedule=cache")
    assert codes == [1, 1], stderr
    assert "loss is nan at step 2, which was not applied; the batch is in" in stderr
    assert "the weights are finite, though" in stderr
    assert "the same command starts again from step 1 and gets this batch again" in stderr
    assert f"`diffembed rewind {tmp_path} NAME`" in stderr
    dumps = sorted(tmp_path.glob("non-finite-step-2-rank-*.json"))
    assert len(dumps) == 2
    for dump in dumps:
        content = json.loads(dump.read_text())
        assert content["what"] == "loss is nan"
        assert len(content["example_ids"]) == 8
        # Only the rank at fault has broken texts.
        assert bool(content["texts"]) == dump.name.endswith("rank-1.json")


def test_a_step_that_is_not_finite_can_be_left_out_by_all_ranks(
    recipe: Path, tmp_path: Path, run_alone: Callable[..., tuple[list[int], str]]
) -> None:
    arguments = [f"output_dir={tmp_path}", "schedule=cache", "non_finite=skip", "num_steps=4"]
    codes, stderr = run_alone("nan", recipe, *arguments)
    assert codes == [0, 0], stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 0, 0]
    assert all(line["grad_norm"] > 0 for line in lines if not line.get("skipped"))
