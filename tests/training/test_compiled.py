"""Compiled layers: the same gradients, few graphs, and files that do not know of it.

Most tests only find graphs (`eager`): to make code of them takes a CPU minutes. Gradients on
several ranks are a part of test_gradients.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AttentionInterface

from pipeline.config import LoraConfig, ModelConfig, TrainConfig, load_config
from pipeline.errors import UserError
from pipeline.model import encoder as encoder_module
from pipeline.model.attention import PACKED, packed_attention
from pipeline.model.encoder import (
    Encoder,
    build_encoder,
    compile_layers,
    num_graphs,
    require_compiler,
)
from pipeline.training.contrastive_step import accumulate_gradients
from tests.benchmarks.bench_support import (
    Gradients,
    PlainEngine,
    draw_texts,
    gradient_error,
    make_batch,
    step_config,
    take_gradients,
)
from tests.training.tiny_recipe import make_recipe
from tests.training.trainer_command import run_trainer

MAX_GRAPHS = 16


@pytest.fixture(autouse=True)
def nothing_stays_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    AttentionInterface.register(PACKED, packed_attention)


def encoder_of(path: Path, *, lora: bool = False) -> Encoder:
    torch.manual_seed(0)
    adapter = LoraConfig(rank=2, dropout=0.2, targets=("down_proj",)) if lora else None
    encoder = build_encoder(ModelConfig(path=str(path), dtype="float32", lora=adapter))
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder.train()


def gradients_of(encoder: Encoder) -> Gradients:
    batch = make_batch(draw_texts(np.array([30, 20, 9, 40]), 500), 2, max_tokens=100)
    config = step_config("plain")
    accumulate_gradients(PlainEngine(encoder), batch, config, device=torch.device("cpu"))
    return take_gradients(encoder)


def has_compiler() -> str | None:
    try:
        require_compiler(on_gpu=False)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.skipif(has_compiler() is not None, reason=str(has_compiler()))
def test_generated_code_computes_the_gradients_of_layers_that_are_not_compiled(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Scalar code, because vector instructions would first be tried out, and compile more slowly.
    monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 0)
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)
    wanted = gradients_of(encoder_of(model_path, lora=True))
    encoder = encoder_of(model_path, lora=True)
    compile_layers(encoder)

    found = gradients_of(encoder)

    assert gradient_error(found, wanted) <= 1e-5
    assert list(tmp_path.rglob("*.cpp")), "code was generated"


def test_fifty_lengths_share_a_few_graphs(model_path: Path) -> None:
    encoder = encoder_of(model_path)
    compile_layers(encoder, backend="eager")
    before, counts = num_graphs(), []
    for length in range(1, 51):
        with torch.no_grad():
            encoder(torch.arange(length), torch.tensor([length]))
        ids, lengths = torch.arange(2 * length), torch.tensor([length, length])
        encoder(ids, lengths).sum().backward()
        counts.append(num_graphs() - before)

    assert 0 < counts[-1] <= MAX_GRAPHS
    assert counts[2] == counts[-1], "later lengths need no graph of their own"


def test_the_layers_of_a_frozen_model_share_their_graphs(model_path: Path) -> None:
    """A first layer whose input needs no gradient would have graphs of its own."""
    counts = []
    for lora in (False, True):
        encoder = encoder_of(model_path, lora=lora)
        compile_layers(encoder, backend="eager")
        before = num_graphs()
        encoder(torch.arange(7), torch.tensor([7])).sum().backward()
        counts.append(num_graphs() - before)
        torch._dynamo.reset()
    assert counts[0] == counts[1] > 0


# The trainer, without generated code.
WORKER = """
import functools, sys
from pipeline.training import trainer
trainer.compile_layers = functools.partial(trainer.compile_layers, backend="eager")
from pipeline.train import main
main()
"""


def test_a_compiled_run_resumes_without_compiling_and_saves_the_same_names(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [recipe, "--deepspeed", "ds_configs/zero3.json", "optimizer.decay_steps=6"]

    done = run_trainer(*common, f"output_dir={whole}")
    assert done.returncode == 0, done.stderr
    first = run_trainer(
        *common, f"output_dir={parts}", "num_steps=3", "compile=true", script=worker
    )
    assert first.returncode == 0, first.stderr
    assert "compile: 2 layers of Qwen2DecoderLayer" in first.stdout
    second = run_trainer(*common, f"output_dir={parts}")
    assert second.returncode == 0, second.stderr

    wanted, found = (read_metrics(folder) for folder in (whole, parts))
    losses = [[line["loss"] for line in lines] for lines in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [0 < line.get("compiled_graphs", 0) <= MAX_GRAPHS for line in found] == [
        *([True] * 3),
        *([False] * 3),
    ]
    names = [saved_names(folder / "checkpoints" / "step-000006") for folder in (parts, whole)]
    assert names[0] == names[1] != []


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved_names(checkpoint: Path) -> list[str]:
    """Return the names of all tensors of a checkpoint."""
    names = []
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return sorted(names)


@pytest.mark.parametrize(
    ("on_gpu", "lacks"), [(False, "a C++ compiler"), (True, "the package triton")]
)
def test_a_machine_without_a_compiler_is_refused(
    on_gpu: bool, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(encoder_module, "find_spec", lambda _: None)
    with pytest.raises(UserError) as refused:
        require_compiler(on_gpu=on_gpu)
    assert f"lacks {lacks}" in str(refused.value)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"deterministic": True}, "false with deterministic"),
        (
            {"model": {"trust_remote_code": True, "revision": "abc"}},
            "false with model.trust_remote_code",
        ),
    ],
)
def test_settings_that_compiled_layers_cannot_keep_are_refused(
    others: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = {"path": "some/model", "pooling": "mean", **others.pop("model", {})}
    tree = {"output_dir": "run", "num_steps": 1, "model": model, "data": {"path": "shards"}}
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps({**tree, "compile": True, **others}))

    with pytest.raises(UserError, match="compile: True") as refused:
        load_config(TrainConfig, path)
    assert reason in str(refused.value)
