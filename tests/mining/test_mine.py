"""A mined folder holds the negatives of a plain search over all pairs, however it was made."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mining_support import MakeConfig, World, write_rows

from pipeline import mining
from pipeline.config import (
    BandConfig,
    CandidatesConfig,
    CorpusConfig,
    DataConfig,
    DecontaminateConfig,
    EvaluationSetConfig,
    MarginConfig,
    PrepareConfig,
    RetrieverConfig,
    SourceConfig,
    TeacherConfig,
    WindowConfig,
    dump_config,
)
from pipeline.data.loader import Loader
from pipeline.data.prepare import prepare
from pipeline.data.prepare.tokenise import minhash
from pipeline.data.shards import Dataset, inspect_dataset
from pipeline.errors import UserError, errors_end_the_process
from pipeline.mining import describe_mining, mine, plan_only, retrieve
from pipeline.mining.plan import Mining, plan_mining
from pipeline.model.load_export import load_export
from pipeline.planning import arrays
from pipeline.planning.calibration import choose_machine
from pipeline.workers import SrunWorkers
from tests.support import PATIENCE


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the picture, in which libraries note their versions."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".png"
    }


@dataclasses.dataclass
class Reference:
    """Texts and vectors of a dataset, read from its rows and by the export's own loader."""

    queries: list[str]
    positives: list[list[int]]
    texts: list[str]
    query_vectors: np.ndarray
    document_vectors: np.ndarray

    @classmethod
    def of(cls, world: World, dataset: Dataset) -> Reference:
        export = load_export(world.export)
        tokenizer = export.tokenizer
        ids = np.arange(len(dataset.documents))
        texts = [tokenizer.decode(row) for row in dataset.documents.views("tokens", ids)]
        number = {text: place for place, text in enumerate(texts)}
        order = [
            tokenizer.decode(row).rpartition("Query: ")[2]
            for row in dataset.examples.views("query", np.arange(dataset.num_examples))
        ]
        # The rows in the order of the shards: one group, so the order of the file.
        assert order == [row["query"] for row in world.rows]
        prefix = "Instruct: Find the thing\nQuery: "
        return cls(
            queries=order,
            positives=[[number[text] for text in row["positives"]] for row in world.rows],
            texts=texts,
            query_vectors=export.encode_texts(order, prefix).astype(np.float16),
            document_vectors=export.encode_texts(texts).astype(np.float16),
        )

    def allowed(self, world: World, row: int, threshold: float) -> list[int]:
        """Documents that may be negatives of a query, best first: a loop over all pairs."""
        own, concept = set(), set()
        for other, entry in enumerate(world.rows):
            if self.queries[other] == self.queries[row]:
                own |= set(self.positives[other])
            mine_ = world.rows[row]["concept"]
            if mine_ is not None and entry["concept"] == mine_:
                concept |= set(self.positives[other])
        signatures = self.signatures
        near = {
            number
            for number in range(len(self.texts))
            for positive in own
            if (signatures[number] == signatures[positive]).mean() >= threshold
        }
        scores = self.scores(row)
        order = sorted(range(len(self.texts)), key=lambda number: (-scores[number], number))
        return [number for number in order if number not in own | concept | near]

    @functools.cached_property
    def signatures(self) -> list[Any]:
        return [minhash(text) for text in self.texts]

    def scores(self, row: int) -> np.ndarray:
        query = self.query_vectors[row].astype(np.float64)
        return (self.document_vectors.astype(np.float64) * query).sum(axis=1)


def negatives_of(dataset: Dataset) -> list[list[int]]:
    ids = np.arange(dataset.num_examples)
    return [row.tolist() for row in dataset.examples.views("negatives", ids)]


@pytest.fixture
def reference(world: World) -> Reference:
    return Reference.of(world, Dataset.open(world.shards))


def test_negatives_are_those_of_all_pairs_in_float64(
    world: World, make_config: MakeConfig, reference: Reference
) -> None:
    config = make_config(
        window=WindowConfig(first=3, last=30), margin=MarginConfig(relative=0.99), negatives=4
    )
    mine(config, num_workers=1)

    dataset = Dataset.open(config.output, verify=True)
    expected = []
    for row, positives in enumerate(reference.positives):
        scores = reference.scores(row)
        window = reference.allowed(world, row, 0.9)[2:30]
        limit = 0.99 * min(scores[positives])
        expected.append([number for number in window if scores[number] <= limit][:4])
    assert negatives_of(dataset) == expected
    assert any(len(row) < 4 for row in expected) and any(len(row) == 4 for row in expected)


def test_documents_are_shared_and_train_reads_the_folder(
    world: World, make_config: MakeConfig
) -> None:
    config = make_config(candidates=12, choose="random")
    mine(config, num_workers=1)

    mined, source = Dataset.open(config.output), Dataset.open(world.shards)
    for info in source.manifest.document_shards:
        assert (config.output / info.file).stat().st_ino == (world.shards / info.file).stat().st_ino
    assert mined.manifest.has_candidates
    ids = np.arange(mined.num_examples)
    candidates = mined.examples.views("candidates", ids)
    for row, negatives in enumerate(negatives_of(mined)):
        assert len(negatives) == 5 and set(negatives) <= set(candidates[row].tolist())
    for name in ("positives", "query"):
        same = zip(mined.examples.views(name, ids), source.examples.views(name, ids), strict=True)
        assert all(np.array_equal(*pair) for pair in same)


@pytest.mark.parametrize("rows", [14, 50])
def test_any_block_size_gives_the_same_bytes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    settings: dict[str, Any] = {
        "choose": "random",
        "candidates": 9,
        "retrievers": (
            *make_config().retrievers,
            RetrieverConfig(name="words", path="bm25"),
        ),
    }
    config = make_config("whole", **settings)
    mine(config, num_workers=1)
    monkeypatch.setattr("pipeline.mining.plan.BLOCK_ROWS", rows)
    monkeypatch.setattr("pipeline.mining.plan.QUERY_ROWS", rows // 2)
    other = make_config("blocks", **settings, store=config.output.parent / f"store-{rows}")
    mine(other, num_workers=1)

    assert contents(config.output) == contents(other.output)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The ranks of a step, as threads: claims and barriers are files, as they are for processes."""
    monkeypatch.setattr("pipeline.mining.plan.BLOCK_ROWS", 16)
    monkeypatch.setattr("pipeline.mining.plan.QUERY_ROWS", 16)
    alone = make_config("alone")
    mine(alone, num_workers=1)
    config = make_config("together", store=alone.output.parent / "another")
    first = Mining(config)
    mining._start_or_continue(first, plan_mining(config), config.output)
    ranks = [SrunWorkers(rank, count, alone.output.parent / "step") for rank in range(count)]
    faults: list[BaseException] = []

    def work(rank: SrunWorkers) -> None:
        try:
            mining._run_steps(rank, Mining(config))
        except BaseException as error:
            faults.append(error)
            rank.fail()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mining._finish(first)

    assert not faults
    assert contents(alone.output) == contents(config.output)


_RANK = """
import os, sys
from pathlib import Path
from pipeline.config import MineConfig, load_config
from pipeline.mining import mine, plan
plan.BLOCK_ROWS = plan.QUERY_ROWS = 16
config = load_config(MineConfig, sys.argv[1])
mine(config)
rank = os.environ["OMPI_COMM_WORLD_RANK"]
Path(sys.argv[1]).with_name(f"rank-{rank}").touch()
"""


def test_two_ranks_of_mpi_write_the_bytes_of_one_process(
    make_config: MakeConfig, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With BM25, whose index one rank builds, and a teacher's vectors."""
    monkeypatch.setattr("pipeline.mining.plan.BLOCK_ROWS", 16)
    monkeypatch.setattr("pipeline.mining.plan.QUERY_ROWS", 16)
    changes = {
        "retrievers": (
            RetrieverConfig(name="model", path=str(world.export)),
            RetrieverConfig(name="words", path="bm25"),
        ),
        "teacher": TeacherConfig(kind="bi_encoder", path=str(world.export), vectors=True),
    }
    alone = make_config("alone", **changes)
    mine(alone, num_workers=1)
    config = make_config("together", store=tmp_path / "another", **changes)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "rank.py").write_text(_RANK)
    mpirun = Path(sys.executable).with_name("mpirun")
    options = ["-n", "2", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    done = subprocess.run(
        [mpirun, *options, sys.executable, tmp_path / "rank.py", tmp_path / "config.yaml"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(Path(mining.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    # Both were ranks of one job.
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-0", "rank-1"]
    assert contents(alone.output) == contents(config.output)


class CrashError(Exception):
    """Raised where a process would end."""


def test_a_mining_that_is_stopped_at_many_renames_gives_the_same_bytes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.mining.plan.BLOCK_ROWS", 32)
    monkeypatch.setattr("pipeline.mining.plan.QUERY_ROWS", 32)
    reference = make_config("reference")
    mine(reference, num_workers=1)
    config = make_config("stopped", store=reference.output.parent / "another")
    replace, left, crashes = Path.replace, 0, 0

    def crashing(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise CrashError
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crashing)
    while not config.output.exists():
        left, before = 4, crashes
        try:
            mine(config, num_workers=1)
        except CrashError:
            crashes += 1
        assert crashes < 60 and (crashes > before or config.output.exists())
    monkeypatch.undo()

    assert crashes > 5
    assert contents(reference.output) == contents(config.output)


def test_only_what_a_change_concerns_is_computed_again(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    mine(make_config("first"), num_workers=1)
    capsys.readouterr()
    mine(make_config("second", margin=MarginConfig(relative=0.9)), num_workers=1)

    steps = [line.split()[1] for line in capsys.readouterr().err.splitlines() if "parts" in line]
    assert steps == ["check:", "levels:", "pick:", "write:", "complete:"]


def test_a_mining_that_ends_right_after_its_last_rename_is_complete(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(retrievers=(RetrieverConfig(name="words", path="bm25"),))

    def crash(_: Mining) -> None:
        raise CrashError

    with monkeypatch.context() as patched:
        patched.setattr(mining.write, "remove_rest", crash)
        with pytest.raises(CrashError):
            mine(config, num_workers=1)
    before = contents(config.output)
    mine(config, num_workers=1)

    assert contents(config.output) == before
    assert not Mining(config).plan_path.exists() and not Mining(config).building.exists()


def test_a_complete_folder_is_kept_and_another_mining_refused(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    mine(config, num_workers=1)
    before = contents(config.output)
    mine(config, num_workers=1)

    assert "is complete" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds negatives mined with other settings \(negatives\)"):
        mine(dataclasses.replace(config, negatives=3), num_workers=1)
    assert contents(config.output) == before


def test_changed_weights_are_noticed(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    copy = shutil.copytree(world.export, tmp_path / "copy")
    config = make_config(retrievers=(RetrieverConfig(name="model", path=str(copy)),))
    mine(config, num_workers=1)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    with pytest.raises(UserError, match="another model 'model': its weights or settings changed"):
        mine(config, num_workers=1)


def test_further_corpora_are_added_behind_the_documents(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    """A document that is closer to a query than any other becomes its negative.

    Two of the documents are equal, and one is in the dataset already.
    """
    known = world.rows[0]["positives"][0]
    extra = [f"{row['query']} Nobody can say." for row in world.rows[:20]]
    lines = write_rows(tmp_path / "more.jsonl", [{"text": text} for text in [*extra, known]])
    corpora = (CorpusConfig(name="more", path=str(lines)),)
    config = make_config(corpora=corpora, retrievers=(RetrieverConfig(name="words", path="bm25"),))
    mine(config, num_workers=1)

    dataset, source = Dataset.open(config.output, verify=True), Dataset.open(world.shards)
    assert dataset.manifest.num_documents == source.manifest.num_documents + 19
    found = [
        sum(number >= source.manifest.num_documents for number in row)
        for row in negatives_of(dataset)
    ]
    assert all(count > 0 for count in found[:20])
    audit = json.loads((config.output / "audit.json").read_text())
    assert audit["corpora"] == {"more": {"documents": 21, "repeated": 2, "left_out": {}}}


@pytest.mark.parametrize("kind", ["lines", "mteb"])
def test_records_of_a_corpus_that_are_no_documents_are_counted(
    make_config: MakeConfig, tmp_path: Path, kind: str
) -> None:
    rows = [{"_id": f"{k}", "text": f"lake {k}", "lang": "en"} for k in range(5)]
    rows += [{"_id": "5", "text": " ", "lang": "en"}, {"_id": "6", "text": "\ud83d", "lang": "en"}]
    rows += [{"_id": "7", "text": "ein See", "lang": "de"}] * (kind == "lines")
    path = write_rows(tmp_path / "corpus.jsonl", rows)
    settings: dict[str, Any] = {"where": {"lang": "en"}, "path": str(path)}
    if kind == "mteb":
        settings = {"path": str(tmp_path)}
    words = (RetrieverConfig(name="words", path="bm25"),)
    wiki = CorpusConfig(name="wiki", format=kind, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"corpus\.jsonl:7: .*half a surrogate pair"):
        mine(make_config(corpora=(wiki,), retrievers=words), num_workers=1)
    wiki = dataclasses.replace(wiki, on_bad_row="drop")
    config = make_config(corpora=(wiki,), retrievers=words)
    mine(config, num_workers=1)

    found = json.loads((config.output / "audit.json").read_text())["corpora"]["wiki"]
    assert (found["documents"], found["repeated"]) == (5, 0)
    bad = next(reason for reason in found["left_out"] if f"{path}:7: " in reason)
    unwanted = {"left out by `where`": 1} if kind == "lines" else {}
    assert found["left_out"] == {"empty": 1, bad: 1, **unwanted}
    assert (
        f"not among them: 1 empty, {'1 left out' if unwanted else '1 cannot'}"
        in (config.output / "audit.md").read_text()
    )


def prepare_rows(world: World, folder: Path, rows: list[dict[str, Any]]) -> Path:
    source = SourceConfig(
        name="rows", format="columns", path=str(write_rows(folder / "r.jsonl", rows))
    )
    tokenizer = str(world.folder / "model")
    config = PrepareConfig(output_dir=folder / "shards", tokenizer=tokenizer, sources=(source,))
    return prepare(config, num_workers=1)


def test_documents_without_words_are_nothing_for_bm25(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    shards = prepare_rows(world, tmp_path, [{"query": "why", "positives": ["\U0001f98a", "a"]}])
    words = (RetrieverConfig(name="words", path="bm25"),)
    with pytest.raises(UserError, match=r"retrievers\.words: no document has a word"):
        mine(make_config(data=shards, retrievers=words), num_workers=1)


def test_bm25_finds_no_document_without_a_word_of_the_query(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Documents of score 0 would be the first ones of the shards, the same for every query."""
    rows = [
        {"query": "where is the fox", "positives": ["in the wood"]},
        {"query": "why", "positives": ["because a fox is red"]},
        {"query": "\u72d0\u72f8\u5728\u54ea\u91cc", "positives": ["\u5728\u6811\u6797\u91cc"]},
        {"query": "\U0001f98a", "positives": ["the end"]},
    ]
    words = (RetrieverConfig(name="words", path="bm25"),)
    shards = prepare_rows(world, tmp_path, rows)
    config = make_config(data=shards, retrievers=words, short="fill")
    mine(config, num_workers=1)

    tokenizer = load_export(world.export).tokenizer
    dataset = Dataset.open(config.output)
    found = [
        {tokenizer.decode(row) for row in dataset.documents.views("tokens", np.array(numbers))}
        for numbers in negatives_of(dataset)
    ]
    assert found == [{"because a fox is red", "the end"}, set(), set(), set()]
    audit = json.loads((config.output / "audit.json").read_text())
    assert audit["short"] == {"queries": 4, "without": 3, "negatives": 2}


def test_a_corpus_without_ids_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_rows(folder / "corpus.jsonl", [{"text": "a lake"}])
    corpora = (CorpusConfig(name="wiki", format="mteb", path=str(folder)),)

    with pytest.raises(UserError, match=r"corpus\.jsonl:1: no id.*corpora\.wiki"):
        mine(make_config(corpora=corpora), num_workers=1)


def test_texts_of_evaluation_sets_are_never_negatives(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    secret = [row["positives"][0] for row in world.rows[20:60]]
    held = write_rows(tmp_path / "test.jsonl", [{"text": text} for text in secret])
    rule = DecontaminateConfig(
        sets=(EvaluationSetConfig(name="held out", path=str(held), queries=False),)
    )
    config = make_config(decontaminate=rule)
    mine(config, num_workers=1)

    dataset = Dataset.open(config.output)
    reference = Reference.of(world, Dataset.open(world.shards))
    forbidden = {reference.texts.index(text) for text in secret}
    assert not forbidden & {number for row in negatives_of(dataset) for number in row}
    audit = json.loads((config.output / "audit.json").read_text())
    assert audit["outcomes"]["rows"]["model"]["in an evaluation set"] > 0


def test_the_audit_counts_every_found_document_once(make_config: MakeConfig, world: World) -> None:
    config = make_config(margin=MarginConfig(absolute=0.01))
    mine(config, num_workers=1)

    audit = json.loads((config.output / "audit.json").read_text())
    outcomes = collections.Counter(audit["outcomes"]["rows"]["model"])
    assert outcomes.total() == len(world.rows) * config.depth
    assert outcomes["near duplicate of a positive"] >= 6
    assert len(audit["samples"]) == 50
    page = (config.output / "audit.md").read_text()
    assert "near duplicate of a positive" in page
    assert "near duplicate of a positive" in inspect_dataset(config.output, plot=False)


def test_negatives_of_an_example_can_be_kept_before_the_mined_ones(
    world: World, make_config: MakeConfig
) -> None:
    config = make_config(keep_negatives=True)
    mine(config, num_workers=1)

    kept = negatives_of(Dataset.open(world.shards))
    for before, after in zip(kept, negatives_of(Dataset.open(config.output)), strict=True):
        assert after[: len(before)] == before
        assert len(set(after)) == len(after)


def test_a_bi_encoder_teaches_scores_and_stores_its_vectors(
    world: World, make_config: MakeConfig, reference: Reference
) -> None:
    teacher = TeacherConfig(path=str(world.export), kind="bi_encoder", vectors=True)
    config = make_config(teacher=teacher, candidates=8)
    mine(config, num_workers=1)

    dataset = Dataset.open(config.output, verify=True)
    ids = np.arange(dataset.num_examples)
    stored = dataset.teacher_vectors(queries=ids, documents=np.arange(len(dataset.documents)))
    assert np.abs(stored[0] - reference.query_vectors).max() < 1e-3
    assert np.abs(stored[1] - reference.document_vectors).max() < 1e-3
    negatives = negatives_of(dataset)
    for row, scores in enumerate(dataset.examples.views("scores", ids)):
        listed = [*reference.positives[row], *negatives[row]]
        assert np.allclose(scores, reference.scores(row)[listed], atol=1e-6)
    for row, (numbers, scores) in enumerate(
        zip(
            dataset.examples.views("candidates", ids),
            dataset.examples.views("candidate_scores", ids),
            strict=True,
        )
    ):
        assert np.allclose(scores, reference.scores(row)[numbers], atol=1e-6)


def test_the_teacher_removes_candidates_above_its_margin(
    world: World, make_config: MakeConfig, reference: Reference
) -> None:
    margin = MarginConfig(relative=0.999)
    teacher = TeacherConfig(path=str(world.export), kind="bi_encoder", margin=margin)
    config = make_config(teacher=teacher)
    mine(config, num_workers=1)

    removed = json.loads((config.output / "audit.json").read_text())["teacher"]["removed"]
    assert removed > 0
    for row, negatives in enumerate(negatives_of(Dataset.open(config.output))):
        scores = reference.scores(row)
        lowest = min(scores[reference.positives[row]])
        assert all(scores[number] <= lowest - 0.001 * abs(lowest) for number in negatives)


def test_a_missing_model_and_a_damaged_store_end_in_one_line(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    missing = (RetrieverConfig(name="gone", path=str(tmp_path / "gone")),)
    with pytest.raises(UserError, match=r"retrievers\.gone\.path: "):
        mine(make_config(retrievers=missing), num_workers=1)
    config = make_config()
    mine(config, num_workers=1)
    vectors = next((tmp_path / "store").glob("vectors-*/documents/*.npy"))
    content = bytearray(vectors.read_bytes())
    content[200] ^= 1
    vectors.write_bytes(content)
    retrieve._corpus.cache_clear()  # as in another process
    shutil.rmtree(next((tmp_path / "store").glob("found-*")))
    with pytest.raises(UserError, match="does not match its hash"):
        mine(make_config("again"), num_workers=1)


def test_a_shard_that_was_damaged_since_it_was_prepared_is_refused(
    world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(data=tmp_path / "shards")
    shutil.copytree(world.shards, config.data)
    shard = min(config.data.glob("examples*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=shard.name):
        mine(config, num_workers=1)
    assert not config.output.exists()


def test_a_training_batch_draws_from_the_mined_candidates_and_reads_the_vectors(
    world: World, make_config: MakeConfig
) -> None:
    bands = (
        BandConfig(name="hard", last=5, share=0.5),
        BandConfig(name="easy", last=25, share=0.5),
    )
    config = make_config(
        candidates=12,
        choose="bands",
        bands=bands,
        negatives=4,
        teacher=TeacherConfig(path=str(world.export), kind="bi_encoder", vectors=True),
    )
    mine(config, num_workers=1)
    dataset = Dataset.open(config.output)
    settings = DataConfig(
        path=config.output,
        global_batch_size=16,
        num_hard_negatives=3,
        candidates=CandidatesConfig(),
    )
    batch = Loader(dataset, settings, max_chunk_tokens=4000, teacher_vectors=True).batch(0)

    drawn = [len(row) for row in batch.negatives]
    assert max(drawn) == 3
    info = dataset.manifest.mining
    assert info is not None and info.bands == ("hard", "easy")
    counts = np.bincount(
        np.concatenate(dataset.examples.views("candidate_bands", np.arange(120))), minlength=2
    )
    assert (counts > 0).all()


def test_a_dry_run_counts_what_is_left_and_writes_nothing(
    make_config: MakeConfig, tmp_path: Path, world: World
) -> None:
    teacher = TeacherConfig(path=str(world.export), kind="bi_encoder")
    config = make_config(teacher=teacher)
    planned = describe_mining(config)
    assert not list(tmp_path.iterdir())

    mine(config, num_workers=1)
    manifest = Dataset.open(config.output).manifest
    documents, queries = manifest.document_lengths, manifest.query_lengths
    assert f"{queries.texts:,} queries of {queries.tokens:,} tokens" in planned
    assert f"{documents.texts:,} documents of {documents.tokens:,} tokens" in planned
    work = {line.split()[0]: line for line in planned.splitlines()[3:]}
    # Blocks of documents and queries; nothing of them exists.
    mining_ = plan_only(config)
    parts = len(mining_.document_blocks) + len(mining_.query_blocks)
    assert work["embed"].split()[1:3] == [f"{parts}", "0"]
    assert f"{queries.texts * documents.texts:,} scores of pairs" in work["search"]
    # `diffembed plan mine` counts the same.
    gpu = choose_machine("h100", None, ranks_per_host=1)
    first, search, *_, taught = arrays.plan_mining(config, gpu).work
    assert search.texts in work["search"]
    assert first.tokens == taught.tokens == documents.tokens + queries.tokens
    positives = sum(len(row["positives"]) for row in world.rows)
    assert f"at most {positives + 5 * queries.texts:,} pairs" in work["score"]
    assert describe_mining(config) == f"{config.output} is complete: nothing to do"
    # With another margin, vectors and search results are there.
    again = describe_mining(make_config("again", teacher=teacher, margin=MarginConfig(relative=1)))
    done = {line.split()[0]: line.split()[1:3] for line in again.splitlines()[3:]}
    assert done["embed"] == [f"{parts}"] * 2
    assert done["pick"][1] == "0" and done["write"][1] == "0"


@pytest.mark.parametrize("kilobytes", [1, 8, 20])
def test_a_full_disk_ends_in_one_line_and_loses_nothing(
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kilobytes: int,
) -> None:
    config = make_config()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The kernel refuses every byte beyond it, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
        with pytest.raises(SystemExit) as ended, errors_end_the_process():
            mine(config, num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"UserError: {tmp_path}") and "File too large" in lines[-1]
    assert lines[-2].endswith("the same command continues")
    assert not config.output.exists()

    mine(config, num_workers=1)
    whole = make_config("whole", store=tmp_path / "other")
    mine(whole, num_workers=1)
    assert contents(config.output) == contents(whole.output)


def test_a_window_behind_all_documents_is_refused(make_config: MakeConfig) -> None:
    config = make_config(window=WindowConfig(first=900, last=1000))

    with pytest.raises(UserError, match=r"window\.first: 900, .* the window is empty"):
        mine(config, num_workers=1)


def test_bm25_without_its_package_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("pipeline.mining.plan.version", missing)
    config = make_config(retrievers=(RetrieverConfig(name="words", path="bm25"),))

    with pytest.raises(UserError, match=r"retrievers\.words\.path: bm25 needs the package bm25s"):
        mine(config, num_workers=1)
