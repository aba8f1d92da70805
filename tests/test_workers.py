"""Tasks shared by processes are each done once, and items read ahead keep their order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import DiffembedError
from pipeline.workers import LocalWorkers, SrunWorkers, open_workers, read_ahead


def srun_tasks(folder: Path, count: int) -> list[SrunWorkers]:
    return [SrunWorkers(rank, count, folder / "step") for rank in range(count)]


def test_tasks_of_srun_do_each_task_once_and_wait_for_each_other(tmp_path: Path) -> None:
    outputs = [tmp_path / f"{task}" for task in range(20)]
    outputs[3].touch()
    done: list[int] = []
    seen: list[int] = []

    def work(task: int) -> None:
        done.append(task)
        outputs[task].touch()

    def run(workers: SrunWorkers) -> None:
        workers.run(work, outputs, claims=tmp_path / "claims")
        seen.append(sum(output.exists() for output in outputs))

    threads = [threading.Thread(target=run, args=(task,)) for task in srun_tasks(tmp_path, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(done) == [task for task in range(20) if task != 3]
    assert seen == [20, 20, 20]


def test_a_failed_task_of_srun_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    first, second = srun_tasks(tmp_path, 2)
    first.fail()
    with pytest.raises(DiffembedError, match="another task of this step failed"):
        second.barrier()


def test_one_local_worker_yields_items_with_their_results_in_order(tmp_path: Path) -> None:
    workers = LocalWorkers(1)
    assert list(workers.each(lambda item: item * 10, [3, 1, 2])) == [(3, 30), (1, 10), (2, 20)]


def test_a_process_without_a_launcher_gets_local_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # `open_workers` sets it; restored after
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with open_workers(1, rendezvous=tmp_path / "step") as workers:
        assert isinstance(workers, LocalWorkers) and workers.is_main


def test_reading_ahead_keeps_the_order_and_passes_on_errors() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("the fourth")

    ahead = read_ahead(items(), thread_name="test")
    assert [next(ahead), next(ahead), next(ahead)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(ahead)
