"""A model is known by every byte of the files that it is loaded from."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from transformers import Qwen2Model

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model import weights
from pipeline.model.weights import model_digests, model_digests_here
from tests.support import run_ranks
from tests.tiny_models import save_lifted


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
