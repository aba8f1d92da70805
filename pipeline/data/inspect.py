"""A prepared dataset shown to a person: sources, counts, length histograms, decoded samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.keyed import permute
from pipeline.data.manifest import LengthHistogram, Manifest
from pipeline.data.shards import Dataset
from pipeline.data.tokens import tokenizer_fingerprint
from pipeline.errors import UserError
from pipeline.run_dir import atomic_path
from pipeline.tokenizer import load_tokenizer

_BAR_WIDTH = 40
_SHOWN_GROUPS = 20
_SAMPLE_CHARACTERS = 400
HISTOGRAM_NAME = "lengths.png"


def verify(path: str | Path) -> str:
    """Hash every byte of a dataset folder against its manifest.

    Returns:
        One line that says what was read.

    Raises:
        UserError: something is missing or damaged; the message names the file.
    """
    dataset = Dataset.open(path)
    total = dataset.verify()
    manifest = dataset.manifest
    shards = len(manifest.example_shards) + len(manifest.document_shards)
    return f"{path}: {shards} shards, {total} bytes, all as in the manifest"


def inspect(path: str | Path, *, num_samples: int = 2, plot: bool = True) -> str:
    """Describe a dataset folder; also writes its length histogram there as a PNG.

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
    """Draw both length histograms into a PNG; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
