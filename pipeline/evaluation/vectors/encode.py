"""Texts to vectors in one file, in blocks, by any number of processes, continued if killed.

    input --blocks--> read | tokenise | embed, longest first --parts--> output, in input order

Reading and tokenising run ahead in a thread. What a process holds at a time is two groups of texts.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.crew import gather_crew
from pipeline.errors import UserError, blame
from pipeline.evaluation.models.finite import not_finite_fix
from pipeline.evaluation.models.place import load_here, processes_here, resolve
from pipeline.evaluation.vectors.files import read_recipe, schema_of, write_vectors
from pipeline.evaluation.vectors.job import (
    EncodeJob,
    Plan,
    Text,
    begin,
    read_groups,
    read_plan,
    recipe_of,
)
from pipeline.model.load import LoadedExport
from pipeline.run_dir import require_writable
from pipeline.sealed import batch_writer, read_batch

Item = TypeVar("Item")


def encode_file(job: EncodeJob, *, num_processes: int | None = None) -> Path:
    """Embed all texts of a job; run again after a kill, it does only what is missing.

    Under mpirun or srun the ranks share the blocks; else this process starts its own.

    Args:
        job: what to embed and how.
        num_processes: processes to start; by default one per GPU, else one per core.

    Returns:
        The file: `id` (string) and `vector` (fixed-size list) in the input's order, as Arrow or
        Parquet; for NumPy the vectors alone, with their ids in a JSON file.

    Raises:
        UserError: input, model or output are not usable.
    """
    # Now, so that a run that is continued on another machine does not mix two precisions.
    job = dataclasses.replace(job, precision=resolve(job.precision))
    recipe = recipe_of(job)
    if job.output.exists():
        _check_finished(job, recipe)
        print(f"{job.output}: finished")
        return job.output
    require_writable(job.output.parent, key="--output")
    meeting = job.output.with_name(f".{job.output.name}.step")
    num_processes = num_processes or processes_here([job.model])
    with gather_crew(num_processes, meeting_folder=meeting) as crew:
        crew.wait()
        if crew.is_main:
            begin(job, recipe)
        crew.wait()
        parts = [job.part(block) for block in range(len(read_plan(job.folder).blocks))]
        work = functools.partial(_encode_block, job)
        crew.run(work, parts, claims=job.folder / "claims")
        if crew.is_main:
            _assemble(job)
            print(job.output)
        crew.wait()
    return job.output


def _check_finished(job: EncodeJob, recipe: str) -> None:
    """Accept the file of this very job as done."""
    if read_recipe(job.output) != recipe:
        raise UserError(
            f"--output: {job.output} exists, but was not made from this input with these settings",
            fix="remove it, or choose another name",
        )


def _encode_block(job: EncodeJob, number: int) -> None:
    """Write the part of one block."""
    plan = read_plan(job.folder)
    model = _load(job)
    schema = schema_of(job.dtype, model.num_dimensions, plan.recipe)
    started, num_texts, num_tokens, num_full = time.monotonic(), 0, 0, 0
    with batch_writer(job.part(number), schema) as write:
        for texts, ids, skipped in _ahead(_tokenised(job, plan, model, number)):
            vectors = _stored(job, model.encode_tokens(ids, skipped), texts)
            columns = [pa.array([text.id for text in texts], pa.string()), vectors]
            write(pa.record_batch(columns, schema=schema))
            num_texts += len(texts)
            num_tokens += sum(map(len, ids))
            num_full += sum(len(row) >= model.max_length for row in ids)
    seconds = time.monotonic() - started
    print(
        f"encode: block {number + 1} of {len(plan.blocks)}, {num_texts} texts, "
        f"{num_tokens:,} tokens, {num_full} texts at the limit of {model.max_length} tokens, "
        f"{num_tokens / seconds:,.0f} tokens/s",
        file=sys.stderr,
        flush=True,
    )


@functools.lru_cache(maxsize=1)
def _load(job: EncodeJob) -> LoadedExport:
    """The model on this process's device, once per process."""
    model = load_here(
        job.model,
        max_tokens=job.max_tokens,
        precision=job.precision,
        dimensions=job.dimensions,
    )
    return model if job.max_length is None else model.cut_at(job.max_length, key="--max-length")


def _stored(
    job: EncodeJob, vectors_ND: NDArray[np.float32], texts: Sequence[Text]
) -> pa.FixedSizeListArray:
    """The vectors in the type that they are stored in.

    Raises:
        UserError: a vector is not finite, so that nothing could be found by it.
    """
    with np.errstate(over="ignore"):
        stored_ND = vectors_ND.astype(job.dtype)
    for found_ND, cause in ((vectors_ND, f"by {job.model}"), (stored_ND, f"as {job.dtype}")):
        broken_N = ~np.isfinite(found_ND).all(axis=1)
        if broken_N.any():
            first = texts[int(np.argmax(broken_N))].record
            raise first.fail(
                f"the vector of this text is not finite {cause} (as are {broken_N.sum()} of "
                f"{len(texts)})",
                fix=not_finite_fix(job.precision)
                if found_ND is vectors_ND
                else "store float32 vectors: --dtype float32",
            )
    return pa.FixedSizeListArray.from_arrays(pa.array(stored_ND.ravel()), stored_ND.shape[1])


def _tokenised(
    job: EncodeJob, plan: Plan, model: LoadedExport, number: int
) -> Iterator[tuple[list[Text], list[list[int]], list[int]]]:
    """Texts that are packed together, their token ids, and how many of these the prefix has."""
    prefix, suffix = model.template.frame(job.role, job.instruction)
    for group in read_groups(plan, number):
        yield group, *model.tokenize([text.text for text in group], prefix, suffix)


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made in a thread while the last one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as thread:
        upcoming: Future[Item | None] = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _assemble(job: EncodeJob) -> None:
    """Put the parts together in the input's order and remove them."""
    plan = read_plan(job.folder)
    parts = [job.part(number) for number in range(len(plan.blocks))]
    fix = f"remove {job.folder} and run the same command again"
    with blame(f"{parts[0]}: damaged", fix=fix), pa.memory_map(str(parts[0])) as source:
        schema = pa.ipc.open_file(source).schema
    write_vectors(job.output, schema, _batches(parts, numbered=plan.fields.id is None, fix=fix))
    shutil.rmtree(job.folder)


def _batches(parts: Sequence[Path], *, numbered: bool, fix: str) -> Iterator[pa.RecordBatch]:
    """The batches of all parts, named by row numbers where the records have no ids.

    Raises:
        UserError: a part is damaged.
    """
    row = 0
    for path in parts:
        with blame(f"{path}: damaged", fix=fix), pa.memory_map(str(path)) as source:
            num_batches = pa.ipc.open_file(source).num_record_batches
        for k in range(num_batches):
            batch = read_batch(path, k, fix=fix)
            if numbered:
                names = map(str, range(row, row + len(batch)))
                batch = batch.set_column(0, batch.schema.field(0), pa.array(names, pa.string()))
            row += len(batch)
            yield batch
