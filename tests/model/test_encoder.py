"""An encoder's vectors, pooling, adapters and dropout; its forward never waits for a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import models as st_models
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.config import POOLINGS, LoraConfig, ModelConfig, Pooling
from pipeline.errors import UserError
from pipeline.model.attention import PackedRows
from pipeline.model.encoder import Encoder, build_encoder, pool

LENGTHS = torch.tensor([6, 1, 11, 4])


def tokens(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 398, (int(LENGTHS.sum()),), generator=generator)


def make(starter: Path, **changes: Any) -> Encoder:
    """An encoder in training mode whose weights are large enough that attention matters."""
    encoder = build_encoder(ModelConfig(path=str(starter), dtype="float32", **changes)).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return encoder


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True}, {"lora": LoraConfig(rank=4, dropout=0.0)}],
    ids=["plain", "checkpointed", "lora"],
)
def test_a_later_token_moves_an_earlier_state_only_without_causal_mask(
    starter: Path, changes: dict[str, Any]
) -> None:
    for attention, moves in (("bidirectional", True), ("causal", False)):
        encoder = make(starter, attention=attention, pooling="first_token", **changes)
        ids = tokens()
        other = ids.clone()
        other[5] += 1  # the last token of row 0
        difference = (encoder(ids, LENGTHS) - encoder(other, LENGTHS)).abs().amax(dim=1)
        assert (difference[0] > 1e-3) == moves
        assert difference[1:].max() == 0  # other rows never see it


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token", "first_token"])
def test_a_vector_does_not_depend_on_its_batch_mates(starter: Path, pooling: Any) -> None:
    encoder = make(starter, pooling=pooling)
    rows = tokens().split(LENGTHS.tolist())
    together = encoder(tokens(), LENGTHS)
    alone = torch.cat([encoder(row, torch.tensor([len(row)])) for row in rows])
    reversed_order = encoder(torch.cat(rows[::-1]), LENGTHS.flip(0)).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together, reversed_order, atol=1e-6, rtol=0)


def test_dream_weights_compute_what_qwen2_computes(starter: Path) -> None:
    encoder = build_encoder(ModelConfig(path=str(starter), dtype="float32", normalize=False))
    config = Qwen2Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e6,
        is_causal=False,
    )
    reference = Qwen2ForCausalLM(config).eval()
    reference.load_state_dict(load_file(starter / "model.safetensors"), strict=True)
    ids = tokens()[:11]
    wanted = reference.model(ids[None]).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder(ids, torch.tensor([11])), wanted, atol=1e-6, rtol=0)


def test_checkpointing_changes_memory_but_no_gradient(starter: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = make(starter, gradient_checkpointing=checkpointing, attention_dropout=0.2)
        torch.manual_seed(1)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            vectors = encoder(tokens(), LENGTHS)
        vectors[:, 0].sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
        size = sum(saved)
        assert checkpointing == (size < 10_000), size
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=0, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{"attention_dropout": 0.3}, {"lora": LoraConfig(rank=4, dropout=0.3)}],
    ids=["attention", "lora"],
)
def test_dropout_is_live_in_training_and_replays_from_the_seed(
    starter: Path, changes: dict[str, Any]
) -> None:
    encoder = make(starter, **changes)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return encoder(tokens(), LENGTHS)

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
    encoder.eval()
    assert torch.equal(run(1), run(2))


def test_tokens_of_an_instruction_are_pooled_where_the_config_says_so(starter: Path) -> None:
    instruction = torch.tensor([3, 0, 5, 1])
    for pooled in (True, False):
        encoder = make(starter, pool_instruction=pooled)
        moved = (encoder(tokens(), LENGTHS, instruction) - encoder(tokens(), LENGTHS)).abs()
        assert (moved.amax(dim=1) > 1e-3).tolist() == [not pooled and n > 0 for n in instruction]


def test_layer_by_layer_equals_forward(starter: Path) -> None:
    encoder = make(starter)
    hidden, context = encoder.embed(tokens(), LENGTHS)
    assert len(encoder.layers) == 2
    for index in range(2):
        hidden = encoder.run_layer(index, hidden, context)
    assert torch.equal(encoder.finish(hidden, context), encoder(tokens(), LENGTHS))


def test_vectors_are_fp32_unit_rows_also_in_bf16(starter: Path) -> None:
    config = ModelConfig(path=str(starter), dtype="bfloat16")
    vectors = build_encoder(config)(tokens(), LENGTHS)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)
    exact = build_encoder(dataclasses.replace(config, dtype="float32"))(tokens(), LENGTHS)
    assert ((vectors * exact).sum(1) > 0.999).all()


def test_only_adapters_train_with_lora(starter: Path) -> None:
    encoder = build_encoder(ModelConfig(path=str(starter), lora=LoraConfig(targets=("q_proj",))))
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".q_proj.lora_" in name for name in trained)
    with pytest.raises(UserError, match=r"qq_proj.*allowed: all-linear, or some of down_proj"):
        build_encoder(
            ModelConfig(path=str(starter), lora=LoraConfig(targets=("q_proj", "qq_proj")))
        )


def test_a_model_on_the_meta_device_has_the_names_and_shapes_of_the_real_one(starter: Path) -> None:
    config = ModelConfig(path=str(starter), dtype="float32", lora=LoraConfig())
    meta, real = build_encoder(config, meta=True), build_encoder(config)
    assert all(p.is_meta for p in meta.parameters())
    assert [(n, p.shape, p.requires_grad) for n, p in meta.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in real.named_parameters()
    ]


@pytest.mark.parametrize("lengths", [[6, 1, 11], [6, 1, 11, 5], [6, 0, 11, 5], [23, -1]])
def test_lengths_that_do_not_tile_the_tokens_are_refused(starter: Path, lengths: list[int]) -> None:
    encoder = build_encoder(ModelConfig(path=str(starter), dtype="float32"))
    with pytest.raises(UserError, match="22 packed tokens"):
        encoder(tokens(), torch.tensor(lengths))


ROW_LENGTHS = [3, 1, 5]


def test_every_pooling_equals_a_loop_over_rows() -> None:
    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    rows = PackedRows.of(torch.tensor(ROW_LENGTHS), causal=False)
    for how, of_row in {
        "mean": lambda row: row.sum(0) / len(row),
        "weighted_mean": lambda row: (
            sum((i + 1) * vector for i, vector in enumerate(row)) / sum(range(1, len(row) + 1))
        ),
        "last_token": lambda row: row[-1],
        "first_token": lambda row: row[0],
    }.items():
        wanted = torch.stack([of_row(row) for row in hidden.split(ROW_LENGTHS)])
        torch.testing.assert_close(pool(hidden, rows, how), wanted)


@pytest.mark.parametrize("how", ["mean", "weighted_mean", "last_token", "first_token"])
def test_a_pooling_without_instructions_equals_sentence_transformers(how: Any) -> None:
    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    skipped = [2, 0, 3]
    rows = PackedRows.of(torch.tensor(ROW_LENGTHS), causal=False, not_pooled=torch.tensor(skipped))
    (mode,) = (mode for mode, pooling in POOLINGS.items() if pooling == how)
    theirs = st_models.Pooling(4, mode, include_prompt=False)
    wanted = [
        theirs(
            {
                "token_embeddings": row[None],
                "attention_mask": torch.ones(1, len(row), dtype=torch.int64),
                "prompt_length": count,
            }
        )["sentence_embedding"]
        for row, count in zip(hidden.split(ROW_LENGTHS), skipped, strict=True)
    ]
    torch.testing.assert_close(pool(hidden, rows, how), torch.cat(wanted))


def test_pooling_of_bf16_states_is_summed_in_fp32() -> None:
    hidden = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    rows = PackedRows.of(torch.tensor([4096]), causal=False)
    assert pool(hidden, rows, "mean").item() == 1.0  # a bf16 sum would stop at 256


# On the meta device everything that would wait for a GPU (`item`, `nonzero`, counting) raises,
# because it has no data to read.
@pytest.mark.parametrize("pool_instruction", [True, False])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_forward_and_backward_never_wait(
    starter: Path, attention: str, pooling: Pooling, pool_instruction: bool
) -> None:
    config = ModelConfig(
        path=str(starter), attention=attention, pooling=pooling, pool_instruction=pool_instruction
    )
    encoder = build_encoder(config, meta=True)
    input_ids = torch.zeros(sum(ROW_LENGTHS), dtype=torch.long, device="meta")
    instruction_tokens = torch.zeros(len(ROW_LENGTHS), dtype=torch.long, device="meta")
    vectors = encoder(input_ids, torch.tensor(ROW_LENGTHS), instruction_tokens)
    assert vectors.shape == (len(ROW_LENGTHS), encoder.num_dimensions)
    vectors.sum().backward()
    assert all(p.grad is not None for p in encoder.layers.parameters())


def test_lengths_on_the_device_would_be_waited_for(starter: Path) -> None:
    encoder = build_encoder(ModelConfig(path=str(starter)), meta=True)
    input_ids = torch.zeros(sum(ROW_LENGTHS), dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError, match="no data"):
        encoder(input_ids, torch.tensor(ROW_LENGTHS, device="meta"))
