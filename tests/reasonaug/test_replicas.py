from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from ReasonAug.replicas import write_replicas

NEEDLE_LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]


class BagOfWords(AbsEncoder):
    """Hashed word counts: knows no meaning."""

    def __init__(self) -> None:
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name="tests/bag-of-words",
            revision="1",
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=1,
            memory_usage_mb=1,
            max_tokens=None,
            embed_dim=2048,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["NumPy"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=True,
            training_datasets=None,
        )

    def encode(self, inputs: Any, **_: Any) -> Any:
        texts = [text for batch in inputs for text in batch["text"]]
        counts = np.zeros((len(texts), 2048), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                counts[row, zlib.crc32(word.encode()) % 2048] += 1
        return np.log1p(counts)


@contextmanager
def local_task(name: str, hub: Path, cache: Path) -> Iterator[Any]:
    """mteb's own task, reading from `hub`; `datasets` converts into `cache`."""
    task = mteb.get_task(name)
    source = task.metadata.dataset
    update = {"dataset": {**source, "path": str(hub / source["path"])}}
    task.metadata = task.metadata.model_copy(update=update)
    saved, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, cache
    try:
        yield task
    finally:
        datasets.config.HF_DATASETS_CACHE = saved


def score(name: str, hub: Path, cache: Path) -> dict[str, Any]:
    """Scores of the bag of words, per split."""
    with local_task(name, hub, cache) as task:
        result = mteb.evaluate(
            BagOfWords(), task, cache=None, show_progress_bar=False, co2_tracker=False
        )
    return {split: subsets[0] for split, subsets in result[0].scores.items()}


@pytest.mark.parametrize(
    ("name", "fewest_queries", "fewest_documents"),
    [("BrightTheoremQAQuestionsRetrieval", 100, 300), ("BrightAopsRetrieval", 200, 300)],
)
def test_bright_tasks_are_hard_for_words_alone(
    name: str, fewest_queries: int, fewest_documents: int, hub: Path, tmp_path: Path
) -> None:
    with local_task(name, hub, tmp_path) as task:
        task.load_data()
        assert len(task.queries["standard"]) >= fewest_queries
        assert len(task.corpus["standard"]) >= fewest_documents
        judged = task.relevant_docs["standard"]
        for query in task.queries["standard"]:
            candidates = set(task.top_ranked["standard"][query])
            assert judged[query] and set(judged[query]) <= candidates
            assert len(candidates) < len(task.corpus["standard"])  # exclusions are in force
    assert 0.05 < score(name, hub, tmp_path)["standard"]["ndcg_at_10"] < 0.45


def test_bright_replicas_hold_nothing_that_is_trained_on(hub: Path, generated: Path) -> None:
    lines = (generated / "problems.jsonl").read_text().splitlines()
    split = {row["id"]: row["split"] for row in map(json.loads, lines)}
    for path in (hub / "mteb" / "BRIGHT").glob("*/*.jsonl"):
        ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
        kinds = {split[name] for name in ids}
        assert "train" not in kinds
        if path.parent.name == "examples":
            unseen = "unseen_concepts" if path.stem == "aops" else "unseen_problems"
            assert kinds == {unseen}


def test_bright_queries_are_not_among_their_documents_and_half_are_newly_worded(
    hub: Path, generated: Path
) -> None:
    lines = (generated / "problems.jsonl").read_text().splitlines()
    form = {row["id"]: row["form"] for row in map(json.loads, lines)}
    ids = {
        kind: {
            subset: [json.loads(line)["id"] for line in path.read_text().splitlines()]
            for subset in ("theoremqa_questions", "aops")
            for path in [hub / "mteb" / "BRIGHT" / kind / f"{subset}.jsonl"]
        }
        for kind in ("documents", "examples")
    }
    for subset, queries in ids["examples"].items():
        assert len(set(queries)) == len(queries)
        assert not set(queries) & set(ids["documents"][subset])
    asked = [form[query] for query in ids["examples"]["theoremqa_questions"]]
    assert asked.count(3) * 2 == len(asked)


def test_followir_keeps_instructions_and_candidates_and_its_p_mrr_is_not_zero(
    hub: Path, tmp_path: Path
) -> None:
    name = "Core17InstructionRetrieval"
    with local_task(name, hub, tmp_path) as task:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        data = task.dataset["default"]["test"]
        instructions = dict(
            zip(data["queries"]["id"][:], data["queries"]["instruction"][:], strict=True)
        )
        bases = {query.rsplit("-", 1)[0] for query in instructions}
        assert len(bases) >= 12
        for base in bases:
            og, changed = f"{base}-og", f"{base}-changed"
            assert instructions[og] != instructions[changed]
            assert data["top_ranked"][og] == data["top_ranked"][changed]
            relevant = [
                {doc for doc, grade in data["relevant_docs"][query].items() if grade}
                for query in (og, changed)
            ]
            assert set() < relevant[1] < relevant[0]
    assert abs(score(name, hub, tmp_path)["test"]["p-MRR"]) > 0.001


@pytest.mark.parametrize("name", ["LEMBNeedleRetrieval", "LEMBPasskeyRetrieval"])
def test_long_tasks_have_all_lengths_and_hide_what_can_be_found(
    name: str, hub: Path, tmp_path: Path
) -> None:
    with local_task(name, hub, tmp_path) as task:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        splits = [f"test_{length}" for length in NEEDLE_LENGTHS]
        assert list(task.dataset["default"]) == splits
        for data in task.dataset["default"].values():
            assert len(data["corpus"]) == 10
            assert len(data["queries"]) >= 5
    scores = score(name, hub, tmp_path)
    assert list(scores) == splits
    assert np.mean([split["ndcg_at_1"] for split in scores.values()]) > 0.3  # chance: 0.1


def test_long_documents_keep_their_nominal_length_up_to_the_cap(
    generated: Path, tmp_path: Path
) -> None:
    write_replicas(generated, tmp_path, seed=0, max_tokens=512)
    for length in NEEDLE_LENGTHS:
        path = tmp_path / "mteb" / "LEMBPasskeyRetrieval" / "corpus" / f"test_{length}.jsonl"
        for line in path.read_text().splitlines():
            tokens = len(re.findall(r"\w+|[^\w\s]", json.loads(line)["text"]))
            assert 0.75 * min(length, 512) < tokens <= min(length, 512)


def test_the_same_seed_gives_the_same_replicas(hub: Path, generated: Path, tmp_path: Path) -> None:
    write_replicas(generated, tmp_path, seed=0, max_tokens=1024)
    first = {p.relative_to(hub): p.read_bytes() for p in hub.rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert first == again
