"""Texts that prepare drops, merges and keeps, checked one by one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import ConfigMaker, words, write_jsonl

from pipeline.config import DecontaminateConfig, EvaluationSetConfig, SourceConfig, Template
from pipeline.data.prepare import prepare
from pipeline.data.prepare.contamination import ContaminationIndex
from pipeline.data.shards import Dataset, inspect_dataset
from pipeline.errors import UserError
from pipeline.tokenizer import TextTokenizer, load_fast_tokenizer


@pytest.fixture
def build(make_config: ConfigMaker, tmp_path: Path) -> Any:
    """Prepare records given as dicts, each list as one source."""

    def run(*sources: list[dict[str, Any]], name: str = "dataset", **options: Any) -> Dataset:
        configs = []
        per_source = options.pop("source_options", {})
        for number, records in enumerate(sources):
            path = write_jsonl(tmp_path / f"source{number}.jsonl", records)
            configs.append(
                SourceConfig(name=f"s{number}", format="columns", path=str(path), **per_source)
            )
        config = make_config(*configs, name=name, **options)
        return Dataset.open(prepare(config, num_workers=1), verify=True)

    return run


def documents(dataset: Dataset, tokenizer_path: Path) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    ids = np.arange(len(dataset.documents))
    return [tokenizer.decode(view) for view in dataset.documents.views("tokens", ids)]


def dropped(dataset: Dataset) -> list[tuple[str, str, str]]:
    lines = (dataset.folder / "dropped.jsonl").read_text().splitlines()
    return [(e["dropped"], e["reason"], e["text"]) for e in map(json.loads, lines)]


def test_a_text_is_stored_once_over_all_sources(build: Any, tokenizer_path: Path) -> None:
    first = [{"query": "a", "positives": ["one", "two"], "negatives": ["three"]}]
    second = [{"query": "b", "positives": ["three"], "negatives": ["one", "one"]}]
    dataset = build(first, second)
    assert sorted(documents(dataset, tokenizer_path)) == ["one", "three", "two"]
    positives = dataset.examples.ragged("positives", np.arange(2))
    negatives = dataset.examples.ragged("negatives", np.arange(2))
    assert positives[1].tolist() == negatives[0].tolist()
    assert negatives[1].tolist() == positives[0].tolist()[:1]


def test_a_positive_is_not_also_a_negative(build: Any) -> None:
    dataset = build([{"query": "a", "positives": ["yes"], "negatives": ["yes", "no"]}])
    assert dataset.examples.lengths("negatives", np.array([0])).tolist() == [1]
    assert dropped(dataset) == [("negative", "equals a positive", "yes")]
    assert dataset.manifest.sources[0].dropped == {"negative: equals a positive": 1}


def test_rows_without_query_or_positive_are_dropped_and_reported(build: Any) -> None:
    dataset = build(
        [
            {"query": " ", "positives": ["a"]},
            {"query": "lost", "positives": ["", " \n"]},
            {"query": "kept", "positives": ["b", ""]},
        ]
    )
    assert dataset.num_examples == 1
    assert ("query", "no positive left", "lost") in dropped(dataset)
    assert ("query", "empty", " ") in dropped(dataset)
    report = (dataset.folder / "report.md").read_text()
    assert "query: no positive left 1" in report and "'lost'" in report


def test_scores_stay_beside_their_documents(build: Any, tokenizer_path: Path) -> None:
    record = {
        "query": "a",
        "positives": ["good", "", "fine"],
        "negatives": ["fine", "bad", "worse"],
        "s": [5, 4, 3, 2, 1, 0],
    }
    dataset = build([record], source_options={"columns": {"scores": "s"}})
    texts = documents(dataset, tokenizer_path)
    lists = [dataset.examples.ragged(name, np.array([0])) for name in ("positives", "negatives")]
    ids = np.concatenate([found.values for found in lists])
    scores = dataset.examples.ragged("scores", np.array([0])).values
    assert dict(zip([texts[k] for k in ids], scores.tolist(), strict=True)) == {
        "good": 5.0,
        "fine": 3.0,
        "bad": 1.0,
        "worse": 0.0,
    }
    assert dataset.manifest.has_scores


def test_near_duplicates_become_one_document_and_never_a_negative(
    build: Any, tokenizer_path: Path
) -> None:
    rng = random.Random(0)
    text = words(rng, 200)
    near = text.replace(text.split()[100], "changed", 1).upper()
    other = words(rng, 200)
    records = [
        {"query": "a", "positives": [text], "negatives": [near, other]},
        {"query": "b", "positives": [near], "negatives": [other]},
    ]
    dataset = build(records, near_duplicates=0.9)
    assert len(dataset.documents) == 2
    assert dataset.manifest.num_near_duplicates == 1
    positives = dataset.examples.ragged("positives", np.arange(2))
    assert positives[0].tolist() == positives[1].tolist()
    assert dataset.examples.lengths("negatives", np.arange(2)).tolist() == [1, 1]
    assert [reason for _, reason, _ in dropped(dataset)] == ["near-duplicate"]
    assert len(build(records, name="plain").documents) == 3


def test_rows_that_are_all_dropped_are_no_near_duplicates(build: Any) -> None:
    with pytest.raises(UserError, match="no example"):
        build([{"query": "alone", "positives": []}], near_duplicates=0.9)


def test_texts_of_an_evaluation_set_are_dropped_with_the_place_they_were_found(
    build: Any, tmp_path: Path
) -> None:
    rng = random.Random(2)
    problem, passage = words(rng, 60), words(rng, 120)
    write_jsonl(tmp_path / "queries.jsonl", [{"text": problem}])
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": passage}])
    shuffled = problem.split()
    shuffled[::10] = ["other"] * len(shuffled[::10])  # no 13-gram survives, most characters do
    records = [
        {"query": problem, "positives": ["copied query"]},
        {"query": " ".join(shuffled), "positives": ["edited query"]},
        {"query": "fine", "positives": ["intro " + passage]},
        {"query": words(rng, 40), "positives": [words(rng, 80)], "negatives": [passage]},
    ]
    rule = DecontaminateConfig(
        sets=(
            EvaluationSetConfig(name="bench", path=str(tmp_path / "queries.jsonl")),
            EvaluationSetConfig(
                name="bench-corpus", path=str(tmp_path / "corpus.jsonl"), queries=False
            ),
        )
    )
    dataset = build(records, decontaminate=rule)
    assert dataset.num_examples == 1
    lines = (dataset.folder / "dropped.jsonl").read_text().splitlines()
    found = {(e["dropped"], e.get("found in", "").split(":")[0]) for e in map(json.loads, lines)}
    assert ("query", "bench") in found
    assert ("positive", "bench-corpus") in found
    assert ("negative", "bench-corpus") in found
    reasons = [json.loads(line).get("detail", "") for line in lines]
    assert any("matching ratio" in reason for reason in reasons)
    assert any("13-grams" in reason for reason in reasons)
    assert build(records, name="plain").num_examples == 4


def test_documents_that_were_not_cut_are_not_tokenised_again(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    records = [
        {"query": words(rng, 5), "positives": [words(rng, 3 if k % 4 else 100)]} for k in range(40)
    ]
    short = build(records, name="short", max_document_length=32)
    fresh = build(records, name="fresh", max_document_length=60)
    counted: list[int] = []
    encode = TextTokenizer.encode

    def counting(self: TextTokenizer, texts: Any, max_length: int, **ends: Any) -> Any:
        if max_length == 60:
            counted.append(len(texts))
        return encode(self, texts, max_length, **ends)

    monkeypatch.setattr(TextTokenizer, "encode", counting)
    reused = build(records, name="reused", max_document_length=60, reuse=short.folder)
    assert sum(counted) == short.manifest.document_lengths.cut == 10
    assert reused.manifest == fresh.manifest


def test_tokens_of_a_damaged_dataset_are_not_taken_over(build: Any) -> None:
    records = [{"query": f"query {k}", "positives": [f"positive number {k}"]} for k in range(20)]
    earlier = build(records, name="earlier")
    shard = earlier.folder / "documents-00000.arrow"
    data = bytearray(shard.read_bytes())
    place = bytes(data).index(earlier.documents.views("tokens", np.array([3]))[0].tobytes())
    data[place] ^= 1  # another token, just as valid
    shard.write_bytes(bytes(data))

    with pytest.raises(UserError, match="documents-00000"):
        build(records, name="reused", reuse=earlier.folder)


def test_a_truncated_text_keeps_its_eos(build: Any, tokenizer_path: Path) -> None:
    rng = random.Random(4)
    records = [{"query": words(rng, 60), "positives": [words(rng, 200), "short"]}]
    dataset = build(records, append_eos=True, max_query_length=16, max_document_length=20)
    eos = dataset.tokenizer.eos_id
    query = dataset.examples.views("query", np.array([0]))[0]
    assert len(query) == 16 and query[-1] == eos and (query == eos).sum() == 1
    for view in dataset.documents.views("tokens", np.arange(2)):
        assert view[-1] == eos and (view == eos).sum() == 1
    assert sorted(dataset.documents.lengths("tokens", np.arange(2)).tolist())[1] == 20


def test_prepared_strings_are_those_that_evaluation_will_format(
    make_config: ConfigMaker, tmp_path: Path, tokenizer_path: Path
) -> None:
    template = Template(query="Task: {instruction} | {text}", document="Passage: {text}")
    record = {"query": "who", "positive": "he", "negative": "she"}
    path = write_jsonl(tmp_path / "allnli.jsonl", [record])
    source = SourceConfig(name="e5", format="e5", path=str(path), instruction="Pair up")
    dataset = Dataset.open(prepare(make_config(source, template=template), num_workers=1))
    tokenizer_json, _ = load_fast_tokenizer(str(tokenizer_path), append_eos=False)
    encoder = TextTokenizer(tokenizer_json, eos_id=None, append_eos=False)
    assert dataset.template == template
    stored = dataset.template
    (query,), _ = encoder.encode([stored.format_query("who", "Pair up")], 48)
    assert dataset.examples.views("query", np.array([0]))[0].tolist() == query.tolist()
    # Documents of a symmetric set carry the instruction as well.
    documents = [stored.document_prefix("Pair up") + text for text in ("he", "she")]
    pair, _ = encoder.encode(documents, 64)
    views = dataset.documents.views("tokens", np.arange(2))
    assert sorted(view.tolist() for view in views) == sorted(row.tolist() for row in pair)


def test_hard_negatives_are_capped_and_rows_without_any_left_out_on_request(build: Any) -> None:
    records = [
        {"query": "many", "positives": ["p"], "negatives": ["first", "second", "third"]},
        {"query": "none", "positives": ["q"], "negatives": []},
    ]
    options = {"max_negatives": 2, "require_negatives": True}
    dataset = build(records, source_options=options)
    assert dataset.examples.lengths("negatives", np.arange(dataset.num_examples)).tolist() == [2]
    assert dropped(dataset) == [("query", "no hard negative", "none")]


def test_too_many_instructions_make_one_group(build: Any) -> None:
    records = [
        {"query": f"q{k}", "positives": [f"p{k}"], "how": f"instruction {k}"} for k in range(1100)
    ]
    dataset = build(records, source_options={"columns": {"instruction": "how"}})
    assert [(group.instruction, group.count) for group in dataset.manifest.groups] == [("", 1100)]


def test_a_source_made_of_evaluation_documents_is_marked_for_whoever_reads_the_scores(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """ReasonIR's hq positives are documents of BRIGHT."""
    rows = [{"query": ["find", "why"], "pos": [["", "d1"]], "neg": [["", "wrong"]]}]
    source = SourceConfig(
        name="hq",
        format="reasonir_hq",
        path=str(write_jsonl(tmp_path / "hq.jsonl", rows)),
        documents=str(write_jsonl(tmp_path / "bright.jsonl", [{"id": "d1", "content": "because"}])),
    )
    dataset = Dataset.open(prepare(make_config(source), num_workers=1))
    (info,) = dataset.manifest.sources
    assert any("not zero-shot" in warning for warning in info.warnings)
    assert "not zero-shot" in inspect_dataset(dataset.folder, plot=False)


def test_a_repeated_query_is_searched_for_once_and_dropped_each_time(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(6)
    known, other = words(rng, 14), words(rng, 14)
    write_jsonl(tmp_path / "queries.jsonl", [{"text": known}])
    rule = DecontaminateConfig(
        sets=(EvaluationSetConfig(name="bench", path=str(tmp_path / "queries.jsonl")),)
    )
    searched: list[str] = []
    find = ContaminationIndex.find

    def counting(self: ContaminationIndex, text: str, *, is_query: bool) -> Any:
        searched.extend([text] * is_query)
        return find(self, text, is_query=is_query)

    monkeypatch.setattr(ContaminationIndex, "find", counting)
    records = [
        {"query": query, "positives": [words(rng, 40)]} for query in (known, other, known, other)
    ]
    dataset = build(records, decontaminate=rule)
    assert dataset.num_examples == 2
    assert [text for _, _, text in dropped(dataset)] == [known, known]
    assert sorted(searched) == sorted([known, other])
