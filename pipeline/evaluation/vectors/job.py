"""What `diffembed encode` is asked to do, its plan on disk, and the texts of each block."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pipeline.config import Precision
from pipeline.config.rules import require
from pipeline.data.sources.bad_rows import BadRecords
from pipeline.data.sources.records import (
    Block,
    OnBadRow,
    Record,
    file_size,
    list_files,
    plan_blocks,
    read_records,
)
from pipeline.evaluation.models.fingerprints import export_fingerprint
from pipeline.evaluation.tasks.texts import Role
from pipeline.evaluation.vectors.files import SUFFIXES
from pipeline.evaluation.vectors.texts import Fields, survey
from pipeline.run_dir import write_json

_VERSION = 2
# Characters of the texts that are embedded, and held in memory, at a time.
_GROUP_CHARACTERS = 2**20
_SPLIT = None  # of a hub data set: its default
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncodeJob:
    """What to embed and how.

    Attributes:
        model: an export.
        input: JSON lines, Parquet or plain lines; a file, a folder, a glob or an fsspec URL.
        output: the file to write: .arrow (IPC), .parquet or .npy.
        field: which field of a record is the text; plain lines have only `text`.
        id_field: which field names a record; None for `id` or `_id` where the records have one,
            empty for row numbers.
        title_field: which field stands before the text; None for the `title` of documents whose
            text is in `text`, empty for no title.
        role: whether texts are queries or documents, for the model's template.
        instruction: of all texts; empty for none.
        max_length: tokens after which a text is cut; None for the export's own limit.
        dtype: of the vectors in the file.
        dimensions: keep only so many of a vector's first numbers.
        precision: of weights and arithmetic.
        max_tokens: packed tokens of one forward.
        block_bytes: input of a block; what a killed run may have to do again per process. None: a
            64th of the input, within bounds, so that many processes have work.
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
        """Where plan and parts wait for the last of them."""
        return self.output.with_name(f".{self.output.name}.parts")

    def part(self, block: int) -> Path:
        """The vectors of a block."""
        return self.folder / f"part-{block:06d}.arrow"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the processes of a job agree on."""

    recipe: str  # hash of all that decides the vectors
    blocks: tuple[Block, ...]
    fields: Fields


def recipe_of(job: EncodeJob) -> str:
    """Hash of what is embedded and how."""
    tree = {
        **dataclasses.asdict(job),
        "version": _VERSION,
        "model": export_fingerprint(job.model),
        "input": [
            [file, file_size(file), Path(file).stat().st_mtime_ns if Path(file).is_file() else 0]
            for file in list_files(job.input, "--input")
        ],
    }
    del tree["output"], tree["block_bytes"], tree["max_tokens"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def begin(job: EncodeJob, recipe: str) -> None:
    """Continue the same job where it was left, start over otherwise.

    Raises:
        UserError: a record cannot be embedded.
    """
    shutil.rmtree(job.folder / "claims", ignore_errors=True)
    if _begun_recipe(job.folder) == recipe:
        return
    shutil.rmtree(job.folder, ignore_errors=True)
    files = list_files(job.input, "--input")
    size = job.block_bytes or min(max(sum(map(file_size, files)) // 64, 2**16), 2**22)
    blocks = [
        block
        for file in files
        for block in plan_blocks(file, split=_SPLIT, block_bytes=size, max_rows=None)
    ]
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
    plan = Plan(recipe=recipe, blocks=tuple(blocks), fields=fields)
    write_json(job.folder / _PLAN, dataclasses.asdict(plan))
    read_plan.cache_clear()


def _begun_recipe(folder: Path) -> str | None:
    """The recipe of what is begun in a job's folder; None for nothing, or a damaged plan."""
    try:
        return read_plan(folder).recipe
    except (OSError, ValueError, TypeError, KeyError):
        return None


@functools.lru_cache(maxsize=1)
def read_plan(folder: Path) -> Plan:
    """The plan that `begin` left in a job's folder."""
    tree = json.loads((folder / _PLAN).read_text())
    blocks = tuple(Block(**block) for block in tree["blocks"])
    return Plan(recipe=tree["recipe"], blocks=blocks, fields=Fields(**tree["fields"]))


def _read(block: Block, on_bad: OnBadRow | None = None) -> Iterator[Record]:
    return read_records(block, split=_SPLIT, on_bad=on_bad, blank_lines=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text to embed; `id` is None where row numbers name the vectors."""

    id: str | None
    text: str
    record: Record


def read_groups(plan: Plan, number: int) -> Iterator[list[Text]]:
    """The texts of a block, a bounded number of characters at a time."""
    group: list[Text] = []
    characters = 0
    for record in _read(plan.blocks[number]):
        if record.value is None:
            continue
        fields = plan.fields
        group.append(Text(id=fields.id_of(record), text=fields.text_of(record), record=record))
        characters += len(group[-1].text)
        if characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
