"""A training step on a mined folder: candidates, guide and teacher from files to gradients."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipeline.config import TrainConfig, load_config
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import make_loader
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder
from pipeline.planning import plan_run
from pipeline.planning.memory import Target
from pipeline.training.checkpoints import iterate_tensors
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.export_run import export_run
from tests.benchmarks.bench_support import PlainEngine, take_gradients
from tests.loss.reference import Case, naive_loss, relative_error
from tests.mined_data import WIDTH, draw_vectors, mine_by_hand
from tests.support import share_folder
from tests.training.trainer_command import metrics, run_trainer

KEYS = (
    "model.attention_dropout=0",
    "loss.learn_temperature=false",
    "data.num_hard_negatives=3",
    "data.candidates={bands: {hard: 2, easy: 1}}",
    "loss.guide={margin: 0.05, margin_strategy: relative}",
    "loss.distillation={documents: batch, temperature: 0.1}",
)


@pytest.fixture(scope="module")
def mined(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's shards with candidates and vectors."""

    def make(folder: Path) -> None:
        shards = load_config(TrainConfig, recipe).data.path
        mine_by_hand(Dataset.open(shards), folder / "shards")

    return share_folder(tmp_path_factory, "mined", make) / "shards"


@pytest.fixture
def config(recipe: Path, mined: Path) -> TrainConfig:
    return load_config(TrainConfig, recipe, (*KEYS, f"data.path={mined}"))


def stored(ids: np.ndarray, count: int, seed: int) -> torch.Tensor:
    """A teacher's vectors as fp16 holds them."""
    drawn = draw_vectors(count, WIDTH, seed).astype(np.float64)
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return torch.from_numpy(unit.astype(np.float16)[ids]).float()


@pytest.mark.parametrize("schedule", ["plain", "cache", "sweep"])
def test_a_step_has_the_gradient_of_the_loss_written_plainly(
    schedule: str, recipe: Path, mined: Path
) -> None:
    config = load_config(TrainConfig, recipe, (*KEYS, f"data.path={mined}", f"schedule={schedule}"))
    dataset = Dataset.open(mined)
    loader = make_loader(dataset, config, rank=0, world_size=1)
    batch, ids = loader.batch(1), loader._draw(1).relevance.document_ids
    assert len(batch.chunks) > 1
    torch.manual_seed(0)
    encoder = build_encoder(config.model).train()
    rows: list[torch.Tensor] = [torch.empty(0)] * (batch.num_queries + batch.num_documents)
    for chunk in batch.chunks:
        columns = (chunk.input_ids, chunk.lengths, chunk.instruction_tokens)
        vectors = encoder(*(None if x is None else torch.from_numpy(x) for x in columns))
        for text, vector in zip(chunk.texts.tolist(), vectors, strict=True):
            rows[text] = vector
    query, document = torch.stack(rows[: batch.num_queries]), torch.stack(rows[batch.num_queries :])
    case = Case(
        query.detach(),
        document.detach(),
        *([row.tolist() for row in x] for x in (batch.positives, batch.negatives, batch.masked)),
        vectors=(
            stored(batch.example_ids, dataset.num_examples, seed=1),
            stored(ids, len(dataset.documents), seed=0),
        ),
    )
    expected = naive_loss(case, config.loss)
    ((query * expected.query).sum() + (document * expected.document).sum()).backward()
    wanted = take_gradients(encoder)

    output = accumulate_gradients(PlainEngine(encoder), batch, config, device=torch.device("cpu"))
    got = take_gradients(encoder)
    assert float(output.loss) == pytest.approx(expected.loss, rel=1e-6)
    assert output.metrics["guided_per_query"] > 0.5
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        if gradient.norm() > 1e-8:
            assert relative_error(got[name], gradient.double()) < 1e-5, name


PROJECTED = (
    "model.attention_dropout=0",
    "loss.projection={distance: squared, weight: 0.5, lr: 0.02}",
    "optimizer={decay: constant, lr: 1.0e-3, warmup_steps: 0}",
)


def test_a_projection_is_trained_resumed_on_other_ranks_and_not_exported(
    recipe: Path, mined: Path, tmp_path: Path
) -> None:
    """From step 2 on one rank of ZeRO-1 to step 4, there and on two ranks of ZeRO-3."""

    def run(name: str, steps: int, *, stage: int = 1, num_ranks: int = 1) -> list[dict[str, Any]]:
        done = run_trainer(
            *(recipe, "--deepspeed", f"ds_configs/zero{stage}.json", *PROJECTED),
            *(f"data.path={mined}", f"num_steps={steps}", f"output_dir={tmp_path / name}"),
            num_ranks=num_ranks,
        )
        assert done.returncode == 0, done.stderr
        return metrics(tmp_path / name)

    whole = run("whole", 4)
    assert whole[3]["teacher_distance"] < 0.95 * whole[0]["teacher_distance"]
    half = run("resumed", 2)
    shutil.copytree(tmp_path / "resumed", tmp_path / "spread")
    assert half == whole[:2]
    assert run("resumed", 4) == whole
    spread = run("spread", 4, stage=3, num_ranks=2)
    for key in ("loss", "teacher_distance", "grad_norm"):
        assert [line[key] for line in spread] == pytest.approx([line[key] for line in whole], 1e-4)
    ends = [
        dict(iterate_tensors(tmp_path / name / "checkpoints" / "step-000004"))["loss.projection"]
        for name in ("whole", "resumed", "spread")
    ]
    assert ends[0]["weight"].shape[1] == WIDTH
    for key, tensor in ends[0].items():
        assert tensor.abs().max() > 0
        assert torch.equal(ends[1][key], tensor)
        assert relative_error(ends[2][key], tensor.double()) < 1e-3
    config = load_config(
        TrainConfig, recipe, (*PROJECTED, f"data.path={mined}", f"output_dir={tmp_path / 'whole'}")
    )
    folder = export_run(config, which="latest", output=None, check=False)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "projection" in name]  # noqa: SIM118


def test_the_plan_counts_the_teacher(config: TrainConfig, recipe: Path, mined: Path) -> None:
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 1}}, config, world_size=2)
    target = Target(available=8 * 2**30, name="a GPU")
    plan = plan_run(config, ds_config, world_size=2, target=target, build=False)
    plain = load_config(TrainConfig, recipe, (*KEYS[:4], f"data.path={mined}"))
    without = plan_run(plain, ds_config, world_size=2, target=target, build=False)
    assert plan.loss is not None and without.loss is not None
    assert without.loss.teacher_bytes == 0 < plan.loss.teacher_bytes
    assert plan.loss.peak_bytes > without.loss.peak_bytes
    projected = load_config(
        TrainConfig, recipe, (*KEYS, f"data.path={mined}", "loss.projection={}")
    )
    more = plan_run(projected, ds_config, world_size=2, target=target, build=False)
    assert more.loss is not None
    hidden = plan.shape.hidden_size
    assert more.loss.teacher_bytes - plan.loss.teacher_bytes == 32 * hidden * WIDTH


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("loss.guide={}", r"loss\.guide is set but the data set holds no teacher vectors"),
        ("loss.projection={}", r"loss\.projection is set but the data set holds no teacher"),
        (
            "loss.distillation={documents: batch}",
            r"loss\.distillation\.documents is set but the data set holds no teacher vectors",
        ),
        ("data.candidates={}", r"data\.candidates is set but .* stores no candidates"),
    ],
)
def test_a_plan_refuses_keys_that_the_data_cannot_serve(key: str, named: str, recipe: Path) -> None:
    config = load_config(TrainConfig, recipe, (key,))
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 1}}, config, world_size=1)
    target = Target(available=8 * 2**30, name="a GPU")
    with pytest.raises(UserError, match=named):
        plan_run(config, ds_config, world_size=1, target=target, build=False)
