"""Run an evaluation: whole elements, or every distinct text once and scores from stored vectors.

    run_all, run_element   a (model, task, length) at a time: embed its texts and score
    plan                   list every distinct text of all tasks, in blocks      CPU
    embed                  vectors of one share of the blocks -> store/          GPU, job array
    score_all              score every element from the stored vectors           CPU

Nothing here loads torch or mteb before it needs it: login nodes count elements.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import EvaluateConfig
from pipeline.evaluation.results import Result, changed_inputs, inputs_of, read_result
from pipeline.evaluation.tasks import Element, element_at, list_elements, tasks_of
from pipeline.files import hash_files, hold_lock, require_writable, write_sealed, write_text
from pipeline.run_folder import RunDir, frozen_config
from pipeline.workers import LocalWorkers, num_cores

if TYPE_CHECKING:
    from pipeline.evaluation.embedding_plan import EmbeddingPlan
    from pipeline.evaluation.models import LoadEncoder

# Tasks loaded or scored in parallel; each may take a few GiB.
_MAX_WORKERS = 8


def num_elements(config: EvaluateConfig) -> int:
    """Return the length of the job array."""
    return len(list_elements(config))


def run_element(config: EvaluateConfig, index: int, *, load: LoadEncoder | None = None) -> Result:
    """Score one element, unless it has a result that is still valid.

    It is scored again if its export, data or settings have changed since.

    Args:
        index: the array's task number, from 0.
        load: loads the model; by default as an export.

    Returns:
        The content of `result.json` in the element's folder.

    Raises:
        UserError: no such element, no export, or the task's data are incomplete.
    """
    element = element_at(config, index)
    return _valid_result(config, element) or _score_alone(config, element, load or _export_loader())


def _score_alone(config: EvaluateConfig, element: Element, load: LoadEncoder) -> Result:
    """Score an element, or wait for another process that does and take its result.

    Two processes would do its work twice, and replace the files of mteb under each other.
    """
    waited: list[str] = []

    def tell(holder: str) -> None:
        waited.append(holder)
        text = f"waiting for another process that scores it ({holder})"
        print(f"{_label(config, element)}: {text}", flush=True)

    require_writable(element.folder, key="output_dir")
    with hold_lock(element.folder / ".lock", tell=tell):
        # The other process may also have been killed.
        finished = _valid_result(config, element) if waited else None
        return finished or _score(config, element, load)


def _valid_result(config: EvaluateConfig, element: Element) -> Result | None:
    """Return the result of an earlier run, if nothing that it was computed from has changed."""
    result = read_result(element)
    if result is None:
        return None
    changed = changed_inputs(config, element, result)
    if not changed:
        print(f"{_label(config, element)}: already finished, skipped", flush=True)
        return result
    print(
        f"{_label(config, element)}: scored again, changed since: {', '.join(changed)}", flush=True
    )
    return None


def _label(config: EvaluateConfig, element: Element) -> str:
    return f"element {element.index + 1}/{num_elements(config)} {element.model.name} {element.task}"


def _score(config: EvaluateConfig, element: Element, load: LoadEncoder) -> Result:
    """Score an element and write its result."""
    from pipeline.evaluation.datasets import get_task
    from pipeline.evaluation.models import checkpoint_of
    from pipeline.evaluation.scoring import score_task

    started = time.monotonic()
    _store_config(config)
    # Before anything is loaded: a file that changes meanwhile must make this result invalid.
    dataset = get_task(element.task, element.own).metadata.dataset["path"]
    inputs = inputs_of(config, element, dataset)
    # Scores are drawn by step as long as this is the checkpoint of the step.
    checkpoint = checkpoint_of(element.model.path)
    encoder = load(config, element)
    with tempfile.TemporaryDirectory(prefix="diffembed-") as scratch:
        result = score_task(
            encoder,
            task_name=element.task,
            instruction=inputs["instruction"],
            snapshots=config.snapshots,
            scratch=Path(scratch),
            own=element.own,
        )
        seconds = round(time.monotonic() - started, 2)
        result |= {"inputs": inputs, "checkpoint": checkpoint, "seconds": seconds}
        if scaling := element.model.rope_scaling:
            result["rope_scaling"] = f"{scaling.kind} x {scaling.factor:g}"
        result["mteb_files"] = hash_files(Path(scratch) / "mteb")
        _replace_tree(Path(scratch) / "mteb", element.folder / "mteb")
    # Last: its presence means that the element has finished.
    write_sealed(element.result_path, dict(result))
    print(
        f"{_label(config, element)}: {result['metric']} {result['score']:.4f} "
        f"({result['seconds']} s)",
        flush=True,
    )
    return result


def _store_config(config: EvaluateConfig) -> None:
    """Write the resolved config as a submission does: `diffembed watch` lists its elements."""
    path, files = frozen_config(RunDir(config.output_dir).jobs, "evaluate", config)
    # Also where it exists: the newest copy counts.
    write_text(path, files[path])


def run_all(config: EvaluateConfig, *, load: LoadEncoder | None = None) -> list[Result]:
    """Score every element, one after another; a second run continues after the finished ones.

    Raises:
        UserError: a task is unknown or has no data, or a result cannot be written; before the
            first element is scored.
    """
    _check_ahead(config)
    return [run_element(config, index, load=load) for index in range(num_elements(config))]


def _check_ahead(config: EvaluateConfig) -> None:
    """Find errors of all elements before hours are spent on the first."""
    left = [element for element in list_elements(config) if read_result(element) is None]
    for element in left:
        require_writable(element.folder, key="output_dir")
    if left:
        from pipeline.evaluation.datasets import check_tasks

        tasks = tasks_of(config)
        check_tasks({e.task: tasks[e.task] for e in left}, config.snapshots)


def plan(config: EvaluateConfig) -> EmbeddingPlan:
    """List every distinct text of all tasks once, in blocks that array elements embed.

    Raises:
        UserError: a task's data are incomplete, or a text cannot fit the GPU.
    """
    from pipeline.evaluation.datasets import check_tasks
    from pipeline.evaluation.embedding_plan import write_plan

    require_writable(config.output_dir, key="output_dir")
    check_tasks(tasks_of(config), config.snapshots)
    _store_config(config)
    written = write_plan(config, num_workers=min(num_cores(), _MAX_WORKERS))
    print(
        f"{written.num_texts} distinct texts of {written.num_occurrences} in "
        f"{len(written.block_costs)} blocks, about {sum(written.block_costs) / 1e6:.1f} M tokens "
        f"per model of {written.occurrence_cost / 1e6:.1f} M with repetitions: {written.folder}",
        flush=True,
    )
    return written


def embed(
    config: EvaluateConfig,
    index: int,
    num: int,
    *,
    num_processes: int | None = None,
    load: LoadEncoder | None = None,
) -> int:
    """Embed element `index` of `num` of the config's plan; several ranks of one step share it.

    Args:
        index: of the array element, from 0.
        num: elements of the array.
        num_processes: processes to share the element's blocks; by default one per visible GPU,
            else one per core, and one where a launcher started several ranks already.
        load: loads a model; by default as an export.

    Returns:
        The number of embedded blocks, without the blocks that were on disk already.
    """
    from pipeline.evaluation.embed import embed_element
    from pipeline.evaluation.models import processes_here
    from pipeline.launch import discover_world

    require_writable(config.output_dir, key="output_dir")
    world = discover_world()
    if num_processes is None:
        exports = [model.path for model in config.models]
        # A launcher that started several ranks has shared the GPUs already.
        num_processes = processes_here(exports) if world.world_size == 1 else 1
    return embed_element(
        config,
        index,
        num,
        load=load or _export_loader(),
        rank=world.rank,
        world_size=world.world_size,
        num_processes=num_processes,
    )


def score_all(config: EvaluateConfig) -> list[Result]:
    """Score every element from the vectors that `embed` stored; needs no GPU.

    Reading a task's data and mteb's metrics keep one core busy, so that several processes score
    elements in parallel.

    Raises:
        UserError: vectors are missing.
    """
    elements = list_elements(config)
    # In the order of the elements, whatever finishes first.
    results = {element.index: _valid_result(config, element) for element in elements}
    unfinished = [index for index, result in results.items() if result is None]
    # A process takes as long to start as a small task to be scored: two tasks for each.
    num_workers = min(num_cores(), _MAX_WORKERS, len(unfinished) // 2)
    with contextlib.closing(LocalWorkers(num_workers, imports=("mteb",))) as workers:
        # All before the first: a folder that cannot be written must not cost an hour of scoring.
        for index in unfinished:
            require_writable(elements[index].folder, key="output_dir")
        for index, _ in workers.each(functools.partial(_score_stored, config), unfinished):
            results[index] = read_result(elements[index])
    return [result for result in results.values() if result is not None]


def _score_stored(config: EvaluateConfig, index: int) -> None:
    from pipeline.evaluation.embed import load_stored
    from pipeline.evaluation.models import share_cores

    share_cores()
    _score_alone(config, element_at(config, index), load_stored)


def _export_loader() -> LoadEncoder:
    from pipeline.evaluation.models import load_encoder

    return load_encoder


def _replace_tree(source: Path, target: Path) -> None:
    """Copy a folder and rename the copy, so that `target` is never half a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's folder: a rename works only within one disk.
    incoming = Path(tempfile.mkdtemp(prefix=".incoming-", dir=target.parent))
    # Not moved: scratch is often on another disk.
    shutil.copytree(source, incoming, dirs_exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    incoming.replace(target)
