"""Write the plans of launch/recipes/one_gpu: `python -m tests.planning.one_gpu_plans`.

Published sizes from config.json alone, and shards with the lengths of natural questions.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig, load_config
from pipeline.planning import plan_run
from pipeline.planning.describe import describe
from pipeline.planning.described_data import Lengths, Shape, write_shards
from pipeline.planning.memory import Target
from pipeline.training.ds_config import load_ds_config, resolve_ds_config
from tests.planning.plan_table import replace_between, tree

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch/recipes/one_gpu"
PAGE = RECIPES / "README.md"
GPU_GIB = "24"
BEGIN, END = "<!-- plans: python -m tests.planning.one_gpu_plans -->", "<!-- end of plans -->"
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **tree("qwen3", 1024, 3072, 28, 16, 8, 151936),
        **{"head_dim": 128, "tie_word_embeddings": True},
    },
    "modernbert": {
        **tree("modernbert", 768, 1152, 22, 12, 12, 50368),
        **{"global_attn_every_n_layers": 3, "local_attention": 128},
    },
    "dream-lora": tree("Dream", 3584, 18944, 28, 28, 4, 152064),
}
SHAPE = Shape(
    groups=(("nq", "Retrieve", 100_231),),
    query=Lengths(mean=26, deviation=4, limit=96),
    document=Lengths(mean=140, deviation=80, limit=512),
    num_negatives=0,
)


def plan(name: str, shards: Path, folder: Path) -> str:
    """Return what `diffembed plan run` prints for a recipe on one GPU of 24 GiB."""
    config = load_config(TrainConfig, RECIPES / f"{name}.yaml")
    model = folder / name
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODELS[name]))
    local = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(model)),
        data=dataclasses.replace(config.data, path=shards),
    )
    resolved = resolve_ds_config(
        load_ds_config(ROOT / "ds_configs/zero2.json"), local, world_size=1
    )
    target = Target.gpu(GPU_GIB, ranks_per_host=1)
    found = plan_run(local, resolved, world_size=1, target=target, build=False)
    return describe(found, config)


def written(page: str) -> str:
    """The page with the plans of the present formulas."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = write_shards(folder / "shards", SHAPE)
        plans = [f"`{name}.yaml`\n\n```\n{plan(name, shards, folder)}\n```" for name in MODELS]
    return replace_between(page, BEGIN, END, "\n\n".join(plans))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
