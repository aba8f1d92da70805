"""Embed the texts of a file into one file, with any number of processes, and resume after a kill.

    input: files --> blocks of bytes --> part-000000.arrow, ... --> output, in the input's order
                     one process each

    of one block:    read --> group of texts --> tokenise | embed, longest first --> part
                     in a thread, one group ahead         | in the process

A process holds two groups of texts at a time. A finished part is never computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import Precision, Role, require
from pipeline.data.sources.containers import plan_blocks, read_records
from pipeline.data.sources.paths import file_size, list_files
from pipeline.data.sources.records import BadRecords, FileBlock, OnBadRow, Record
from pipeline.errors import UserError, blame
from pipeline.evaluation.encode_files import (
    SUFFIXES,
    Fields,
    read_recipe,
    schema_of,
    survey,
    write_vectors,
)
from pipeline.evaluation.models import load_here, not_finite_fix, processes_here, resolve_precision
from pipeline.files import batch_writer, read_batch, write_json
from pipeline.model.export_folder import export_fingerprint
from pipeline.model.load_export import LoadedExport
from pipeline.workers import build_alone, read_ahead

_VERSION = 2
# Characters of a group of texts.
_GROUP_CHARACTERS = 2**20
_SPLIT = None  # the default split of a hub data set
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncodeJob:
    """The arguments of `diffembed encode`.

    Attributes:
        model: an export.
        input: JSON lines, Parquet or plain lines; a file, a folder, a glob or an fsspec URL.
        output: the file to write: .arrow (IPC), .parquet or .npy.
        field: the field of a record that is the text; plain lines have only `text`.
        id_field: the field of a record's id; None for `id` or `_id` if the records have one, empty
            for row numbers.
        title_field: a field that precedes the text; None for the `title` of documents whose text
            is in `text`, empty for no title.
        role: of the texts, for the model's template.
        instruction: of all texts; empty for none.
        max_length: tokens after which a text is cut; None for the export's own limit.
        dtype: of the vectors in the file.
        dimensions: keep only this many of a vector's first numbers.
        precision: of weights and arithmetic.
        max_tokens: packed tokens of one forward.
        block_bytes: input of a block, which a killed process has to do again. None: a 64th of the
            input, within bounds, so that many processes have work.
    """

    model: Path
    input: str
    output: Path
    field: str = "text"
    id_field: str | None = None
    title_field: str | None = None
    role: Role = "document"
    instruction: str = ""
    max_length: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    dimensions: int | None = None
    precision: Precision = "auto"
    max_tokens: int = 16384
    block_bytes: int | None = None

    def __post_init__(self) -> None:
        length, width = self.max_length, self.dimensions
        require(length is None or length >= 1, "--max-length", length, "an integer >= 1 (tokens)")
        require(width is None or width >= 1, "--dim", width, "an integer >= 1")
        require(self.max_tokens >= 1, "--max-tokens", self.max_tokens, "an integer >= 1")
        suffix = self.output.suffix
        require(
            suffix in SUFFIXES, "--output", str(self.output), f"a name in {', '.join(SUFFIXES)}"
        )

    @property
    def folder(self) -> Path:
        """Return the folder of plan and parts, until all parts are finished."""
        return self.output.with_name(f".{self.output.name}.parts")

    def part(self, block: int) -> Path:
        """Return the path of a block's vectors."""
        return self.folder / f"part-{block:06d}.arrow"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncodePlan:
    """The blocks and fields that the processes of a job agree on."""

    recipe: str  # hash of everything that decides the vectors
    blocks: tuple[FileBlock, ...]
    fields: Fields


def recipe_of(job: EncodeJob) -> str:
    """Hash everything that decides the vectors: input, model and settings."""
    tree = {
        **dataclasses.asdict(job),
        "version": _VERSION,
        "model": export_fingerprint(job.model),
        # The time as well: a file may be written again with other texts of the same size. Of a URL
        # only the size is known.
        "input": [
            [file, file_size(file), Path(file).stat().st_mtime_ns if Path(file).is_file() else 0]
            for file in list_files(job.input, "--input")
        ],
    }
    # None of these changes a vector.
    del tree["output"], tree["block_bytes"], tree["max_tokens"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def start_or_continue(job: EncodeJob, recipe: str) -> None:
    """Keep the parts of a killed run of the same job; otherwise remove them and write a plan.

    Raises:
        UserError: a record cannot be embedded.
    """
    # A claim of a killed run would keep every process from its block.
    shutil.rmtree(job.folder / "claims", ignore_errors=True)
    if _recipe_of_parts(job.folder) == recipe:
        return
    shutil.rmtree(job.folder, ignore_errors=True)
    files = list_files(job.input, "--input")
    # Many blocks for many processes, but not thousands of small files.
    size = job.block_bytes or min(max(sum(map(file_size, files)) // 64, 2**16), 2**22)
    blocks = [
        block
        for file in files
        for block in plan_blocks(file, split=_SPLIT, block_bytes=size, max_rows=None)
    ]
    # A pass over the whole input: hours of embedding must not end at a record without a text.
    bad = BadRecords("--input")
    fields = survey(
        (record for block in blocks for record in _read(block, on_bad=bad.add)),
        bad,
        source=job.input,
        field=job.field,
        id_field=job.id_field,
        title_field=job.title_field,
        role=job.role,
    )
    job.folder.mkdir(parents=True)
    plan = EncodePlan(recipe=recipe, blocks=tuple(blocks), fields=fields)
    write_json(job.folder / _PLAN, dataclasses.asdict(plan))
    # This process may have read the plan of an earlier job in this folder.
    read_plan.cache_clear()


def _recipe_of_parts(folder: Path) -> str | None:
    """Return the recipe of the parts in a job's folder; None without parts or a readable plan."""
    try:
        return read_plan(folder).recipe
    except (OSError, ValueError, TypeError, KeyError):
        return None


@functools.lru_cache(maxsize=1)
def read_plan(folder: Path) -> EncodePlan:
    """Read the plan that `start_or_continue` wrote."""
    tree = json.loads((folder / _PLAN).read_text())
    blocks = tuple(FileBlock(**block) for block in tree["blocks"])
    return EncodePlan(recipe=tree["recipe"], blocks=blocks, fields=Fields(**tree["fields"]))


def _read(block: FileBlock, on_bad: OnBadRow | None = None) -> Iterator[Record]:
    return read_records(block, split=_SPLIT, on_bad=on_bad, blank_lines=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text to embed; `id` is None if row numbers name the vectors."""

    id: str | None
    text: str
    record: Record


def read_groups(plan: EncodePlan, number: int) -> Iterator[list[Text]]:
    """Yield the texts of a block, a bounded number of characters at a time."""
    group: list[Text] = []
    characters = 0
    for record in _read(plan.blocks[number]):
        # A blank line between JSON records.
        if record.value is None:
            continue
        fields = plan.fields
        # Characters bound the memory of a group; texts differ too much in length to be counted.
        group.append(Text(id=fields.id_of(record), text=fields.text_of(record), record=record))
        characters += len(group[-1].text)
        if characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def encode_file(job: EncodeJob, *, num_processes: int | None = None) -> Path:
    """Embed all texts of a job; after a kill, a second run computes only the missing parts.

    Under mpirun or srun the ranks share the blocks; otherwise this process starts children.

    Args:
        job: the arguments.
        num_processes: children to start; by default one per GPU, else one per core.

    Returns:
        The output: `id` (string) and `vector` (fixed-size list) in the input's order, as Arrow or
        Parquet; for NumPy only the vectors, with their ids in a JSON file.

    Raises:
        UserError: input, model or output are not usable.
    """
    # Part of the recipe: a run that is continued on another machine must not mix two precisions.
    job = dataclasses.replace(job, precision=resolve_precision(job.precision))
    recipe = recipe_of(job)
    with build_alone(
        job.output,
        key="--output",
        num_workers=num_processes or processes_here([job.model]),
        is_done=lambda: _is_finished(job, recipe),
        # Asked again under the lock: the process that held it may have finished the output.
        start=lambda: None if _is_finished(job, recipe) else start_or_continue(job, recipe),
        say=lambda text: print(f"encode: {text}", file=sys.stderr, flush=True),
    ) as workers:
        # Without a plan the output was already complete.
        if (job.folder / _PLAN).exists():
            parts = [job.part(block) for block in range(len(read_plan(job.folder).blocks))]
            work = functools.partial(_encode_block, job)
            workers.run(work, parts, claims=job.folder / "claims")
            if workers.is_main:
                _assemble(job)
                print(job.output)
    return job.output


def _is_finished(job: EncodeJob, recipe: str) -> bool:
    """Return True if the output is that of this very job.

    Raises:
        UserError: it is another file.
    """
    if not job.output.exists():
        return False
    if read_recipe(job.output) != recipe:
        raise UserError(
            f"--output: {job.output} exists, but was not made from this input with these settings",
            fix="remove it, or choose another name",
        )
    # A run that was killed right after the rename left its parts.
    shutil.rmtree(job.folder, ignore_errors=True)
    print(f"{job.output}: finished")
    return True


def _encode_block(job: EncodeJob, number: int) -> None:
    """Embed a block and write its part."""
    # Both are cached in each process: a child is given nothing but the job.
    plan = read_plan(job.folder)
    model = _load(job)
    schema = schema_of(job.dtype, model.num_dimensions, plan.recipe)
    started, num_texts, num_tokens, num_full = time.monotonic(), 0, 0, 0
    with batch_writer(job.part(number), schema) as write:
        for texts, ids, skipped in read_ahead(
            _tokenised(job, plan, model, number), thread_name="encode"
        ):
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
    """Load the model on this process's device, once per process."""
    model = load_here(
        job.model,
        max_tokens=job.max_tokens,
        precision=job.precision,
        dimensions=job.dimensions,
    )
    if job.max_length is None:
        return model
    return model.with_max_length(job.max_length, key="--max-length")


def _stored(
    job: EncodeJob, vectors_ND: NDArray[np.float32], texts: Sequence[Text]
) -> pa.FixedSizeListArray:
    """Convert vectors to the type in the file.

    Raises:
        UserError: a vector is not finite, so that no search could use it.
    """
    # Values beyond float16 become infinite without a warning; the check below refuses them.
    with np.errstate(over="ignore"):
        stored_ND = vectors_ND.astype(job.dtype)
    # Before and after the conversion: causes and advice differ.
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
    job: EncodeJob, plan: EncodePlan, model: LoadedExport, number: int
) -> Iterator[tuple[list[Text], list[list[int]], list[int]]]:
    """Yield groups of texts, their token ids, and how many of these belong to the prefix."""
    # The same for all texts of a job.
    prefix, suffix = model.template.frame(job.role, job.instruction)
    for group in read_groups(plan, number):
        yield group, *model.tokenize([text.text for text in group], prefix, suffix)


def _assemble(job: EncodeJob) -> None:
    """Join the parts in the input's order, and remove them."""
    plan = read_plan(job.folder)
    parts = [job.part(number) for number in range(len(plan.blocks))]
    fix = f"remove {job.folder} and run the same command again"
    with blame(f"{parts[0]}: damaged", fix=fix), pa.memory_map(str(parts[0])) as source:
        # All parts have the same schema.
        schema = pa.ipc.open_file(source).schema
    write_vectors(job.output, schema, _batches(parts, numbered=plan.fields.id is None, fix=fix))
    shutil.rmtree(job.folder)


def _batches(parts: Sequence[Path], *, numbered: bool, fix: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of all parts, with row numbers as ids if the records have none.

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
                # Numbers run over all parts, so that they are known only now.
                names = map(str, range(row, row + len(batch)))
                batch = batch.set_column(0, batch.schema.field(0), pa.array(names, pa.string()))
            row += len(batch)
            yield batch
