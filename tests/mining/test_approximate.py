"""An approximate index changes which documents are found, not their scores; its recall is said."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mining_support import MakeConfig, World

from pipeline.config import BM25, IndexConfig, MineConfig, RetrieverConfig
from pipeline.data.shards import Dataset
from pipeline.errors import UserError, errors_end_the_process
from pipeline.mining import approximate, describe_mining, mine, plan_only, retrieve
from pipeline.planning import arrays
from pipeline.planning.calibration import choose_machine

# Searches one of eight parts of the documents.
COARSE = {"factory": "IVF8,Flat", "parameters": "nprobe=1", "sample": 40}


def with_index(world: World, **index: Any) -> dict[str, Any]:
    retriever = RetrieverConfig(name="model", path=str(world.export), index=IndexConfig(**index))
    return {"retrievers": (retriever,)}


def found(config: MineConfig) -> list[dict[str, np.ndarray]]:
    mining = plan_only(config)
    return [retrieve.read_found(mining, 0, block) for block in range(len(mining.query_blocks))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.arrow")}


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [("Flat", ""), ("IVF4,Flat", "nprobe=4"), ("SQ8", ""), ("HNSW32", "efSearch=600")],
)
def test_an_index_that_misses_nothing_gives_the_exact_negatives(
    factory: str, parameters: str, make_config: MakeConfig, world: World
) -> None:
    exact, indexed = (
        make_config("exact"),
        make_config("indexed", **with_index(world, factory=factory, parameters=parameters)),
    )
    mine(exact, num_workers=1)
    mine(indexed, num_workers=1)

    assert files(indexed.output) == files(exact.output)
    # The vectors are shared, and every score is the exact one.
    assert len(list(exact.store_folder.glob("vectors-*"))) == 1
    for ours, reference in zip(found(indexed), found(exact), strict=True):
        assert all(np.array_equal(ours[name], reference[name]) for name in reference)


def test_the_recall_of_a_coarse_index_is_the_share_of_exact_documents_that_it_finds(
    make_config: MakeConfig, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, indexed = make_config("exact"), make_config("indexed", **with_index(world, **COARSE))
    mine(exact, num_workers=1)
    mine(indexed, num_workers=1)

    (ours,), (reference,) = found(indexed), found(exact)
    sample = np.unique(np.linspace(0, len(world.rows) - 1, 40).astype(int))
    pairs = list(zip(reference["documents"][sample], ours["documents"][sample], strict=True))
    share = np.mean([len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in pairs])
    recall = json.loads((indexed.output / "audit.json").read_text())["recall"]["model"]
    assert recall["queries"] == 40 and recall["depth"] == reference["documents"].shape[1]
    assert recall["share"] == pytest.approx(share) and 0.1 < share < 0.9
    assert share < recall["nearest"] < 1
    words = f"{share:.1%} of the exact best {recall['depth']:,}"
    assert f"the index of model finds {words}" in capsys.readouterr().err
    assert words in (indexed.output / "audit.md").read_text()
    # What it finds has its exact score, in the exact order; -1 stands where it finds nothing.
    for row in range(len(world.rows)):
        scores = dict(zip(reference["documents"][row], reference["scores"][row], strict=True))
        numbers = ours["documents"][row]
        held = [k for k, number in enumerate(numbers.tolist()) if number in scores]
        assert [ours["scores"][row, k] for k in held] == [scores[numbers[k]] for k in held]
        known = ours["scores"][row][numbers >= 0]
        assert (np.diff(known) <= 0).all() and np.isnan(ours["scores"][row][numbers < 0]).all()
    # Every negative is a document that the index found.
    dataset = Dataset.open(indexed.output)
    negatives = dataset.examples.views("negatives", np.arange(dataset.num_examples))
    for row, chosen in enumerate(negatives):
        assert set(chosen.tolist()) <= set(ours["documents"][row].tolist())


def test_other_search_parameters_keep_the_index_and_another_factory_keeps_the_vectors(
    make_config: MakeConfig, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    mine(make_config("one", **with_index(world, **COARSE)), num_workers=1)
    capsys.readouterr()

    mine(make_config("two", **with_index(world, **COARSE | {"parameters": "nprobe=8"})))
    said = capsys.readouterr().err
    assert "faiss:" not in said and "embed:" not in said and "search: 1 of 1 parts" in said
    assert "100.0% of the exact best" in said
    mine(make_config("three", **with_index(world, **COARSE | {"factory": "IVF2,Flat"})))
    said = capsys.readouterr().err
    assert "embed:" not in said and "faiss: 1 of 1 parts" in said
    mine(make_config("four", **with_index(world, **COARSE | {"sample": 7})))
    said = capsys.readouterr().err
    assert "search:" not in said and "recall: 1 of 1 parts" in said and "in 7 queries" in said


def test_any_number_of_workers_gives_the_same_bytes(make_config: MakeConfig, world: World) -> None:
    one = make_config("one", **with_index(world, **COARSE))
    three = make_config("three", **with_index(world, **COARSE), store=one.output.parent / "other")

    mine(one, num_workers=1)
    mine(three, num_workers=3)

    assert files(one.output) == files(three.output)
    assert json.loads((one.output / "audit.json").read_text()) == json.loads(
        (three.output / "audit.json").read_text()
    )


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ({"factory": "IVF8;Flat"}, r"retrievers\.model\.index\.factory: 'IVF8;Flat' "),
        ({"factory": ""}, r"retrievers\.model\.index\.factory: '' "),
        ({"factory": "Flat"}, r"retrievers\.model\.index\.parameters: 'nprobe=64' "),
        (
            {"factory": "IVF8,Flat", "parameters": "efSearch=8"},
            r"retrievers\.model\.index\.parameters: 'efSearch=8' .* allowed: a parameter of this",
        ),
    ],
)
def test_an_index_that_faiss_does_not_know_is_refused_before_anything_is_embedded(
    index: dict[str, Any], line: str, make_config: MakeConfig, world: World
) -> None:
    config = make_config(**with_index(world, **index))

    with pytest.raises(UserError, match=line):
        mine(config, num_workers=1)
    assert not config.store_folder.exists()


@pytest.mark.parametrize(
    ("factory", "reason"),
    [("IVF4096,Flat", "IVF4096,Flat for 132 vectors of width"), ("PQ7", "PQ7 for 132 vectors")],
)
def test_an_index_that_does_not_fit_the_vectors_ends_in_one_line_and_keeps_them(
    factory: str, reason: str, make_config: MakeConfig, world: World
) -> None:
    parameters = "nprobe=1" if factory.startswith("IVF") else ""
    wrong = make_config("wrong", **with_index(world, factory=factory, parameters=parameters))

    with pytest.raises(UserError, match=rf"retrievers\.model\.index: {reason}"):
        mine(wrong, num_workers=1)
    rows = {line.split()[0]: line.split()[1:3] for line in describe_mining(wrong).splitlines()[3:]}
    assert rows["embed"][0] == rows["embed"][1] and rows["faiss"] == ["1", "0"]


def test_bm25_takes_no_index() -> None:
    with pytest.raises(UserError, match=r"retrievers\.words: 'index' .* none with path: bm25"):
        RetrieverConfig(name="words", path=BM25, index=IndexConfig(factory="Flat"))


def test_faiss_that_is_not_installed_is_named(
    make_config: MakeConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)

    with pytest.raises(UserError, match=r"needs the package faiss .*diffembed\[faiss\]"):
        mine(make_config(**with_index(world, **COARSE)), num_workers=1)


def test_a_damaged_index_is_refused(make_config: MakeConfig, world: World) -> None:
    config = make_config(**with_index(world, **COARSE))
    mine(config, num_workers=1)
    (index,) = config.store_folder.glob("index-*/index.faiss")
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(content)
    approximate._open.cache_clear()  # as in another process
    shutil.rmtree(next(config.store_folder.glob("found-*")))

    with pytest.raises(UserError, match=r"index\.faiss: damaged .* fix: delete .*index-"):
        mine(make_config("again", **with_index(world, **COARSE)), num_workers=1)


def test_a_full_disk_ends_in_one_line_and_the_same_command_continues(
    make_config: MakeConfig, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    # Room for every block of vectors, not for the index of all of them.
    mine(make_config("exact"), num_workers=1)
    config = make_config(**with_index(world, factory="Flat", parameters=""))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(SystemExit) as ended, errors_end_the_process():
            mine(config, num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"UserError: {config.store_folder}") and "File too large" in last
    assert not list(config.store_folder.glob("index-*/*"))

    mine(config, num_workers=1)
    assert files(config.output) == files(config.output.parent / "exact")


def test_the_plan_counts_no_pairs_for_an_index(make_config: MakeConfig, world: World) -> None:
    config = make_config(**with_index(world, **COARSE))
    gpu = choose_machine("h100", None, ranks_per_host=1)

    _, search = arrays.plan_mining(config, gpu).work

    assert search.seconds is None and search.origin == "by faiss, on CPUs"
    assert search.texts == f"{len(world.rows):,} searches of an index"
