"""Rescaled positions against transformers' own models and the formulas of the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from test_families import CASES, GROUPED, IDS, LENGTHS, SIZES, padded_means, save_model

from pipeline.config import ModelConfig, RopeScaling, build_config
from pipeline.errors import UserError
from pipeline.model.architectures import FAMILIES
from pipeline.model.encoder import build_encoder
from pipeline.model.export import finish_config

ROTARY = [name for name in CASES if hasattr(CASES[name][0], "rope_parameters")]
SHORT, FACTOR = 8, 3.0  # the longest row has 17 tokens


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "eurobert", "modernbert"])
def test_rescaled_packed_rows_equal_transformers_reading_the_saved_config(
    name: str, kind: Any, tmp_path: Path
) -> None:
    config, implementation = CASES[name]
    folder = save_model(config, tmp_path / "published")
    settings = {"path": str(folder), "dtype": "float32", "normalize": False}
    plain = build_encoder(ModelConfig(**settings))
    scaling = RopeScaling(kind=kind, factor=FACTOR)
    encoder = build_encoder(ModelConfig(**settings, rope_scaling=scaling))
    encoder.save_backbone(tmp_path / "saved")
    finish_config(tmp_path / "saved" / "config.json")  # both forms mean the same
    reference = hf.AutoModel.from_pretrained(
        tmp_path / "saved", attn_implementation=implementation, dtype=torch.float32
    ).eval()
    ids = torch.randint(3, 200, (int(LENGTHS.sum()),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = encoder(ids, LENGTHS)
        torch.testing.assert_close(ours, padded_means(reference, ids), atol=1e-5, rtol=0)
        assert (ours - plain(ids, LENGTHS)).abs().max() > 1e-3
    assert reference.config.max_position_embeddings == 3 * config.max_position_embeddings


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_frequencies_follow_the_papers(kind: Any, tmp_path: Path) -> None:
    length = 512 if kind == "yarn" else SHORT
    config = hf.LlamaConfig(**{**SIZES, **IDS, "max_position_embeddings": length}, rope_theta=1e4)
    folder = save_model(config, tmp_path)
    scaling = RopeScaling(kind=kind, factor=FACTOR)
    encoder = build_encoder(ModelConfig(path=str(folder), dtype="float32", rope_scaling=scaling))
    rotary = encoder.model.rotary_emb
    width = 8
    exponent = torch.arange(0, width, 2) / width
    plain = 1e4**-exponent
    if kind == "linear":
        wanted = plain / FACTOR
    elif kind == "ntk":
        wanted = (1e4 * FACTOR ** (width / (width - 2))) ** -exponent
    else:
        # Turns within the trained length: 81, 8.1, 0.8, 0.1. From 32 on they stay as they are, from
        # one on they are divided, and between lies a ramp over whole indices: here half of each.
        wanted = plain * torch.tensor([1, (1 + 1 / FACTOR) / 2, 1 / FACTOR, 1 / FACTOR])
        assert rotary.attention_scaling == pytest.approx(
            0.1 * torch.log(torch.tensor(FACTOR)).item() + 1
        )
    torch.testing.assert_close(rotary.inv_freq, wanted)


def test_only_the_dimensions_that_turn_count_in_ntk(tmp_path: Path) -> None:
    """Half of 8 dimensions turn here, as in Phi-3's small models; the exponent is of those 4."""
    config = hf.Phi3Config(
        **{**GROUPED, "max_position_embeddings": SHORT},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    scaling = RopeScaling(kind="ntk", factor=FACTOR)
    folder = str(save_model(config, tmp_path))
    encoder = build_encoder(ModelConfig(path=folder, dtype="float32", rope_scaling=scaling))
    wanted = (1e4 * FACTOR ** (4 / 2)) ** -torch.tensor([0, 2 / 4])
    torch.testing.assert_close(encoder.model.rotary_emb.inv_freq, wanted)


def test_layers_with_a_window_keep_their_positions(tmp_path: Path) -> None:
    folder = str(save_model(CASES["gemma3_text"][0], tmp_path))
    scaling = RopeScaling(kind="linear", factor=FACTOR)
    plain, scaled = (
        build_encoder(ModelConfig(path=folder, dtype="float32", rope_scaling=how)).model.rotary_emb
        for how in (None, scaling)
    )
    states, places = torch.zeros(1, 20, 1), torch.arange(20)[None]
    for kind, same in (("sliding_attention", True), ("full_attention", False)):
        first, second = (rotary(states, places, kind)[0] for rotary in (plain, scaled))
        assert torch.equal(first, second) == same, kind


def test_every_rotary_family_takes_a_scaling_and_no_other_does(tmp_path: Path) -> None:
    scaling = RopeScaling(kind="linear", factor=2)
    for name, (config, _) in CASES.items():
        config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").touch()
        asked = ModelConfig(path=str(tmp_path / name), rope_scaling=scaling)
        if name in ROTARY:
            build_encoder(asked, meta=True)
        else:
            with pytest.raises(UserError, match="no rotary positions"):
                build_encoder(asked, meta=True)
    assert {name.removesuffix("-window") for name in ROTARY} == set(FAMILIES) - {
        *("gpt2", "bert", "roberta", "xlm-roberta"),
    }


def test_positions_that_are_rescaled_already_are_refused(tmp_path: Path) -> None:
    hf.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ).save_pretrained(tmp_path)
    scaling = RopeScaling(kind="yarn", factor=2)
    with pytest.raises(UserError, match="already linear"):
        build_encoder(ModelConfig(path=str(tmp_path), rope_scaling=scaling), meta=True)
    with pytest.raises(UserError, match=r"model\.yaml: factor: 1 .*a number > 1"):
        build_config(RopeScaling, {"kind": "yarn", "factor": 1}, origin="model.yaml")
