"""A contrastive step on the pretended device: its gradients, and where the host waits for it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from pipeline.config import DistillationConfig, LoraConfig, LossConfig, ModelConfig
from pipeline.loss import contrastive
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.training.contrastive_step import accumulate_gradients
from tests.benchmarks.bench_support import (
    PlainEngine,
    draw_texts,
    gradient_error,
    load,
    make_batch,
    take_gradients,
    tiny_qwen2,
)
from tests.fake_cuda.fake_cuda import FakeCuda, to_cuda
from tests.fake_cuda.tracing import MAX_SYNCS, all_pairs, config_of, full_batch, step_on_device
from tests.model.model_support import CASES

# Schedule, checkpointing of activations, and how it keeps what it needs.
SCHEDULES = {
    "plain": ("plain", False, {}),
    "cache": ("cache", False, {}),
    "cache, a graph kept": ("cache", False, {"keep_graphs": 1}),
    "cache, checkpointing": ("cache", True, {}),
    "sweep": ("sweep", False, {}),
    "sweep, boundaries on the host": ("sweep", False, {"boundaries": "host"}),
}
# Warm, because 16 bits of a tiny random model would be sharpened to noise by the default of 0.02.
LOSSES = {
    "in-batch": LossConfig(temperature=0.2),
    "symmetric, learned temperature": LossConfig(
        temperature=0.2, symmetric=True, learn_temperature=True
    ),
    "own, Matryoshka": LossConfig(temperature=0.2, negatives="own", matryoshka_dims=(8, 16)),
    "margin, distillation": LossConfig(
        temperature=0.2, false_negative_margin=0.1, distillation=DistillationConfig(weight=0.3)
    ),
}
CASES_OF_STEPS = all_pairs(
    {
        "schedule": tuple(SCHEDULES),
        "dtype": (torch.float32, torch.bfloat16),
        "loss": tuple(LOSSES),
        "tiles": (False, True),
        "family": ("qwen2", "gemma2", "bert", "modernbert"),
        "pooling": ("mean", "weighted_mean", "last_token", "first_token"),
        "lora": (False, True),
    }
)


@functools.cache
def folder_of(family: str, root: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModel.from_config(CASES[family][0])
    model.save_pretrained(root / family)  # as it starts: 16 bits of a sharper one are mostly noise
    return root / family


def encoder_of(case: dict[str, Any], root: Path, *, checkpointing: bool) -> Encoder:
    """Build the encoder of a case, in training mode, its adapters set to numbers that matter."""
    targets: Any = "all-linear"
    model = ModelConfig(
        path=str(folder_of(case["family"], root)),
        dtype="float32",
        pooling=case["pooling"],
        gradient_checkpointing=checkpointing,
        lora=LoraConfig(rank=2, dropout=0.2, targets=targets) if case["lora"] else None,
    )
    torch.manual_seed(0)
    encoder = build_encoder(model)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return encoder.train()


@pytest.mark.parametrize(
    "case", CASES_OF_STEPS, ids=lambda case: ", ".join(map(str, case.values()))
)
def test_gradients_equal_the_plain_ones_of_the_cpu_and_nothing_waits_within_a_pass(
    case: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Dropout included: the device's generator draws the masks of the plain schedule twice."""
    root = tmp_path_factory.getbasetemp() / "fake-cuda"
    root.mkdir(exist_ok=True)
    schedule, checkpointing, kept = SCHEDULES[case["schedule"]]
    if case["tiles"]:
        monkeypatch.setattr(
            contrastive, "DEFAULT_SCORE_BYTES", dict.fromkeys(("cpu", "cuda"), 4 * 20)
        )
    loss = LOSSES[case["loss"]]
    exact = case["dtype"] == torch.float32
    if not exact:
        # A score near the margin is masked or not by its rounding, which differs between CPUs.
        loss = dataclasses.replace(loss, false_negative_margin=None)
    batch = full_batch()
    reference = encoder_of(case, root, checkpointing=False)
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(case["dtype"])
    output = accumulate_gradients(
        PlainEngine(reference),
        batch,
        config_of("plain", loss=loss),
        device=torch.device("cpu"),
        temperature=loss.temperature if loss.learn_temperature else None,
    )
    wanted = {name: gradient.float() for name, gradient in take_gradients(reference).items()}

    request.getfixturevalue("on_fake_cuda")
    encoder = to_cuda(encoder_of(case, root, checkpointing=checkpointing), case["dtype"])
    ours, found, record = step_on_device(encoder, batch, config_of(schedule, loss=loss, **kept))

    if exact:
        assert gradient_error(ours, wanted) <= 1e-4
    else:  # rounding of a tiny random model turns its gradient, but does not reverse it
        flat = [torch.cat([g[name].flatten() for name in wanted]) for g in (ours, wanted)]
        assert torch.cosine_similarity(*flat, dim=0) >= 0.8
    assert float(found.loss) == pytest.approx(float(output.loss), rel=1e-5 if exact else 0.15)
    if not case["tiles"]:
        more = len(loss.matryoshka_dims) + loss.symmetric  # tiles that are searched
        assert record.num_syncs <= MAX_SYNCS[schedule] + more, dict(record.syncs)


@pytest.mark.parametrize("schedule", MAX_SYNCS)
def test_more_chunks_make_the_host_wait_no_more_often(
    schedule: str, qwen2: Path, on_fake_cuda: None
) -> None:
    encoder = to_cuda(load(qwen2), torch.bfloat16)
    waits = [
        step_on_device(encoder, full_batch(max_tokens=tokens), config_of(schedule))[2].num_syncs
        for tokens in (200, 40)
    ]

    assert waits[0] == waits[1] <= MAX_SYNCS[schedule]


@pytest.mark.parametrize("schedule", ["cache", "sweep"])
def test_a_wait_in_a_layer_fails_the_trace_and_is_named(
    schedule: str, qwen2: Path, monkeypatch: pytest.MonkeyPatch, on_fake_cuda: None
) -> None:
    run_layer = Encoder.run_layer

    def impatient(self: Encoder, index: int, hidden: Any, context: Any) -> Any:
        out = run_layer(self, index, hidden, context)
        out.sum().item()
        return out

    monkeypatch.setattr(Encoder, "run_layer", impatient)
    encoder = to_cuda(load(qwen2), torch.bfloat16)

    with pytest.raises(AssertionError, match=r"forward \(run_layer\), .*: _local_scalar_dense"):
        step_on_device(encoder, full_batch(), config_of(schedule))


def test_a_number_of_the_host_moved_to_the_device_in_a_layer_fails_the_trace(
    qwen2: Path, monkeypatch: pytest.MonkeyPatch, on_fake_cuda: None
) -> None:
    finish = Encoder.finish

    def scaled(self: Encoder, hidden: Any, context: Any) -> Any:
        return finish(self, hidden, context) * torch.tensor([2.0], device=hidden.device)

    monkeypatch.setattr(Encoder, "finish", scaled)
    encoder = to_cuda(load(qwen2), torch.bfloat16)

    with pytest.raises(AssertionError, match=r"forward \(finish\), .*: tensor of host numbers"):
        step_on_device(encoder, full_batch(), config_of("cache"))


# Kernel launches of one layer of one chunk in bf16 with the variable-length kernel: of a forward
# without graph, of a forward with graph, and of a backward.
MAX_LAUNCHES = {
    "full": {"forward": 38, "with graph": 38, "backward": 80},
    "LoRA": {"forward": 59, "with graph": 59, "backward": 122},  # with dropout
}


def launches(encoder: Any, batch: Any) -> dict[str, int]:
    """Count the launches of one chunk's passes."""
    chunk = batch.chunks[0]
    counts = {}
    with FakeCuda() as record:
        ids, lengths = torch.from_numpy(chunk.input_ids).to("cuda"), torch.from_numpy(chunk.lengths)

        def since(before: int) -> int:
            return record.num_launches - before

        with torch.no_grad():
            before = record.num_launches
            encoder(ids, lengths)
            counts["forward"] = since(before)
        before = record.num_launches
        out = encoder(ids, lengths)
        counts["with graph"] = since(before)
        before = record.num_launches
        out.sum().backward()
        counts["backward"] = since(before)
    assert record.launches["_varlen_attn"]
    return counts


@pytest.mark.parametrize("adapter", MAX_LAUNCHES)
def test_a_layer_launches_no_more_kernels_than_written_down(adapter: str, tmp_path: Path) -> None:
    batch = make_batch(draw_texts(np.array([8, 9, 10, 11]), 300), 2, max_tokens=100)
    counts = []
    for num_layers in (1, 2):
        folder = tiny_qwen2(
            tmp_path / str(num_layers), hidden_size=64, num_layers=num_layers, vocab_size=300
        )
        model = ModelConfig(
            path=str(folder), dtype="float32", lora=LoraConfig() if adapter == "LoRA" else None
        )
        encoder = to_cuda(build_encoder(model).train(), torch.bfloat16)
        counts.append(launches(encoder, batch))

    layer = {name: counts[1][name] - counts[0][name] for name in counts[0]}
    assert all(layer[name] <= most for name, most in MAX_LAUNCHES[adapter].items()), layer


def test_several_widths_and_directions_are_read_once(qwen2: Path, on_fake_cuda: None) -> None:
    encoder = to_cuda(load(qwen2), torch.float32)
    plain = LossConfig(temperature=0.2)
    symmetric = dataclasses.replace(plain, symmetric=True, learn_temperature=True)
    counts = [
        step_on_device(copy.deepcopy(encoder), full_batch(), config_of("cache", loss=loss))[2]
        for loss in (plain, symmetric)
    ]

    # A tile is searched for significant scores once in each direction.
    assert counts[1].num_syncs <= counts[0].num_syncs + 1, dict(counts[1].syncs)
