"""A save is complete, late or failed, never half."""

from __future__ import annotations

import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from pipeline import comm, run_folder
from pipeline.errors import DiffembedError
from pipeline.training import checkpoints
from tests.support import PATIENCE, run_ranks
from tests.training.memory_engine import Memory, save, tree


def test_a_save_takes_the_state_of_its_beginning_and_appears_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_is_ready, really_save = threading.Event(), checkpoints.save_file

    def slow_save_file(*args: Any) -> None:  # stands in for a slow disk
        assert disk_is_ready.wait(PATIENCE)
        really_save(*args)

    monkeypatch.setattr(checkpoints, "save_file", slow_save_file)
    engine, saver = Memory(a=1.0), checkpoints.Saver(tmp_path)
    engine.optimizer_steps = 3  # two updates were left out
    saver.begin(engine, step=5, identity={})
    assert saver.is_pending
    assert saver.is_writing
    engine.state["a"]["weight"].fill_(9.0)  # the next step runs meanwhile
    assert run_folder.latest_checkpoint(tmp_path) is None
    disk_is_ready.set()
    path = saver.finish()
    assert not saver.is_pending
    assert run_folder.latest_checkpoint(tmp_path) == path
    loaded = Memory(a=0.0)
    assert checkpoints.load(path, loaded, {}) == (5, {})
    assert loaded.state["a"]["weight"].tolist() == [1.0, 1.0]
    assert loaded.optimizer_steps == 3


def test_an_empty_tensor_is_never_saved(tmp_path: Path) -> None:
    engine = Memory(a=1.0, b=1.0)
    save(tmp_path, engine, step=1, identity={})
    engine.state["b"]["weight"] = torch.empty(0)  # as of a parameter that ZeRO-3 has partitioned
    with pytest.raises(DiffembedError, match="b/weight is empty"):
        save(tmp_path, engine, step=2, identity={})
    assert run_folder.checkpoint_names(tmp_path) == ["step-000001"]


def save_on_a_disk_that_is_full_for_rank_1(folder: str) -> str:
    path = Path(folder)
    names = {name: float(index) for index, name in enumerate("abcd")}
    save(path, Memory(**names), step=1, identity={})
    before = tree(path)
    if comm.rank() == 1:
        # The kernel refuses every byte beyond it, as a full disk does.
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        save(path, Memory(**names), step=2, identity={})
    except DiffembedError as error:
        said = str(error)
    if comm.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    comm.barrier()
    if comm.rank() == 0:
        run_folder.remove_leftovers(path)
        assert tree(path) == before
    return said


def test_a_disk_full_for_one_rank_fails_the_save_of_all_and_leaves_the_one_before(
    tmp_path: Path,
) -> None:
    first, second = run_ranks(2, save_on_a_disk_that_is_full_for_rank_1, str(tmp_path))
    assert first == second
    assert "step-000002 could not be written (rank 1: " in first
    assert "large" in first
    assert "rank 0" not in first


def failing(times: int, error: OSError | None = None) -> Any:
    """A `save_file` that fails a few times, as on a disk that is full for a while."""
    left, really_save = [times], checkpoints.save_file

    def save_file(*args: Any) -> None:
        if left[0]:
            left[0] -= 1
            # In the words of safetensors, whose errors are not the system's.
            raise error or SafetensorError("Error while serializing: I/O error (os error 28)")
        really_save(*args)

    return save_file


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(checkpoints, "save_file", failing(3))
    monkeypatch.setattr(checkpoints.time, "sleep", pauses.append)
    path = save(tmp_path, Memory(a=1.0), step=1, identity={})
    assert run_folder.latest_checkpoint(tmp_path) == path
    assert sum(pauses) == 5 + 10 + 20
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert "step-000001 is not written yet (" in said[0]
    assert "os error 28" in said[0]
    assert "trying again in 5 s" in said[0]


def test_a_disk_that_stays_full_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(checkpoints, "save_file", failing(10**6))
    monkeypatch.setattr(checkpoints.time, "sleep", waited.append)
    with pytest.raises(DiffembedError, match=r"step-000001 could not be written .*os error 28"):
        save(tmp_path, Memory(a=1.0), step=1, identity={})
    assert checkpoints.PATIENCE_SECONDS <= sum(waited) < checkpoints.PATIENCE_SECONDS + 60


def test_a_request_to_stop_ends_the_wait_for_a_full_disk_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, Memory(a=1.0), step=1, identity={})
    before = tree(tmp_path)
    waited: list[float] = []
    monkeypatch.setattr(checkpoints.time, "sleep", waited.append)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", failing(10**6))
        for asked_after in (0, 3, 60):  # before the first failure, or during the wait
            waited.clear()
            saver = checkpoints.Saver(tmp_path, in_a_hurry=lambda s=asked_after: len(waited) >= s)
            saver.begin(Memory(a=1.0), step=2, identity={})
            with pytest.raises(
                DiffembedError, match=r"step-000002 could not be written .*os error 28"
            ):
                saver.finish()
            assert sum(waited) <= max(asked_after, checkpoints.HURRIED_SECONDS)
    monkeypatch.setattr(checkpoints, "save_file", failing(2))
    saver = checkpoints.Saver(tmp_path, in_a_hurry=lambda: True)
    saver.begin(Memory(a=1.0), step=3, identity={})
    assert saver.finish() == run_folder.latest_checkpoint(tmp_path)  # free again within the seconds
    shutil.rmtree(tmp_path / "step-000003")
    run_folder.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {**before, "latest": b"step-000003\n"}


def test_what_another_path_would_cure_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "save_file", failing(1, PermissionError(13, "no", "x")))
    monkeypatch.setattr(checkpoints.time, "sleep", pytest.fail)
    with pytest.raises(DiffembedError, match="could not be written"):
        save(tmp_path, Memory(a=1.0), step=1, identity={})


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(DiffembedError, match=r"checkpoints/step-000001 could not be written"):
        save(tmp_path / "checkpoints", Memory(a=1.0), step=1, identity={})


def test_what_is_read_back_is_compared_with_what_was_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_save = checkpoints.save_file

    def forgetful_save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        really_save({**tensors, "a/exp_avg": torch.zeros(2)}, path)  # a disk that loses bytes

    monkeypatch.setattr(checkpoints, "save_file", forgetful_save_file)
    with pytest.raises(DiffembedError, match="a/exp_avg was read back with other values"):
        save(tmp_path, Memory(a=1.0), step=1, identity={})
    assert run_folder.latest_checkpoint(tmp_path) is None
