"""Report a mining: counts by rule, score ratios, agreement of retrievers, and sample rows.

counts of all blocks and shards --> audit.json --> audit.md, audit.png
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import AUDIT_NAME
from pipeline.evaluation.tables import as_label, markdown_table
from pipeline.files import atomic_path, load_arrays, write_json, write_text
from pipeline.mining.approximate import Recall, read_recalls
from pipeline.mining.pick import read_picked, sample_examples
from pipeline.mining.plan import Mining
from pipeline.mining.rules import OUTCOMES, Candidates
from pipeline.mining.teacher import read_scores
from pipeline.mining.texts import count_states, lowest_scores, positives_of, texts_by_number

# Ratios of a negative's score to the lowest positive's: 30 bins of 0.05 from 0 to 1.5, of which the
# first and last also hold everything beyond.
RATIO_STEP = 0.05
RATIO_BINS = 30
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Characters of a text in a sample row.
_SHOWN = 160


def count_ratios(
    ratios: NDArray[np.int64], candidates: Candidates, lowest: NDArray[np.float64]
) -> None:
    """Add the ratios of one query's negatives.

    Args:
        ratios: (retrievers, bands, RATIO_BINS) counts, changed in place.
        candidates: the negatives.
        lowest: (retrievers,) score of the lowest positive.
    """
    for retriever in range(len(lowest)):
        scores = candidates.scores[:, retriever]
        known = np.isfinite(scores)
        # A ratio means nothing for a positive that scores 0 or less.
        if not lowest[retriever] > 0 or not known.any():
            continue
        bins = np.floor(scores[known] / lowest[retriever] / RATIO_STEP).astype(np.int64)
        # Several negatives may share a bin, of which `+=` at indices would count one.
        np.add.at(ratios[retriever], (candidates.bands[known], np.clip(bins, 0, RATIO_BINS - 1)), 1)


def write_audit(mining: Mining, folder: Path) -> None:
    """Write audit.json, audit.md and audit.png into a dataset folder."""
    tree, ratios = _collect(mining)
    write_json(folder / "audit.json", tree)
    write_text(folder / AUDIT_NAME, audit_page(tree))
    plot_ratios(ratios, tree["retrievers"], folder / "audit.png")


def _collect(mining: Mining) -> tuple[dict[str, Any], NDArray[np.int64]]:
    config, manifest = mining.config, mining.source.manifest
    retrievers = [retriever.name for retriever in config.retrievers]
    sources = [source.name for source in manifest.sources]
    bands = [band.name for band in config.bands] or ["window"]
    picked = [read_picked(mining, block) for block in range(len(mining.query_blocks))]
    counts = np.sum([part["counts"] for part in picked], axis=0)
    shared = np.sum([part["shared"] for part in picked], axis=0) / manifest.num_examples
    mined, false, ratios = _read_summaries(mining)
    tree: dict[str, Any] = {
        "examples": manifest.num_examples,
        "documents": mining.num_documents,
        "negatives": config.negatives,
        "retrievers": retrievers,
        "texts": dataclasses.asdict(count_states(mining)),
        "corpora": {
            name: {
                "documents": count,
                "repeated": mining.corpora.repeated[name],
                "left_out": mining.corpora.left_out.get(name, {}),
            }
            for name, count in mining.corpora.read.items()
        },
        "outcomes": {
            source: {
                retriever: dict(zip(OUTCOMES, counts[s, r].tolist(), strict=True))
                for r, retriever in enumerate(retrievers)
            }
            for s, source in enumerate(sources)
            if counts[s].any()
        },
        "ratios": {
            f"{retriever}, {source}, {band}": _quantiles(ratios[r, s, b])
            for r, retriever in enumerate(retrievers)
            for s, source in enumerate(sources)
            for b, band in enumerate(bands)
            if ratios[r, s, b].any()
        },
        "short": {
            "queries": int((mined < config.negatives).sum()),
            "without": int((mined == 0).sum()),
            "negatives": int(mined.sum()),
        },
        "agreement": {
            f"{one}, {other}": round(float(shared[r, s]), 4)
            for r, one in enumerate(retrievers)
            for s, other in enumerate(retrievers)
            if r < s
        },
        "recall": {name: dataclasses.asdict(r) for name, r in read_recalls(mining).items()},
        "teacher": _teacher(mining, false),
        "samples": _samples(mining, retrievers, picked),
    }
    return tree, ratios


def _read_summaries(
    mining: Mining,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return negatives of each example, candidates that the teacher took, and all ratios."""
    parts = []
    for shard in range(len(mining.source.manifest.example_shards)):
        path = mining.summary("examples", shard).with_suffix(".npz")
        parts.append(load_arrays(path, "mined", "false", "ratios", fix=f"delete {path}"))
    mined = np.concatenate([part["mined"] for part in parts])
    false = np.concatenate([part["false"] for part in parts])
    return mined, false, np.sum([part["ratios"] for part in parts], axis=0)


def _quantiles(counts: NDArray[np.int64]) -> dict[str, float]:
    """Return quantiles of a histogram of ratios, at the upper ends of its bins."""
    share = np.cumsum(counts) / counts.sum()
    return {
        f"{quantile:.0%}": round(float((np.searchsorted(share, quantile) + 1) * RATIO_STEP), 2)
        for quantile in _QUANTILES
    }


def _teacher(mining: Mining, false: NDArray[np.int64]) -> dict[str, Any] | None:
    """Estimate the share of false negatives: candidates at or above the lowest positive."""
    if mining.config.teacher is None:
        return None
    above = total = 0
    for block in range(len(mining.query_blocks)):
        scores, picked = read_scores(mining, block), read_picked(mining, block)
        positives = positives_of(mining, mining.query_blocks[block].numbers)
        lowest = lowest_scores(positives, scores["positives"])
        rows = np.repeat(np.arange(len(lowest)), np.diff(picked["offsets"]))
        above += int((scores["candidates"] >= lowest[rows]).sum())
        total += len(rows)
    return {
        "candidates": total,
        "removed": int(false.sum()),
        "false_negative_rate": round(above / max(1, total), 4),
    }


def _samples(
    mining: Mining, retrievers: list[str], picked: list[dict[str, NDArray[Any]]]
) -> list[dict[str, Any]]:
    """Return rows with their texts, and the verdict on the best documents of each retriever."""
    verdicts = np.concatenate([part["verdicts"] for part in picked])
    scores = np.concatenate([part["verdict_scores"] for part in picked])
    examples = sample_examples(len(mining.source.examples))
    positives = positives_of(mining, examples)
    shown = np.concatenate([verdicts[:, 2], positives.values])
    texts = texts_by_number(mining, "documents", shown)
    queries = texts_by_number(mining, "queries", examples)
    rows = []
    for row, example in enumerate(examples.tolist()):
        # Rows of `verdicts`, the best documents of each retriever.
        own = np.flatnonzero(verdicts[:, 0] == example)
        rows.append(
            {
                "example": example,
                "query": queries[example][:_SHOWN],
                "positives": [texts[number][:_SHOWN] for number in positives[row].tolist()],
                "found": [
                    {
                        "retriever": retrievers[verdicts[place, 1]],
                        "document": int(verdicts[place, 2]),
                        "score": round(float(scores[place]), 4),
                        "verdict": OUTCOMES[verdicts[place, 3]],
                        "text": texts[int(verdicts[place, 2])][:_SHOWN],
                    }
                    for place in own.tolist()
                ],
            }
        )
    return rows


def audit_page(tree: dict[str, Any]) -> str:
    """Return the Markdown page of an audit."""
    short, texts = tree["short"], tree["texts"]
    lines = [
        "# What was mined",
        "",
        f"{tree['examples']:,} examples, {tree['documents']:,} documents. "
        f"{short['negatives']:,} negatives; {short['queries']:,} queries "
        f"({short['queries'] / tree['examples']:.1%}) have fewer than {tree['negatives']}, "
        f"{short['without']:,} have none.",
        "",
        f"Texts restored from tokens: {texts['exact']:,} exactly, {texts['cut']:,} up to where "
        f"they were cut, {texts['same_tokens']:,} with other case or spaces but the same tokens, "
        f"{texts['changed']:,} otherwise.",
    ]
    for name, corpus in tree["corpora"].items():
        others = [f"{count:,} {reason}" for reason, count in corpus["left_out"].items()]
        lines.append(
            f"\nCorpus {name}: {corpus['documents']:,} documents, of which "
            f"{corpus['repeated']:,} were there already"
            + (f"; not among them: {', '.join(others)}." if others else ".")
        )
    lines += ["", "## Found documents by rule", ""]
    # Columns of zeros only would not fit on the page.
    used = [
        outcome
        for outcome in OUTCOMES
        if any(row[outcome] for by in tree["outcomes"].values() for row in by.values())
    ]
    rows = [
        [source, retriever, *(f"{row[outcome]:,}" for outcome in used)]
        for source, by in tree["outcomes"].items()
        for retriever, row in by.items()
    ]
    lines.append(markdown_table(["source", "retriever", *used], rows))
    if tree["ratios"]:
        lines += ["", "## Negative's score / lowest positive's", ""]
        quantiles = list(next(iter(tree["ratios"].values())))
        rows = [[name, *map(str, row.values())] for name, row in tree["ratios"].items()]
        lines.append(markdown_table(["retriever, source, band", *quantiles], rows))
    if tree["agreement"]:
        lines += ["", "## Agreement: shared documents among the best 10", ""]
        rows = [[name, f"{share:.1%}"] for name, share in tree["agreement"].items()]
        lines.append(markdown_table(["retrievers", "shared"], rows))
    if tree["recall"]:
        lines += ["", "## Recall of approximate indexes", ""]
        lines += [f"{name}: {Recall(**recall)}." for name, recall in tree["recall"].items()]
    if teacher := tree["teacher"]:
        lines += [
            "",
            "## Teacher",
            "",
            f"{teacher['removed']:,} of {teacher['candidates']:,} candidates were removed as false "
            f"negatives. It scores {teacher['false_negative_rate']:.1%} of them at or above the "
            "lowest positive.",
        ]
    return "\n".join([*lines, "", "## Rows", "", *_sample_lines(tree["samples"])]) + "\n"


def _sample_lines(samples: list[dict[str, Any]]) -> list[str]:
    lines = []
    for sample in samples:
        lines.append(f"**{sample['example']}** {_plain(sample['query'])}")
        lines += [f"- positive: {_plain(text)}" for text in sample["positives"]]
        lines += [
            f"- {row['retriever']} {row['score']:.3f}, {row['verdict']}: {_plain(row['text'])}"
            for row in sample["found"]
        ]
        lines.append("")
    return lines


def _plain(text: str) -> str:
    """Return a text on one line that Markdown does not read."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"


def plot_ratios(ratios: NDArray[np.int64], retrievers: list[str], path: Path) -> Path:
    """Draw the distribution of score ratios of each retriever's negatives."""
    # Inside, because it takes long; not pyplot, which keeps every figure in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = np.arange(RATIO_BINS) * RATIO_STEP
    for number, name in enumerate(retrievers):
        counts = ratios[number].sum(axis=(0, 1))  # over sources and bands
        if counts.any():
            axes.step(edges, counts / counts.sum(), where="post", label=as_label(name))
    axes.axvline(1.0, color="black", linestyle="dashed", linewidth=1)
    axes.set_xlabel("negative's score / lowest positive's")
    axes.set_ylabel("share of negatives")
    # matplotlib warns of a legend without entries: no negative, or no positive above 0.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
