"""Write the hours of docs/recipes.md: `python -m tests.planning.recipe_hours`.

Published sizes of models and texts, eight H100 of one node; a projection from data sheets.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

from pipeline.config import TrainConfig, load_config
from pipeline.planning import plan_run, step_time
from pipeline.planning.describe import format_seconds, gpu_time
from pipeline.planning.described_data import write_shards
from pipeline.planning.memory import Target
from pipeline.planning.speed import DEFAULT_NETWORK, GPUS
from pipeline.training.ds_config import load_ds_config, resolve_ds_config
from tests.launch.published_figures import ARCHITECTURES, SHAPES
from tests.planning.plan_table import markdown, replace_between

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch/recipes/published"
PAGE = ROOT / "docs/recipes.md"
BEGIN, END = "<!-- hours: python -m tests.planning.recipe_hours -->", "<!-- end of hours -->"
GPU_COUNT = 8
# One model each; the paper's models have about the same size.
NAMES = [
    *(f"{task}/dream{size}" for task in ("instruction", "long", "reason", "theorem", "simcse")
      for size in ("", "-large-batch")),
    "mntp/qwen2.5",
]  # fmt: skip


def row(name: str, folder: Path) -> list[str]:
    """Return what `diffembed plan run --gpus-per-node 8 --gpu h100` says about a recipe."""
    published = load_config(TrainConfig, RECIPES / f"{name}.yaml")
    model, shards = folder / name / "model", folder / name / "shards"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(ARCHITECTURES[published.model.path]))
    config = dataclasses.replace(
        published,
        model=dataclasses.replace(published.model, path=str(model)),
        data=dataclasses.replace(
            published.data, path=write_shards(shards, SHAPES[name.split("/")[0]])
        ),
    )
    zero2 = load_ds_config(ROOT / "ds_configs/zero2.json")
    plan = plan_run(
        config,
        resolve_ds_config(zero2, config, world_size=GPU_COUNT),
        world_size=GPU_COUNT,
        target=Target.gpu("h100"),
        build=False,
        speed=GPUS["h100"],
    )
    step = step_time(plan, config, GPUS["h100"], network=DEFAULT_NETWORK)
    return [
        f"`{name}`",
        f"{config.data.global_batch_size:,}",
        f"{plan.batch.tokens:,}",
        f"{config.num_steps:,}",
        plan.schedule,
        format_seconds(step),
        format_seconds(step * config.num_steps),
        gpu_time(step * config.num_steps * GPU_COUNT),
    ]


def written(page: str) -> str:
    """The page with the hours of the present formulas."""
    head = ["recipe", "global batch", "tokens a step", "steps", "schedule"]
    head += ["step", "run", "of all GPUs"]
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row(name, Path(scratch)) for name in NAMES]
    return replace_between(page, BEGIN, END, markdown([head, *rows]))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
