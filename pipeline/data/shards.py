"""Read a dataset folder: ragged rows by id from memory-mapped Arrow shards.

    manifest.json        sources, groups, lengths, and the name, rows and sha256 of each shard
    examples-K.arrow     query tokens; numbers of the positive and negative documents; scores
    documents-K.arrow    each distinct document once, ordered by hash
    vectors/*-K.npy      a teacher's vectors, row for row, where mining stored them
    report.md, dropped.jsonl, recipe.json    for people, and for the next `prepare`

An id is a position in the shards of a kind, one after another. `verify_dataset` and
`inspect_dataset` are for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import ModelConfig, Template
from pipeline.data.batch import IntArray, Ragged
from pipeline.data.manifest import (
    FILE_NAME,
    LengthHistogram,
    Manifest,
    ShardInfo,
    find_rows,
    read_manifest,
    require_files,
)
from pipeline.data.order import permute
from pipeline.data.vectors import VECTORS_FOLDER, VectorFiles
from pipeline.errors import UserError
from pipeline.files import atomic_path, hash_file, table_writer
from pipeline.model_limits import read_limits, warn_if_unlike_base
from pipeline.tokenizer import TokenizerInfo, load_tokenizer, tokenizer_fingerprint

DOCUMENT_SCHEMA = pa.schema(
    [
        ("tokens", pa.large_list(pa.int32())),
        ("hash", pa.binary(16)),
        # Tokens of the instruction, at the front; pooling can leave them out.
        ("instruction_tokens", pa.int32()),
    ],
)
EXAMPLE_SCHEMA = pa.schema(
    [
        ("query", pa.large_list(pa.int32())),
        ("instruction_tokens", pa.int32()),
        ("positives", pa.large_list(pa.int64())),
        ("negatives", pa.large_list(pa.int64())),
        # This many negatives at the front are always chosen before the others.
        ("num_first_negatives", pa.int32()),
        # Hashes; equal values mark known false negatives. -1: no concept.
        ("concept", pa.int64()),
        ("query_key", pa.int64()),
        # Teacher scores, positives then negatives; empty without a teacher.
        ("scores", pa.large_list(pa.float32())),
    ]
)
MINED_EXAMPLE_SCHEMA = pa.schema(
    [
        *EXAMPLE_SCHEMA,
        # Documents from which a run may draw other negatives in each epoch, best first.
        ("candidates", pa.large_list(pa.int64())),
        # Teacher scores of the candidates; empty without a teacher.
        ("candidate_scores", pa.large_list(pa.float32())),
        # Number of each candidate's band in the manifest's `mining.bands`; empty without bands.
        ("candidate_bands", pa.large_list(pa.int8())),
    ]
)


def ragged_array(rows: Sequence[NDArray[np.int32]] | Ragged, kind: pa.DataType) -> pa.Array:
    """Return an Arrow large_list of the rows' values, without copying a `Ragged`."""
    rows = rows if isinstance(rows, Ragged) else Ragged.from_rows(rows)
    return pa.LargeListArray.from_arrays(pa.array(rows.offsets), pa.array(rows.values, type=kind))


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow IPC file atomically, as one record batch."""
    # One batch, so that one array of offsets finds the rows of a whole shard.
    table = table.combine_chunks()
    # An empty table has no batches, but readers expect one.
    batches = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
    with table_writer(path, table.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def map_batch(path: Path) -> pa.RecordBatch:
    """Memory-map the single record batch of an Arrow IPC file.

    Raises:
        UserError: the file is missing, damaged, or has another number of record batches.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise UserError(f"{path}: {reader.num_record_batches} record batches", allowed="1")
        return reader.get_batch(0)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing", fix="prepare the dataset again") from error
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


class _Shard:
    """One mapped file: numpy views of its columns; the kernel loads the pages that are read."""

    def __init__(self, path: Path, info: ShardInfo, schema: pa.Schema) -> None:
        batch = map_batch(path)
        if batch.schema != schema or batch.num_rows != info.rows:
            raise _damaged(path, f"not the {info.rows} rows of the manifest")
        self.columns: dict[str, NDArray[np.int64]] = {}
        self.offsets: dict[str, IntArray] = {}
        for name in schema.names:
            column = batch.column(name)
            # Arrow trusts mapped files: a wrong offset would make it read outside of the file.
            try:
                column.validate()
                if column.null_count:
                    raise _damaged(path, f"nulls in {name}")
                self._add(path, name, column)
            except (pa.ArrowException, ValueError) as error:
                raise _damaged(path, str(error).splitlines()[0]) from error

    def _add(self, path: Path, name: str, column: pa.Array) -> None:
        if pa.types.is_large_list(column.type):
            # `values` is the whole buffer, to which the offsets of a batch that is no slice refer.
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            if offsets[0] != 0 or offsets[-1] > len(values) or (np.diff(offsets) < 0).any():
                raise _damaged(path, f"offsets of {name}")
            self.offsets[name], self.columns[name] = offsets, values
        elif pa.types.is_integer(column.type):
            self.columns[name] = column.to_numpy()
        else:
            # A FixedSizeBinary column: one buffer of 16 bytes per row.
            self.hashes = np.frombuffer(column.buffers()[1] or b"", dtype="S16")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged ({reason})", fix="prepare the dataset again")


class Table:
    """Rows of a list of shards under one numbering."""

    def __init__(self, folder: Path, infos: Sequence[ShardInfo], schema: pa.Schema) -> None:
        self._folder, self._infos, self._schema = folder, tuple(infos), schema
        # Mapped on first use, so that opening a dataset of thousands of shards stays cheap.
        self._open: dict[int, _Shard] = {}
        require_files(folder, infos, fix="prepare the dataset again")

    def __len__(self) -> int:
        return sum(info.rows for info in self._infos)

    def _shard(self, number: int) -> _Shard:
        shard = self._open.get(number)
        if shard is None:
            info = self._infos[number]
            shard = self._open[number] = _Shard(self._folder / info.file, info, self._schema)
        return shard

    def _split(self, ids: IntArray) -> list[tuple[_Shard, IntArray, IntArray]]:
        """Return each shard with some of the ids, their positions in `ids`, and their rows."""
        return [(self._shard(n), where, rows) for n, where, rows in find_rows(self._infos, ids)]

    def hashes(self) -> NDArray[np.bytes_]:
        """(R,) 16-byte hashes of all rows."""
        hashes = [self._shard(number).hashes for number in range(len(self._infos))]
        return np.concatenate(hashes) if hashes else np.empty(0, dtype="S16")

    def scalars(self, name: str, ids: IntArray) -> IntArray:
        """(R,) values of an integer column at rows `ids`."""
        return self._collect(ids, lambda shard, rows: shard.columns[name][rows])

    def lengths(self, name: str, ids: IntArray) -> IntArray:
        """(R,) lengths of a list column at rows `ids`; touches no values."""
        return self._collect(
            ids, lambda shard, rows: shard.offsets[name][rows + 1] - shard.offsets[name][rows]
        )

    def first(self, name: str, ids: IntArray) -> IntArray:
        """(R,) first values of a list column at rows `ids`, none of which may be empty."""
        return self._collect(
            ids, lambda shard, rows: shard.columns[name][shard.offsets[name][rows]]
        )

    def _collect(self, ids: IntArray, read: Callable[[_Shard, IntArray], IntArray]) -> IntArray:
        """(R,) integers that `read` returns for rows of a shard, in the order of `ids`."""
        out = np.empty(len(ids), dtype=np.int64)
        for shard, positions, rows in self._split(ids):
            out[positions] = read(shard, rows)
        return out

    def views(self, name: str, ids: IntArray) -> list[NDArray[np.int64]]:
        """Return the values of a list column at rows `ids`, as views of the mapped file."""
        out: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)] * len(ids)
        for shard, positions, rows in self._split(ids):
            values = shard.columns[name]
            starts, stops = shard.offsets[name][rows], shard.offsets[name][rows + 1]
            spans = zip(positions.tolist(), starts.tolist(), stops.tolist(), strict=True)
            for position, start, stop in spans:
                out[position] = values[start:stop]
        return out

    def ragged(self, name: str, ids: IntArray) -> Ragged:
        """Return the values of a list column at rows `ids`, copied into one array."""
        return Ragged.from_rows(self.views(name, ids))


class Dataset:
    """A prepared dataset folder: examples that refer to a deduplicated document store."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        schema = MINED_EXAMPLE_SCHEMA if manifest.has_candidates else EXAMPLE_SCHEMA
        self.examples = Table(folder, manifest.example_shards, schema)
        self.documents = Table(folder, manifest.document_shards, DOCUMENT_SCHEMA)
        self._vectors: dict[str, VectorFiles] = {}
        if (teacher := manifest.teacher) is not None:
            self._vectors = {
                "queries": VectorFiles(folder, teacher.queries, width=teacher.width),
                "documents": VectorFiles(folder, teacher.documents, width=teacher.width),
            }

    @staticmethod
    def exists(path: Path) -> bool:
        """Return True for a folder that holds a prepared dataset."""
        return (path / FILE_NAME).is_file()

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Dataset:
        """Map a dataset folder.

        Names, sizes, row counts and offsets are always checked; `verify` also hashes every byte.

        Raises:
            UserError: the folder is not a dataset, incomplete, damaged, or of another version.
        """
        folder = Path(path)
        dataset = cls(folder, read_manifest(folder))
        if verify:
            dataset.verify()
        return dataset

    def verify(self) -> int:
        """Hash every shard against the manifest; return the number of bytes read."""
        total = 0
        for path, info in self._files():
            if hash_file(path) != info.sha256:
                raise UserError(
                    f"{path}: damaged (its sha256 is not the manifest's)",
                    fix="copy the file again, or prepare the dataset again",
                )
            total += info.bytes
        return total

    def _files(self) -> Iterator[tuple[Path, ShardInfo]]:
        for info in (*self.manifest.example_shards, *self.manifest.document_shards):
            yield self.folder / info.file, info
        if (teacher := self.manifest.teacher) is not None:
            for info in (*teacher.queries, *teacher.documents):
                yield self.folder / VECTORS_FOLDER / info.file, info

    def teacher_vectors(
        self, *, queries: IntArray, documents: IntArray
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return a teacher's stored vectors of length 1, of examples' queries and of documents.

        Args:
            queries: (B,) example ids.
            documents: (K,) document ids.

        Returns:
            (B, W) and (K, W), W the width in the manifest.

        Raises:
            UserError: the dataset holds no vectors, or damaged ones.
        """
        if not self._vectors:
            raise UserError(
                f"{self.folder}: no teacher vectors",
                fix="run `diffembed mine` with a teacher whose vectors are stored",
            )
        return self._vectors["queries"].rows(queries), self._vectors["documents"].rows(documents)

    def damaged(self, what: str) -> UserError:
        """Return the error for a reader that found a value that no intact shard holds."""
        return UserError(
            f"{self.folder}: {what}",
            fix="run `diffembed data verify` on the folder to find the damaged shard",
        )

    def require_tokenizer(self, fingerprint: str, path: str) -> None:
        """Refuse a tokenizer other than the one the dataset was made with."""
        if fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"{self.folder}: prepared with the tokenizer {self.tokenizer.path!r}, which "
                f"differs from the tokenizer of {path!r}",
                fix="prepare the dataset with the model's own tokenizer",
                docs="trouble.md#other-tokenizer",
            )

    def require_model(self, model: ModelConfig) -> None:
        """Refuse a model without an embedding or a position for some token of the shards.

        Raises:
            UserError: names the longest text or the largest token, and the model's limit.
        """
        warn_if_unlike_base(model, self.template)
        factor = 1.0 if model.rope_scaling is None else model.rope_scaling.factor
        limits = read_limits(model.path, model.revision, factor=factor)
        manifest = self.manifest
        lengths = {
            f"{self.folder}: the longest query": manifest.query_lengths.longest,
            f"{self.folder}: the longest document": manifest.document_lengths.longest,
        }
        limits.require_length(
            lengths, fix="prepare with shorter max_query_length and max_document_length"
        )
        limits.warn_of_length(lengths)
        # A tokenizer may have more tokens than the model if no text contains them; only then are
        # the shards read.
        if limits.num_tokens is not None and self.tokenizer.vocab_size > limits.num_tokens:
            limits.require_token(self.largest_token(), where=str(self.folder))

    def largest_token(self) -> int:
        """Return the largest token of any text; reads all shards."""
        manifest = self.manifest
        columns = [(info.file, "query") for info in manifest.example_shards]
        columns += [(info.file, "tokens") for info in manifest.document_shards]
        return max(
            pc.max(map_batch(self.folder / file).column(name).flatten()).as_py() or 0
            for file, name in columns
        )

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer the dataset was made with."""
        return self.manifest.tokenizer

    @property
    def template(self) -> Template:
        """The template that joined instructions and texts before tokenising."""
        return self.manifest.template

    @property
    def max_query_length(self) -> int:
        """Tokens at which queries were cut."""
        return self.manifest.max_query_length

    @property
    def max_document_length(self) -> int:
        """Tokens at which documents were cut."""
        return self.manifest.max_document_length

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return self.manifest.num_examples

    @property
    def fingerprint(self) -> str:
        """Hash of everything in the dataset."""
        return self.manifest.fingerprint


_BAR_WIDTH = 40
_SHOWN_GROUPS = 20
_SAMPLE_CHARACTERS = 400
HISTOGRAM_NAME = "lengths.png"
AUDIT_NAME = "audit.md"  # written by mining


def verify_dataset(path: str | Path) -> str:
    """Hash every byte of a dataset folder against its manifest.

    Returns:
        One line: shards and bytes that were read.

    Raises:
        UserError: something is missing or damaged; the message names the file.
    """
    dataset = Dataset.open(path)
    total = dataset.verify()
    manifest = dataset.manifest
    shards = len(manifest.example_shards) + len(manifest.document_shards)
    vectors = ""
    if (teacher := manifest.teacher) is not None:
        vectors = f", {len(teacher.queries) + len(teacher.documents)} files of teacher vectors"
    return f"{path}: {shards} shards{vectors}, {total} bytes, all as in the manifest"


def inspect_dataset(path: str | Path, *, num_samples: int = 2, plot: bool = True) -> str:
    """Describe a dataset folder; also write its length histogram there as a PNG.

    Args:
        path: the dataset folder.
        num_samples: examples to show decoded, where the tokenizer can be loaded.
        plot: whether to write the PNG.
    """
    dataset = Dataset.open(path)
    manifest = dataset.manifest
    lines = [
        f"{path}: {manifest.num_examples} examples, {manifest.num_documents} documents, "
        f"fingerprint {manifest.fingerprint[:12]}",
        f"tokenizer {manifest.tokenizer.path}, {manifest.tokenizer.vocab_size} tokens"
        + (", EOS appended" if manifest.tokenizer.append_eos else ""),
        f"template: query {manifest.template.query!r}, document {manifest.template.document!r}",
        "",
        *_sources(manifest),
        "",
        *_histogram("query tokens", manifest.query_lengths, manifest.max_query_length),
        *_histogram("document tokens", manifest.document_lengths, manifest.max_document_length),
        *_mining(dataset),
    ]
    if num_samples:
        lines += _samples(dataset, num_samples)
    if plot:
        lines.append(f"length histogram: {plot_lengths(manifest, Path(path) / HISTOGRAM_NAME)}")
    return "\n".join(lines)


def _sources(manifest: Manifest) -> Iterator[str]:
    for source in manifest.sources:
        drops = ", ".join(f"{reason} {count}" for reason, count in source.dropped.items())
        yield (
            f"source {source.name} ({source.format}, weight {source.weight:g}): {source.rows} rows "
            f"read, {source.examples} examples; dropped: {drops or 'none'}"
        )
        yield from (f"  warning: {warning}" for warning in source.warnings)
        groups = [group for group in manifest.groups if group.source == source.name]
        for group in groups[:_SHOWN_GROUPS]:
            yield f"  {group.count:>8} x {group.instruction or '(no or mixed instructions)'!r}"
        if len(groups) > _SHOWN_GROUPS:
            yield f"  ... and {len(groups) - _SHOWN_GROUPS} more instructions"
    if manifest.num_near_duplicates:
        yield f"near-duplicate documents merged: {manifest.num_near_duplicates}"


def _mining(dataset: Dataset) -> Iterator[str]:
    """Yield the audit of a mined dataset, up to its single rows."""
    if dataset.manifest.mining is None:
        return
    yield ""
    path = dataset.folder / AUDIT_NAME
    if path.is_file():
        yield path.read_text().partition("\n## Rows")[0].strip()
    else:
        yield f"mined; {path} is missing"


def _histogram(name: str, lengths: LengthHistogram, limit: int) -> Iterator[str]:
    mean = lengths.tokens / max(lengths.texts, 1)
    yield (
        f"{name}: mean {mean:.1f}, longest {lengths.longest}, limit {limit}, "
        f"{lengths.cut} at the limit"
    )
    largest = max(lengths.counts, default=0)
    for power, count in enumerate(lengths.counts):
        if count:
            bar = "#" * max(1, round(_BAR_WIDTH * count / largest))
            yield f"  {2**power:>6}-{2 ** (power + 1) - 1:<6} {count:>9} {bar}"


def _samples(dataset: Dataset, count: int) -> Iterator[str]:
    try:
        tokenizer = load_tokenizer(dataset.tokenizer.path)
    except UserError as error:
        path, reason = dataset.tokenizer.path, error.found
        yield f"no samples: the tokenizer {path} cannot be loaded ({reason})"
        return
    if tokenizer_fingerprint(tokenizer) != dataset.tokenizer.fingerprint:
        yield f"no samples: the tokenizer {dataset.tokenizer.path} has changed since"
        return
    # Spread over the dataset, because its first examples are all of one group.
    wanted = np.arange(min(count, dataset.num_examples))
    for example in permute(wanted, dataset.num_examples, 0).tolist():
        ids = np.array([example])
        query = tokenizer.decode(dataset.examples.views("query", ids)[0])
        yield f"example {example}: {query[:_SAMPLE_CHARACTERS]!r}"
        for name in ("positives", "negatives"):
            documents = dataset.examples.ragged(name, ids).values
            for view in dataset.documents.views("tokens", documents):
                yield f"  {name[:-1]}: {tokenizer.decode(view)[:_SAMPLE_CHARACTERS]!r}"


def plot_lengths(manifest: Manifest, path: Path) -> Path:
    """Draw both length histograms into a PNG; return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not by pyplot, which keeps figures alive and may look for a display.
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    sides = (("queries", manifest.query_lengths), ("documents", manifest.document_lengths))
    for axes, (name, lengths) in zip(figure.subplots(1, 2), sides, strict=True):
        axes.bar(range(len(lengths.counts)), lengths.counts, width=0.9)
        labels = [str(2**power) for power in range(len(lengths.counts))]
        axes.set_xticks(range(len(labels)), labels, rotation=45)
        axes.set_xlabel("tokens, at least")
        axes.set_title(f"{lengths.texts} {name}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
