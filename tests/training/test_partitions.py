"""A model that is loaded into ZeRO-3 partitions never lies whole on one rank, and is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pipeline.config import ModelConfig
from pipeline.model.encoder import build_encoder
from tests.support import launch_ranks

WORKER = Path(__file__).with_name("partition_worker.py")
MIB = 2**20


# Adapters whose layers start from the weights that they adapt.
CONTINUED: tuple[dict[str, Any], ...] = (
    {"use_dora": True},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"trainable_token_indices": {"embed_tokens": [5, 6]}},
)


def write_adapter(base: Path, folder: Path, settings: dict[str, Any]) -> str:
    """Write an adapter with weights that matter."""
    backbone = build_encoder(ModelConfig(path=str(base), dtype="float32")).backbone
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    )
    peft.get_peft_model(backbone, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def results(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements of both ranks, by case."""
    large = tmp_path_factory.mktemp("large")
    config = hf.LlamaConfig(
        vocab_size=6000,
        hidden_size=768,
        intermediate_size=2112,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    # Read in another type than it is published in, or a whole model might stay in the page cache.
    model = hf.AutoModel.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(large, max_shard_size="30MB")
    broken = tmp_path_factory.mktemp("broken")
    weights = load_file(model_path / "model.safetensors")
    weights.pop("layers.1.mlp.up_proj.weight")
    save_file(weights, broken / "model.safetensors")
    (broken / "config.json").write_text((model_path / "config.json").read_text())
    adapters = [
        write_adapter(model_path, tmp_path_factory.mktemp("adapter"), settings)
        for settings in CONTINUED
    ]
    output = launch_ranks(2, WORKER, str(large), str(model_path), str(broken), *adapters)
    by_case: dict[str, list[dict[str, Any]]] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            result = json.loads(line)
            by_case.setdefault(result["case"], []).append(result)
    return by_case


def test_no_rank_holds_more_than_its_partitions_and_one_piece(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    for result in results["memory"]:
        print({key: value / MIB for key, value in result.items() if key not in ("case", "equal")})
        # The rank that reads has a layer twice: mapped as it is published, in half the bytes, and
        # as it is trained.
        limit = result["model"] / 2 + 1.5 * result["layer"] + 8 * MIB
        assert result["in_pieces"] <= limit
        assert result["at_once"] > limit  # or the limit would show nothing
        assert result["equal"]


def test_steps_after_loading_in_pieces_are_bit_equal(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    continued = [f"continued {number}" for number in range(len(CONTINUED))]
    for case in ("3", "3 hpz", *continued):  # all weights; an adapter in bfloat16; adapters
        for result in results[case]:
            assert result["pieces"] == result["whole"], case


def test_all_ranks_refuse_what_one_rank_cannot_load(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    for case, words in (("misfit", "missing ['layers.1.mlp.up_proj"), ("rank 1", "/nowhere")):
        first, second = (result["error"] for result in results[case])
        assert first == second
        assert first.startswith("UserError: model.path") and words in first
