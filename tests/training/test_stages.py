"""MNTP, SimCSE, supervised: each stage starts from the weights of the one before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.prepare import prepare
from tests.support import launch_ranks
from tests.tiny_models import tiny_starter
from tests.training.tiny_recipe import WORDS
from tests.training.trainer_command import metrics

WORKER = Path(__file__).with_name("stages_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all stages, three steps each, on 60 lines."""
    folder = tmp_path_factory.mktemp("stages")
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(60)]
    raw = folder / "lines.txt"
    raw.write_text("\n".join(lines))
    tiny_starter(folder / "model", raw)
    source = SourceConfig(name="lines", format="lines", path=str(raw))
    prepare(
        PrepareConfig(
            output_dir=folder / "shards", tokenizer=str(folder / "model"), sources=(source,)
        ),
        num_workers=1,
    )
    recipe = folder / "train.yaml"
    recipe.write_text(
        f"""
num_steps: 3
output_dir: {folder / "run"}
model: {{path: {folder / "model"}, dtype: float32}}
data: {{path: {folder / "shards"}, global_batch_size: 8, homogeneous: none}}
chunks: {{max_tokens: 100}}
optimizer: {{lr: 3.0e-2}}
"""
    )
    launch_ranks(2, WORKER, str(recipe))
    return folder


def test_a_stopped_and_resumed_mntp_run_is_bit_equal_to_an_uninterrupted_one(folder: Path) -> None:
    whole = metrics(folder / "mntp")
    assert [line["step"] for line in whole] == [0, 1, 2]
    assert metrics(folder / "halves") == whole
    assert len({line["loss"] for line in whole}) == 3


@pytest.mark.parametrize(
    ("stage", "twin", "without"),
    [
        # The exported adapter on the base model is the merged export.
        ("simcse", "simcse on the adapter", "simcse without mntp"),
        # The continued adapter starts where the same adapter, merged into the weights, ends.
        ("supervised", "supervised on the merged", "supervised without simcse"),
    ],
)
def test_a_stage_begins_with_what_the_last_one_learned(
    folder: Path, stage: str, twin: str, without: str
) -> None:
    first, second, other = (metrics(folder / name)[0]["loss"] for name in (stage, twin, without))
    assert first == pytest.approx(second, rel=1e-5)
    assert first != pytest.approx(other, rel=1e-3)
