"""Describe a dataset folder in its manifest, the last file that `prepare` writes.

A folder without a manifest is not a dataset. Everything else in it is found, and checked, through
the manifest: names, rows and hashes of the shards, groups of examples, tokenizer and template.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.config import Template
from pipeline.data.order import Group
from pipeline.errors import UserError
from pipeline.files import check_kind, hash_file, read_json, unseal, write_sealed
from pipeline.tokenizer import TokenizerInfo

VERSION = 2
FILE_NAME = "manifest.json"
REPORT_NAME = "report.md"
DROPPED_NAME = "dropped.jsonl"
RECIPE_NAME = "recipe.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One Arrow or npy file: its name within the folder, rows, size in bytes, and hash."""

    file: str
    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, rows: int) -> ShardInfo:
        """Describe a file that is written."""
        return cls(file=path.name, rows=rows, bytes=path.stat().st_size, sha256=hash_file(path))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo:
    """The result of one source: rows read, examples kept, drops by reason, warnings."""

    name: str
    format: str
    path: str
    weight: float
    rows: int
    examples: int
    dropped: dict[str, int]
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LengthHistogram:
    """Token lengths: counts[k] texts have 2**k <= length < 2**(k + 1)."""

    counts: tuple[int, ...]
    texts: int
    tokens: int
    longest: int
    cut: int  # texts that reach the truncation length

    @classmethod
    def of(cls, lengths: NDArray[np.int64], limit: int) -> LengthHistogram:
        """Return the histogram of (R,) lengths truncated at `limit`."""
        # Bin k holds lengths from 2**k; an empty text counts as one token.
        bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
        return cls(
            counts=tuple(np.bincount(bins).tolist()),
            texts=len(lengths),
            tokens=int(lengths.sum()),
            longest=int(lengths.max(initial=0)),
            cut=int((lengths >= limit).sum()),
        )

    def plus(self, other: LengthHistogram) -> LengthHistogram:
        """Return the histogram of both sets of texts."""
        size = max(len(self.counts), len(other.counts))
        counts = np.zeros(size, dtype=np.int64)
        for part in (self.counts, other.counts):
            counts[: len(part)] += np.array(part, dtype=np.int64)
        return LengthHistogram(
            counts=tuple(counts.tolist()),
            texts=self.texts + other.texts,
            tokens=self.tokens + other.tokens,
            longest=max(self.longest, other.longest),
            cut=self.cut + other.cut,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInfo:
    """Vectors of a teacher for every document and query, in files below `vectors/`.

    Row r of the file of a shard belongs to row r of that shard.
    """

    name: str  # as the config of the mining names the model
    fingerprint: str  # hash of all that decides the vectors: weights, template, settings
    width: int
    norm: Literal["unit"]  # every vector has length 1, within fp16
    documents: tuple[ShardInfo, ...]
    queries: tuple[ShardInfo, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MiningInfo:
    """The origin of mined negatives, of candidates and of a teacher's vectors."""

    source: str  # fingerprint of the dataset whose examples were mined
    settings: dict[str, Any]
    models: dict[str, str]  # fingerprint of each retriever and scoring teacher
    bands: tuple[str, ...] = ()  # names of the numbers in `candidate_bands`
    candidates: bool = False  # the example shards have the columns of candidates
    teacher: TeacherInfo | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything about a dataset except its tokens.

    `groups` cover the examples in order, without gaps. Example ids are positions in the example
    shards, one after another; document ids are positions in the document shards.
    """

    version: int
    recipe: str  # hash of the config, the inputs and the tokenizer that it was prepared from
    tokenizer: TokenizerInfo
    template: Template
    max_query_length: int
    max_document_length: int
    num_examples: int
    num_documents: int
    num_near_duplicates: int
    has_scores: bool
    sources: tuple[SourceInfo, ...]
    groups: tuple[Group, ...]
    query_lengths: LengthHistogram
    document_lengths: LengthHistogram
    example_shards: tuple[ShardInfo, ...]
    document_shards: tuple[ShardInfo, ...]
    mining: MiningInfo | None = None  # None for what `prepare` wrote

    @property
    def teacher(self) -> TeacherInfo | None:
        """The teacher whose vectors are stored."""
        return None if self.mining is None else self.mining.teacher

    @property
    def has_candidates(self) -> bool:
        """True where examples list candidates from which negatives can be drawn."""
        return self.mining is not None and self.mining.candidates

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest, which holds the shards' hashes, so that it covers every token."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def weights(self) -> dict[str, float]:
        """The sources' mixture weights, as prepared."""
        return {source.name: source.weight for source in self.sources if source.examples}

    def to_json(self) -> str:
        """The text of manifest.json; equal manifests give equal text."""
        tree = TypeAdapter(Manifest).dump_python(self, mode="json")
        # Manifests from before there was mining have no such key, and must keep their fingerprint.
        if self.mining is None:
            del tree["mining"]
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest atomically, sealed; equal manifests give equal bytes."""
    write_sealed(path, json.loads(manifest.to_json()))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a dataset folder.

    Raises:
        UserError: the folder holds no dataset, a damaged one, or one of another version.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(
            f"{folder}: no prepared dataset ({FILE_NAME} is missing)",
            fix="run `diffembed prepare` with output_dir set to this folder",
        )
    fix = "prepare the dataset again"
    tree = read_json(path, fix=fix)
    if not isinstance(tree, dict) or "version" not in tree:
        raise UserError(f"{path}: damaged (no version)", fix=fix)
    if tree["version"] != VERSION:
        raise UserError(
            f"{path}: version {tree['version']}",
            allowed=f"version {VERSION}",
            fix="update diffembed, or prepare the dataset again with this version",
        )
    try:
        manifest = check_kind(unseal(tree, path, fix=fix), Manifest, where=str(path), fix=fix)
    except UserError as error:
        if str(path) in error.found:
            raise
        # A rule of the template, whose message does not name the file.
        raise UserError(f"{path}: damaged ({error})", fix=fix) from error
    for reason in _contradictions(manifest):
        raise UserError(f"{path}: damaged ({reason})", fix=fix)
    return manifest


def holds_dataset(folder: Path, *, key: str) -> bool:
    """Return whether an output folder holds a dataset; False if it is missing or empty.

    Raises:
        UserError: it holds something else; `key` names it in the config.
    """
    if (folder / FILE_NAME).is_file():
        return True
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    raise UserError(
        f"{key}: {folder} exists, but is not a dataset", fix=f"choose another {key}, or remove it"
    )


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Yield counts and names that contradict each other."""
    counted = (
        ("examples", manifest.num_examples, manifest.example_shards),
        ("documents", manifest.num_documents, manifest.document_shards),
    )
    for name, total, shards in counted:
        if total < 1 or sum(shard.rows for shard in shards) != total:
            yield f"the shards do not hold {total} {name}"
    files = [*manifest.example_shards, *manifest.document_shards]
    if (teacher := manifest.teacher) is not None:
        files += [*teacher.documents, *teacher.queries]
        yield from _teacher_contradictions(manifest, teacher)
    for shard in files:
        # A name with a slash would read a file outside the folder.
        if Path(shard.file).name != shard.file or shard.rows < 1:
            yield f"shard {shard.file!r} with {shard.rows} rows"
    end = 0
    for group in manifest.groups:
        if group.start != end or group.count < 1:
            yield f"group {group.instruction!r} of {group.source} does not start at {end}"
        end += group.count
    if end != manifest.num_examples:
        yield f"the groups end at {end}, not at {manifest.num_examples}"
    missing = {group.source for group in manifest.groups} - {s.name for s in manifest.sources}
    if missing:
        yield f"groups of unknown sources {sorted(missing)}"


def _teacher_contradictions(manifest: Manifest, teacher: TeacherInfo) -> Iterator[str]:
    """Yield files of vectors that do not match their shards, by whose rows they are found."""
    if teacher.width < 1:
        yield f"teacher vectors of width {teacher.width}"
    sides = (
        ("documents", teacher.documents, manifest.document_shards),
        ("queries", teacher.queries, manifest.example_shards),
    )
    for name, files, shards in sides:
        if [file.rows for file in files] != [shard.rows for shard in shards]:
            yield f"teacher vectors of {name} in other files or rows than their shards"


def require_files(folder: Path, infos: Sequence[ShardInfo], *, fix: str) -> None:
    """Refuse a folder in which a file of the manifest is missing or has another size."""
    for info in infos:
        path = folder / info.file
        if not path.is_file():
            raise UserError(f"{path}: missing", fix=fix)
        if path.stat().st_size != info.bytes:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes",
                allowed=f"{info.bytes} bytes, as in the manifest",
                fix=f"copy the file again, or {fix}",
            )


def find_rows(
    infos: Sequence[ShardInfo], ids: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the number of each file that holds some of the ids, their positions, and their rows."""
    ends = np.cumsum([info.rows for info in infos], dtype=np.int64)
    # On the right side, because an id that equals a file's end is the first of the next file.
    files = np.searchsorted(ends, ids, side="right")
    for number in np.unique(files).tolist():
        positions = np.flatnonzero(files == number)
        yield number, positions, ids[positions] - (int(ends[number]) - infos[number].rows)
