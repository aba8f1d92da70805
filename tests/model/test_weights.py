"""Weights read piece by piece are the weights that transformers reads at once; digests of files."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import Qwen2Model

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model import weights
from pipeline.model.encoder import build_encoder
from pipeline.model.weights import Placement, model_digests, model_digests_here
from tests.model.model_support import CASES, llada_folder, save_adapter, save_model
from tests.support import run_ranks
from tests.tiny_models import save_lifted


class Pieces(Placement):
    """Keep weights whole, and note the size of every piece."""

    by_piece = True

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def take(self, parameters: list[torch.nn.Parameter]) -> None:
        assert not any(parameter.is_meta for parameter in parameters)
        self.sizes.append(sum(parameter.numel() for parameter in parameters))


def assert_same_tensors(ours: torch.nn.Module, wanted: torch.nn.Module) -> None:
    tensors = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    expected = {**dict(wanted.named_parameters()), **dict(wanted.named_buffers())}
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_pieces_equal_what_transformers_loads_at_once(
    name: str, dtype: Any, tmp_path: Path
) -> None:
    save_model(CASES[name][0], tmp_path)
    placement, before = Pieces(), torch.get_rng_state()
    encoder = build_encoder(ModelConfig(path=str(tmp_path), dtype=dtype), placement=placement)
    # No random numbers were drawn, so a fresh adapter starts equal on all ranks.
    assert torch.equal(torch.get_rng_state(), before)
    wanted = hf.AutoModel.from_pretrained(
        tmp_path, dtype=getattr(torch, dtype), **encoder.family.arguments
    )
    assert_same_tensors(encoder.backbone, wanted)
    inside = {id(parameter) for parameter in encoder.layers.parameters()}
    layers = [sum(p.numel() for p in layer.parameters()) for layer in encoder.layers]
    outside = [p.numel() for p in encoder.parameters() if id(p) not in inside]
    assert max(placement.sizes) <= max(*layers, *outside)


@pytest.mark.parametrize("kind", ["llada", "adapted"])
def test_a_diffusion_layout_read_in_pieces_equals_it_read_at_once(
    kind: str, tmp_path: Path
) -> None:
    if kind == "llada":
        llada_folder(tmp_path)
    else:
        weights = load_file(save_model(CASES["llama"][0], tmp_path) / "model.safetensors")
        adapted = {
            name if name.startswith("embed") else f"denoise_model.{name}": weight
            for name, weight in weights.items()
        }
        save_file(adapted, tmp_path / "model.safetensors")
    config = ModelConfig(path=str(tmp_path), dtype="bfloat16")
    placement = Pieces()
    assert_same_tensors(build_encoder(config, placement=placement), build_encoder(config))
    assert len(placement.sizes) > 3


def test_an_adapter_merged_into_pieces_equals_peft_on_the_whole_model(tmp_path: Path) -> None:
    folder = save_model(CASES["llama"][0], tmp_path / "base")
    adapter = save_adapter(hf.AutoModel.from_pretrained(folder), tmp_path / "adapter")
    config = ModelConfig(path=str(folder), dtype="float32", adapter=str(tmp_path / "adapter"))
    encoder = build_encoder(config, placement=Pieces())
    assert_same_tensors(encoder.backbone, adapter.merge_and_unload())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A llama in several files."""
    model = hf.AutoModel.from_config(CASES["llama"][0])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    return tmp_path


def rewrite(folder: Path, name: str, weight: torch.Tensor | None) -> None:
    """Put another tensor under a name, or none."""
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights or (weight is not None and "norm.weight" in weights):
            weights.pop(name, None)
            save_file({**weights, **({} if weight is None else {name: weight})}, path)


@pytest.mark.parametrize(
    ("name", "weight", "words"),
    [
        ("layers.1.mlp.up_proj.weight", None, "missing ['layers.1.mlp.up_proj.weight']"),
        ("layers.1.mlp.gate.weight", torch.ones(3), "unexpected ['layers.1.mlp.gate.weight']"),
        ("norm.weight", torch.ones(3), "of another shape ['norm.weight [3] for [32]']"),
    ],
)
def test_weights_that_do_not_fit_are_named_before_any_is_read(
    sharded: Path, name: str, weight: torch.Tensor | None, words: str
) -> None:
    rewrite(sharded, name, weight)
    placement = Pieces()
    with pytest.raises(UserError, match=re.escape(words)):
        build_encoder(ModelConfig(path=str(sharded)), placement=placement)
    assert placement.sizes == []


@pytest.mark.parametrize("damage", ["shortened", "missing"])
def test_a_damaged_or_missing_shard_is_named(sharded: Path, damage: str) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=shard.name):
        build_encoder(ModelConfig(path=str(sharded)))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    weights = load_file(save_model(CASES["llama"][0], tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no safetensors weights.*fix: .*save_pretrained"):
        build_encoder(ModelConfig(path=str(tmp_path)))


def test_parts_of_weights_without_their_index_are_named(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds model-00001-of-.*, but no index.*fix: fetch"):
        build_encoder(ModelConfig(path=str(sharded)))


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (["v_head.summary.weight", "v_head.summary.bias"], "are not used (2, such as v_head"),
        (["qa_outputs.weight", "score.weight"], "are not used (2, such as qa_outputs"),
        (["linear.weight"], "are not used (1, such as linear"),  # ColBERT
        (["lm_head.weight"], None),
    ],
)
def test_heads_of_a_complete_checkpoint_are_counted_and_left_out(
    tmp_path: Path, heads: list[str], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lifted(tmp_path, hf.Qwen2Model, num_hidden_layers=1)
    file = tmp_path / "model.safetensors"
    config = ModelConfig(path=str(tmp_path), dtype="float32")
    plain = build_encoder(config).backbone
    weights = {f"model.{name}": value for name, value in load_file(file).items()}
    extra = {name: torch.ones(3) for name in heads}
    save_file({**weights, **extra}, file, {"format": "pt"})
    capsys.readouterr()
    assert_same_tensors(build_encoder(config).backbone, plain)
    told = capsys.readouterr().err
    assert said in told if said else "outside" not in told


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lifted(tmp_path_factory.mktemp("base"), Qwen2Model, num_hidden_layers=1)


def digests_of(path: str) -> dict[str, str]:
    weights.BLOCK_BYTES = 1000  # several blocks for every rank
    return model_digests(ModelConfig(path=path))


def test_digests_are_the_same_on_any_number_of_ranks(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (base / "model.safetensors").read_bytes()
    blocks = [hashlib.sha256(content[i : i + 1000]).digest() for i in range(0, len(content), 1000)]
    first, second = run_ranks(2, digests_of, str(base))
    assert first == second
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    assert model_digests_here(ModelConfig(path=str(base))) == first
    assert first.keys() == {"config.json", "model.safetensors"}
    assert first["model.safetensors"] == hashlib.sha256(b"".join(blocks)).hexdigest()


def test_one_changed_byte_of_equal_size_and_time_shows_and_another_place_does_not(
    base: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"abc")
    moved = Path(shutil.copytree(base, tmp_path / "moved"))

    def found(path: Path) -> dict[str, str]:
        return model_digests(ModelConfig(path=str(path), merged_adapters=(str(adapter),)))

    before = found(base)
    assert found(moved) == before
    assert "adapter 1/adapter_model.safetensors" in before
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    shutil.copystat(base / "model.safetensors", weights)
    (adapter / "adapter_config.json").write_text("[]")
    after = found(moved)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"model.safetensors", "adapter 1/adapter_config.json"}


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: cannot read a config\.json"):
        model_digests(ModelConfig(path=str(tmp_path)))
