"""Every family and every rescaling of positions against transformers' own models and the papers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from pipeline.config import LoraConfig, ModelConfig, RopeScaling, build_config
from pipeline.errors import UserError
from pipeline.model.architectures import FAMILIES
from pipeline.model.encoder import build_encoder
from pipeline.model.export import finish_config
from tests.model.model_support import (
    CASES,
    DECODERS,
    GROUPED,
    IDS,
    LENGTHS,
    SIZES,
    padded_means,
    save_model,
)


def test_every_family_has_a_case() -> None:
    assert {name.removesuffix("-window") for name in CASES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "bidirectional") for name in CASES] + [(name, "causal") for name in DECODERS],
)
def test_packed_rows_equal_transformers_padded_batch(
    name: str, attention: Any, tmp_path: Path
) -> None:
    config, implementation = CASES[name]
    folder = save_model(config, tmp_path / "published")
    encoder = build_encoder(
        ModelConfig(path=str(folder), dtype="float32", attention=attention, normalize=False)
    )
    assert encoder.describe_attention(torch.device("cpu")) == "attention: row by row (on a CPU)"
    # All else is trained, and needs no base model once a checkpoint holds it.
    poolers = [key for key in load_file(folder / "model.safetensors") if key.startswith("pooler.")]
    assert sorted(encoder.names_from_base()) == sorted(poolers)
    # transformers alone must read the saved folder as the same model, with or without a mask.
    encoder.save_backbone(tmp_path / "saved")
    reference, info = hf.AutoModel.from_pretrained(
        tmp_path / "saved",
        attn_implementation=implementation,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]  # a pooler is kept, too
    reference.eval()
    ids = torch.randint(3, 200, (int(LENGTHS.sum()),), generator=torch.Generator().manual_seed(1))
    ours, theirs = encoder(ids, LENGTHS), padded_means(reference, ids)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    wanted = dict(reference.named_parameters())
    for key, parameter in encoder.model.named_parameters():
        scale = wanted[key].grad.abs().max()
        error = (parameter.grad - wanted[key].grad).abs().max()
        assert error <= 1e-5 * scale + 1e-6, key  # a key bias has no gradient but rounding


@pytest.mark.parametrize("name", CASES)
def test_older_readers_find_rotary_positions_and_newer_ones_read_the_same(
    name: str, tmp_path: Path
) -> None:
    config = CASES[name][0]
    published = config.to_dict()
    rope = published.get("rope_parameters")
    for part in rope.values() if rope and "rope_type" not in rope else [rope] if rope else []:
        part["rope_theta"] = 12_345.0  # no family's default
    config = type(config)(**published)
    config.auto_map = {"AutoModel": "nowhere.Class"}
    config.save_pretrained(tmp_path)
    finish_config(tmp_path / "config.json")
    tree = json.loads((tmp_path / "config.json").read_text())
    found = {key: value for key, value in tree.items() if "rope" in key and "theta" in key}
    assert "auto_map" not in tree and set(found.values()) == ({12_345.0} if rope else set())
    again = hf.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False).to_dict()
    assert again.get("rope_parameters") == config.to_dict().get("rope_parameters")
    # vLLM 0.32 reads it from this family's file alone.
    wanted = "absolute" if name == "xlm-roberta" else None
    assert tree.get("position_embedding_type") == wanted


@pytest.mark.parametrize("name", [name for name in CASES if name not in DECODERS])
def test_a_causal_mask_on_an_encoder_is_refused(name: str, tmp_path: Path) -> None:
    folder = save_model(CASES[name][0], tmp_path)
    with pytest.raises(UserError, match="is an encoder"):
        build_encoder(ModelConfig(path=str(folder), attention="causal"))


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    hf.T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'t5'.*Dream.*qwen2"):
        build_encoder(ModelConfig(path=str(tmp_path)))
    for path, message in (
        (str(tmp_path / "nowhere"), "nowhere: no such folder .* fix: correct model.path"),
        (str(tmp_path / "config.json"), "is a file .* fix: name its folder"),
        ("some/where", r"cannot read a config\.json .* fix: .*hf download some/where"),
    ):
        with pytest.raises(UserError, match=f"^model.path: .*{message}"):
            build_encoder(ModelConfig(path=path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"fix: fetch {tmp_path} again, or name another"):
        build_encoder(ModelConfig(path=str(tmp_path)))
    hf.Qwen2Config(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(UserError, match=f"run `git lfs pull` in {tmp_path}, "):
        build_encoder(ModelConfig(path=str(tmp_path)))


def test_diffusion_gemma_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "diffusion_gemma"}')
    with pytest.raises(UserError, match=r"DiffusionGemma.*cache of a causal encoder.*Dream"):
        build_encoder(ModelConfig(path=str(tmp_path)))
    # The day transformers loads the text stack alone, the reason is gone.
    assert hf.models.auto.auto_mappings.CONFIG_MAPPING_NAMES["diffusion_gemma_text"]
    assert "diffusion_gemma_text" not in hf.models.auto.modeling_auto.MODEL_MAPPING_NAMES


def _first_states(encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    """(L, D) final states of one row, packed with another row."""
    torch.manual_seed(0)  # GPT-2 drops out by default
    rows = torch.cat([ids, ids + 1])
    hidden, context = encoder.embed(rows, torch.tensor([len(ids), len(ids)]))
    for index in range(len(encoder.layers)):
        hidden = encoder.run_layer(index, hidden, context)
    return hidden[0, : len(ids)]


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_later_token_moves_earlier_states_of_a_decoder_only_without_causal_mask(
    name: str, attention: Any, tmp_path: Path
) -> None:
    folder = save_model(CASES[name][0], tmp_path)
    targets = ("c_attn", "c_proj") if name == "gpt2" else ("o_proj", "down_proj")
    encoder = build_encoder(
        ModelConfig(
            path=str(folder),
            dtype="float32",
            attention=attention,
            gradient_checkpointing=True,
            lora=LoraConfig(rank=2, dropout=0.0, targets=targets),
        )
    )
    ids = torch.arange(3, 8)
    other = ids.clone()
    other[-1] = 9
    for training in (True, False):
        encoder.train(training)
        moved = (_first_states(encoder, ids) - _first_states(encoder, other)).abs().amax(dim=1)
        assert (moved[:-1] > 1e-4).all() == (attention == "bidirectional")
        assert (moved[:-1] == 0).all() == (attention == "causal")


def test_a_gemma_config_whose_copies_would_differ_is_refused(tmp_path: Path) -> None:
    config = hf.Gemma3TextConfig(**GROUPED, head_dim=8, use_bidirectional_attention=True)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="use_bidirectional_attention"):
        build_encoder(ModelConfig(path=str(tmp_path)))


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
