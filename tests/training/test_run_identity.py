"""A resumed run may change some keys; a change of any other is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import TrainConfig, load_config
from pipeline.errors import UserError
from pipeline.training.run_identity import require_same_run, run_identity


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(
        "{output_dir: run, num_steps: 6, model: {path: model}, data: {path: shards},"
        " optimizer: {warmup_steps: 2}}"
    )
    return path


def identity(recipe: Path, *changes: str, shards: str = "these") -> dict[str, Any]:
    dataset: Any = SimpleNamespace(fingerprint=shards)  # all that is asked of it
    return run_identity(load_config(TrainConfig, recipe, changes), dataset)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=7", "seed"),
        ("data.global_batch_size=4", "data.global_batch_size"),
        ("data.num_hard_negatives=3", "data.num_hard_negatives"),
        ("data.candidates={}", "data.candidates"),
        ("model.pooling=last_token", "model.pooling"),
        ("model.attention_dropout=0.2", "model.attention_dropout"),
        ("loss.temperature=0.2", "loss.temperature"),
        ("loss.symmetric=true", "loss.symmetric"),
        ("optimizer.weight_decay=0.2", "optimizer.weight_decay"),
        ("optimizer.warmup_steps=1", "optimizer.warmup_steps"),
    ],
)
def test_what_decides_the_curve_is_named_where_it_differs(
    recipe: Path, change: str, key: str
) -> None:
    before, after = identity(recipe), identity(recipe, change)
    assert [name for name in before if after[name] != before[name]] == [key]


def test_the_same_config_on_other_shards_is_another_run(recipe: Path) -> None:
    before, after = identity(recipe), identity(recipe, shards="others")
    assert [name for name in before if after[name] != before[name]] == ["data.fingerprint"]


@pytest.mark.parametrize(
    "change",
    [
        *(
            "optimizer.decay_steps=6",
            "schedule=sweep",
            "chunks.max_tokens=50",
            "checkpoint.every=3",
        ),
        *("log_every=5", "trackers=[wandb]", "non_finite=skip", "data.prefetch=false"),
        *("output_dir=elsewhere", "data.path=moved", "model.gradient_checkpointing=true"),
    ],
)
def test_what_only_decides_how_fast_and_how_told_may_change(recipe: Path, change: str) -> None:
    assert identity(recipe, change) == identity(recipe)


def resume(recipe: Path, started: tuple[str, ...], resumed: tuple[str, ...], *, step: int) -> None:
    """Compare two runs as one that resumes after `step` steps does."""
    state = {"step": step, "identity": identity(recipe, *started)}
    require_same_run(Path("run/checkpoints/step"), state, identity(recipe, *resumed))


@pytest.mark.parametrize(
    ("started", "resumed"),
    [
        ("num_steps=6", "num_steps=9"),
        ("num_steps=9", "num_steps=6"),
        ("optimizer.decay=cosine", "num_steps=9"),
        ("optimizer.decay_steps=12", "optimizer.decay_steps=20"),
    ],
)
def test_learning_rates_of_steps_already_made_may_not_change(
    recipe: Path, started: str, resumed: str
) -> None:
    cosine = ("optimizer.decay=cosine",) if "cosine" in started else ()
    with pytest.raises(UserError, match=r"num_steps: the learning rate would decay until step"):
        resume(recipe, (started,), (*cosine, resumed), step=3)
    resume(recipe, (started,), (*cosine, resumed), step=2)  # still warming up: nothing changes
    if not cosine:
        constant = "optimizer.decay=constant"
        resume(recipe, (started, constant), (resumed, constant), step=3)


def test_a_run_may_end_earlier_on_the_curve_that_it_started(recipe: Path) -> None:
    resume(recipe, ("num_steps=9",), ("num_steps=6", "optimizer.decay_steps=9"), step=3)


@pytest.mark.parametrize(
    "section",
    [
        "model.lora={rank: 2}",
        "model.rope_scaling={kind: ntk, factor: 2}",
        "loss.distillation={weight: 0.5}",
        "data.weights={rows: 2}",
    ],
)
def test_a_section_that_is_left_out_or_added_is_another_run(recipe: Path, section: str) -> None:
    for started, resumed in (((section,), ()), ((), (section,))):
        with pytest.raises(UserError, match=section.partition("=")[0]):
            resume(recipe, started, resumed, step=3)


def test_all_keys_that_differ_are_named(recipe: Path) -> None:
    with pytest.raises(
        UserError, match=r"seed is 7 \(also different: loss.temperature\) \| allowed: 42"
    ):
        resume(recipe, (), ("seed=7", "loss.temperature=0.2"), step=3)


def test_a_mirror_of_an_earlier_run_is_named_and_not_the_folder_above_it(recipe: Path) -> None:
    state = {"step": 3, "identity": identity(recipe)}
    with pytest.raises(
        UserError, match=r"the run in archive/a started .*another checkpoint\.mirror"
    ):
        require_same_run(Path("archive/a/step-000003"), state, identity(recipe, "seed=7"))


def test_a_key_that_a_checkpoint_was_written_without_has_its_default(recipe: Path) -> None:
    saved = identity(recipe)
    del saved["loss.symmetric"], saved["optimizer.decay_end"]
    path = Path("run/checkpoints/step")
    require_same_run(path, {"step": 3, "identity": saved}, identity(recipe))
    with pytest.raises(UserError, match=r"loss\.symmetric is True"):
        wanted = identity(recipe, "loss.symmetric=true")
        require_same_run(path, {"step": 3, "identity": saved}, wanted)


def test_a_checkpoint_that_names_gradient_checkpointing_is_resumed_with_either(
    recipe: Path,
) -> None:
    path = Path("run/checkpoints/step")
    saved = {**identity(recipe), "model.gradient_checkpointing": True}  # of an earlier version
    for change in ("model.gradient_checkpointing=false", "schedule=sweep"):
        require_same_run(path, {"step": 3, "identity": saved}, identity(recipe, change))


@pytest.mark.parametrize(
    ("file", "key"),
    [("model.safetensors", "model.path"), ("adapter 1/adapter_config.json", "model.adapter")],
)
def test_other_bytes_of_the_base_or_its_adapter_are_refused_and_another_place_is_not(
    recipe: Path, file: str, key: str
) -> None:
    digests = {"config.json": "a", "model.safetensors": "b", "adapter 1/adapter_config.json": "c"}
    dataset: Any = SimpleNamespace(fingerprint="these")

    def with_digests(weights: dict[str, str], *changes: str) -> dict[str, Any]:
        return run_identity(load_config(TrainConfig, recipe, changes), dataset, weights)

    path, state = Path("run/checkpoints/step"), {"step": 1, "identity": with_digests(digests)}
    require_same_run(path, state, with_digests(digests, "model.path=moved"))
    with pytest.raises(UserError, match=rf"{key}: {file} changed since the run in run started"):
        require_same_run(path, state, with_digests({**digests, file: "x"}))
    # A checkpoint of an earlier version knows the model by its place only.
    old = {"step": 1, "identity": identity(recipe)}
    require_same_run(path, old, with_digests(digests))
    with pytest.raises(UserError, match=r"model\.path is 'moved'"):
        require_same_run(path, old, with_digests(digests, "model.path=moved"))


def test_other_shards_are_named_by_the_key_that_the_user_knows(recipe: Path) -> None:
    state = {"step": 1, "identity": identity(recipe, shards="others")}
    with pytest.raises(UserError, match=r"data\.path: .* started with other shards") as error:
        require_same_run(Path("run/checkpoints/step"), state, identity(recipe))
    assert "fingerprint" not in str(error.value)
