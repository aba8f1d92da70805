from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from pipeline.config import LoraConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.model.architectures import FAMILIES
from pipeline.model.encoder import build_encoder
from pipeline.model.export import finish_config

SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2}
# Name -> config, and the attention of transformers that computes it. Windows are shorter than the
# longest row, so that they matter.
CASES: dict[str, tuple[hf.PretrainedConfig, str]] = {
    "llama": (hf.LlamaConfig(**GROUPED), "sdpa"),
    "mistral": (hf.MistralConfig(**GROUPED, sliding_window=6), "sdpa"),
    "qwen2": (hf.Qwen2Config(**GROUPED), "sdpa"),
    "qwen2-window": (
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "sdpa",
    ),
    "qwen3": (hf.Qwen3Config(**GROUPED, head_dim=8), "sdpa"),
    "gemma": (hf.GemmaConfig(**GROUPED, head_dim=8), "sdpa"),
    "gemma2": (hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6), "eager"),
    "gemma3_text": (
        hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6, sliding_window_pattern=2),
        "sdpa",
    ),
    "olmo2": (hf.Olmo2Config(**GROUPED), "sdpa"),
    "phi3": (hf.Phi3Config(**GROUPED), "sdpa"),
    "smollm3": (hf.SmolLM3Config(**GROUPED), "sdpa"),
    "gpt2": (hf.GPT2Config(vocab_size=200, n_embd=32, n_layer=3, n_head=4, n_positions=64), "sdpa"),
    "bert": (hf.BertConfig(**SIZES, pad_token_id=0), "sdpa"),
    "roberta": (hf.RobertaConfig(**SIZES, pad_token_id=1), "sdpa"),
    "xlm-roberta": (hf.XLMRobertaConfig(**SIZES, pad_token_id=1), "sdpa"),
    "eurobert": (hf.EuroBertConfig(**GROUPED), "sdpa"),
    "modernbert": (
        hf.ModernBertConfig(
            **{**SIZES, **IDS}, local_attention=12, global_attn_every_n_layers=2, cls_token_id=1
        ),
        "sdpa",
    ),
}
DECODERS = [name for name in CASES if FAMILIES[name.removesuffix("-window")].decoder]
LENGTHS = torch.tensor([3, 17, 1, 9])


def save_model(config: hf.PretrainedConfig, folder: Path) -> Path:
    """Random weights, large enough that attention and position matter."""
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def padded_means(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean of the last hidden states by transformers alone, from a padded batch."""
    mask = torch.arange(int(LENGTHS.max())) < LENGTHS[:, None]
    padded = torch.full(mask.shape, model.config.pad_token_id or 0)
    padded[mask] = ids
    hidden = model(input_ids=padded, attention_mask=mask.long()).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / LENGTHS[:, None]


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
    # What we save must mean the same to transformers alone, also without a causal mask.
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
    """(L, D) final states of one row, beside another row."""
    torch.manual_seed(0)  # GPT-2 drops out by default
    rows = torch.cat([ids, ids + 1])
    hidden, packed = encoder.embed(rows, torch.tensor([len(ids), len(ids)]))
    for index in range(len(encoder.layers)):
        hidden = encoder.run_layer(index, hidden, packed)
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
