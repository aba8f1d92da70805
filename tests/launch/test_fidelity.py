"""Each known fault of the published code, and the test that fails where it comes back.

PROOFS lists what tests elsewhere prove; the rest is here.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from published_data import Writer, e5, local_path, prepare_recipe, word_tokenizer, write_jsonl

from pipeline.config import EvaluateConfig, PrepareConfig, SourceConfig, TrainConfig, load_config
from pipeline.data.loader import Loader
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import make_loader
from pipeline.evaluation.tasks import expand, lengths_of
from pipeline.planning.described_data import Lengths, Shape, write_shards

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch" / "recipes"

# Fault -> the tests that fail with it.
PROOFS = {
    "1 gradients are not synchronised between ranks": (
        "tests/training/test_gradients.py::test_cached_sharded_gradients_equal_plain_gradients",
        "tests/loss/test_contrastive.py::test_distributed_loss_equals_naive_loss",
    ),
    "2 padding is attended to": (
        "tests/model/test_encoder.py::test_a_vector_does_not_depend_on_its_batch_mates",
        "tests/model/test_architectures.py::test_packed_rows_equal_transformers_padded_batch",
        "tests/model/test_backbones.py::test_padding_that_leaks_into_vectors_is_refused",
    ),
    "3 a global batch mixes the tasks of several ranks": (
        "tests/launch/test_fidelity.py::test_a_global_batch_has_one_task_on_all_ranks_together",
    ),
    "4 texts are put into another template at evaluation than in training": (
        "tests/data/test_template.py::test_an_export_tokenises_texts_as_the_shards_hold_them",
        "tests/data/test_clean.py::test_prepared_strings_are_those_that_evaluation_will_format",
    ),
    "5 documents are cut at another length at evaluation than in training": (
        "tests/launch/test_fidelity.py::test_documents_are_cut_in_training_where_evaluation_cuts",
    ),
    "6 a split of a symmetric set loses its documents' instruction": (
        "tests/data/test_sources.py::"
        "test_an_e5_folder_is_one_source_per_set_with_its_own_instruction",
    ),
    "7 a data set that was asked for is never trained on": (
        "tests/launch/test_fidelity.py::test_every_source_of_a_recipe_reaches_the_batches",
        "tests/launch/test_fidelity.py::test_a_source_of_which_nothing_is_left_is_named",
    ),
    "8 recipes and documents name files that do not exist": (
        "tests/launch/test_recipes.py::"
        "test_every_run_has_a_folder_of_its_own_and_shards_that_a_recipe_makes",
        "tests/launch/test_recipes.py::test_the_readme_lists_every_recipe_as_it_is",
        "tests/test_house.py::test_files_named_in_documents_exist",
    ),
    "9 GPU numbers and home folders stand in the code": (
        "tests/launch/test_fidelity.py::test_no_file_names_a_gpu_or_somebodys_home",
    ),
    "10 several GPUs embed by copying the model for every batch": (
        "tests/evaluation/test_encode.py::"
        "test_vectors_are_those_of_the_export_for_any_number_of_processes",
        "tests/evaluation/test_models.py::"
        "test_tasks_and_lengths_of_one_model_share_one_loaded_export",
    ),
    "11 a task is scored with the excluded documents of another": (
        "tests/evaluation/test_scoring.py::test_excluded_documents_are_never_found",
        "tests/evaluation/test_scoring.py::"
        "test_the_other_tasks_of_the_benchmarks_score_what_mteb_scores",
    ),
    "12 a run cannot be resumed, and memory bounds the contrastive batch": (
        "tests/training/test_journey.py::"
        "test_a_stopped_and_resumed_run_is_bit_equal_to_an_uninterrupted_one",
        "tests/training/test_gradients.py::test_cached_sharded_gradients_equal_plain_gradients",
        "tests/launch/test_recipes.py::test_every_recipe_is_planned_at_its_real_size",
    ),
    "13 an unused lm_head is kept, and a causal Dream needs a config made by hand": (
        "tests/launch/test_recipes.py::test_every_recipe_is_planned_at_its_real_size",
        "tests/model/test_encoder.py::"
        "test_a_later_token_moves_an_earlier_state_only_without_causal_mask",
    ),
    "14 documents of BRIGHT are trained on": (
        "tests/data/test_clean.py::"
        "test_a_source_made_of_evaluation_documents_is_marked_for_whoever_reads_the_scores",
        "tests/launch/test_fidelity.py::test_decontamination_leaves_nothing_of_bright_in_reasonir",
    ),
}


def test_every_known_fault_has_a_test() -> None:
    assert [int(fault.split()[0]) for fault in PROOFS] == list(range(1, 15))
    for place in itertools.chain.from_iterable(PROOFS.values()):
        file, name = place.split("::")
        tree = ast.parse((ROOT / file).read_text())
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in found, place


@pytest.mark.parametrize("task", ["long", "theorem", "reason"])
def test_a_global_batch_has_one_task_on_all_ranks_together(task: str, tmp_path: Path) -> None:
    """Not one task on each of them: 16 queries are contrasted with each other."""
    groups = tuple((f"set {k % 2}", f"task {k}", 40 + 8 * k) for k in range(6))
    lengths = Lengths(mean=9, deviation=3, limit=20)
    shape = Shape(groups=groups, query=lengths, document=lengths, num_negatives=1)
    dataset = Dataset.open(write_shards(tmp_path / "shards", shape))
    config = load_config(TrainConfig, RECIPES / "published" / task / "dream.yaml")
    ranks = [make_loader(dataset, config, rank=rank, world_size=4) for rank in range(4)]
    drawn = set()
    for step in range(40):
        batches = [loader.batch(step) for loader in ranks]
        examples = batches[0].example_ids
        assert all(np.array_equal(batch.example_ids, examples) for batch in batches)
        # Every rank embeds some of the batch's texts, and no text is embedded twice.
        texts = [{t for chunk in batch.chunks for t in chunk.texts if t >= 0} for batch in batches]
        assert all(texts) and sum(map(len, texts)) == 16 + batches[0].num_documents
        tasks = {task_of(dataset, example, config) for example in examples}
        assert len(examples) == 16 and len(tasks) == 1
        drawn |= tasks
    assert len(drawn) == (2 if task == "long" else 6)


def task_of(dataset: Dataset, example: int, config: TrainConfig) -> str:
    groups = dataset.manifest.groups
    group = next(g for g in groups if g.start <= example < g.start + g.count)
    return group.source if config.data.homogeneous == "source" else group.instruction


@pytest.mark.parametrize("task", ["instruction", "long", "theorem"])
def test_documents_are_cut_in_training_where_evaluation_cuts(task: str, tmp_path: Path) -> None:
    prepared = load_config(PrepareConfig, RECIPES / "data" / f"{task}.yaml")
    evaluated = load_config(EvaluateConfig, RECIPES / "evaluate" / f"{task}.yaml")
    for name in expand(evaluated.tasks):
        assert prepared.max_document_length in lengths_of(evaluated, name)
    long = "a " * 5000
    row = {"query": long, "positives": [long], "negatives": [long + "b"]}
    source = SourceConfig(
        name="rows", format="columns", path=str(write_jsonl(tmp_path / "rows.jsonl", [row]))
    )
    local = dataclasses.replace(
        prepared, sources=(source,), tokenizer=word_tokenizer(tmp_path / "tokenizer"),
        decontaminate=None, output_dir=tmp_path / "shards",
    )  # fmt: skip
    dataset = Dataset.open(prepare(local, num_workers=1))
    found = dataset.documents.lengths("tokens", np.arange(len(dataset.documents)))
    assert set(found.tolist()) == {prepared.max_document_length}


def test_every_source_of_a_recipe_reaches_the_batches(tmp_path: Path) -> None:
    raw, tokenizer = tmp_path / "raw", word_tokenizer(tmp_path / "tokenizer")
    for name in ("nq", "quora_duplicates", "allnli_split2"):
        write_jsonl(raw / "e5" / f"{name}.jsonl", e5(Writer(1), 24))
    shards = prepare_recipe(
        RECIPES / "data" / "long.yaml", raw=raw, tokenizer=tokenizer, output_dir=tmp_path / "shards"
    )
    dataset = Dataset.open(shards)
    config = load_config(TrainConfig, RECIPES / "published" / "long" / "dream.yaml")
    loader: Loader = make_loader(dataset, config, rank=0, world_size=1)
    drawn = {task_of(dataset, loader.batch(step).example_ids[0], config) for step in range(20)}
    assert drawn == {"e5.nq", "e5.quora_duplicates", "e5.allnli_split2"}


def test_a_source_of_which_nothing_is_left_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"kept": [{"query": "a", "positives": ["b"]}], "lost": [{"query": "", "positives": []}]}
    sources = tuple(
        SourceConfig(
            name=name, format="columns", path=str(write_jsonl(tmp_path / f"{name}.jsonl", records))
        )
        for name, records in rows.items()
    )
    config = PrepareConfig(
        output_dir=tmp_path / "shards",
        tokenizer=word_tokenizer(tmp_path / "tokenizer"),
        sources=sources,
    )
    manifest = Dataset.open(prepare(config, num_workers=1)).manifest
    assert [(s.name, s.examples, bool(s.warnings)) for s in manifest.sources] == [
        ("kept", 1, False),
        ("lost", 0, True),
    ]
    assert "warning: lost: no example of it is left" in capsys.readouterr().err


def test_no_file_names_a_gpu_or_somebodys_home() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    # Split, so that this file is not found itself.
    words = ["/home/\\w", "/Users/\\w", "/root/\\w", "cuda:\\d", "VISIBLE_DEVICES\\W{1,4}\\d"]
    found = [
        f"{name}: {match.group()}"
        for name in listing.splitlines()
        if (ROOT / name).suffix not in (".png", ".arrow")
        for match in re.finditer("|".join(words), (ROOT / name).read_text())
    ]
    assert found == []


def test_decontamination_leaves_nothing_of_bright_in_reasonir(tmp_path: Path) -> None:
    """hq's positives are documents of BRIGHT; the clean recipe's rule drops every one of them."""
    raw, tokenizer = tmp_path / "raw", word_tokenizer(tmp_path / "tokenizer")
    document = "the document of an evaluation in which every word is another one for thirteen grams"
    write_jsonl(raw / "BRIGHT/documents/biology.jsonl", [{"id": "d", "content": document}])
    write_jsonl(raw / "BRIGHT/examples/biology.jsonl", [{"query": "which words are other ones"}])
    row = {"query": ["Find", "a question"], "neg": [["", "no"]]}
    write_jsonl(raw / "reasonir-data-hq.jsonl", [{**row, "pos": [["", "d"]]}])
    write_jsonl(raw / "reasonir-data-vl.jsonl", [{**row, "pos": [["", "fine"]]}])
    as_published = load_config(PrepareConfig, RECIPES / "data" / "reason.yaml")
    clean = load_config(PrepareConfig, RECIPES / "data" / "reason-large-batch.yaml")
    assert not {source.name for source in clean.sources} & {"hq"}
    hq, vl = (
        dataclasses.replace(
            source,
            path=local_path(source.path, raw),
            documents=source.documents and local_path(source.documents, raw),
        )
        for source in as_published.sources[:2]
    )
    rule = clean.decontaminate
    assert rule is not None
    sets = tuple(dataclasses.replace(s, path=local_path(s.path, raw)) for s in rule.sets)
    kept = {}
    for name, decontaminate in (
        ("published", None),
        ("clean", dataclasses.replace(rule, sets=sets)),
    ):
        config = dataclasses.replace(
            as_published, sources=(hq, vl), tokenizer=tokenizer, output_dir=tmp_path / name,
            decontaminate=decontaminate,
        )  # fmt: skip
        manifest = Dataset.open(prepare(config, num_workers=1)).manifest
        kept[name] = {source.name: source.examples for source in manifest.sources}
    assert kept == {"published": {"hq": 1, "vl": 1}, "clean": {"hq": 0, "vl": 1}}
