"""Write the tables of docs/planning.md: `python -m tests.planning.plan_table`.

Published sizes, from their config.json alone; nothing is downloaded and no weight is read.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import ChunkConfig, DataConfig, LoraConfig, ModelConfig, TrainConfig
from pipeline.planning import RunPlan, plan_run
from pipeline.planning.described_data import Lengths, Shape, write_shards
from pipeline.planning.memory import GIB, PARTS, Target, host_memory, peak
from pipeline.planning.shape import ModelShape, saved_by_layer
from pipeline.planning.speed import GPUS
from pipeline.training.ds_config import load_ds_config, resolve_ds_config

ROOT = Path(__file__).resolve().parents[2]
PAGE, DEEPSPEED = ROOT / "docs" / "planning.md", ROOT / "ds_configs"
BEGIN, END = "<!-- {}: python -m tests.planning.plan_table -->", "<!-- end of {} -->"
CHUNK = 8192
TEXT = 512  # tokens of every text


def tree(kind: str, h: int, i: int, layers: int, heads: int, kv: int, vocabulary: int) -> Any:
    """The keys of a config.json that a plan reads."""
    return {
        "model_type": kind,
        "hidden_size": h,
        "intermediate_size": i,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
    }


MODELS = {
    "Qwen2.5-7B": tree("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Mistral-Small-24B": {**tree("mistral", 5120, 32768, 40, 32, 8, 131072), "head_dim": 128},
    "Llama-3.1-70B": tree("llama", 8192, 28672, 80, 64, 8, 128256),
    "Qwen2.5-72B": tree("qwen2", 8192, 29568, 80, 64, 8, 152064),
}
# Model, adapters or not, GPUs, ZeRO stage, tokens of a GPU, and what the config sets in addition.
RUNS: list[tuple[str, bool, int, int, int, dict[str, bool]]] = [
    ("Qwen2.5-7B", True, 1, 2, 131_072, {}),
    ("Qwen2.5-7B", False, 1, 3, 131_072, {"offload_optimizer": True, "boundaries_on_host": True}),
    ("Qwen2.5-7B", True, 8, 2, 131_072, {}),
    ("Qwen2.5-7B", False, 8, 3, 131_072, {"gradient_checkpointing": True}),
    ("Qwen2.5-7B", False, 8, 3, 131_072, {}),
    ("Mistral-Small-24B", True, 8, 3, 65_536, {"gradient_checkpointing": True}),
    ("Mistral-Small-24B", True, 8, 3, 65_536, {}),
    ("Mistral-Small-24B", False, 8, 3, 65_536, {"boundaries_on_host": True}),
    ("Llama-3.1-70B", False, 64, 3, 8_192, {}),
    ("Llama-3.1-70B", False, 64, 3, 65_536, {"boundaries_on_host": True}),
    ("Qwen2.5-72B", False, 64, 3, 8_192, {}),
    ("Qwen2.5-72B", True, 64, 3, 8_192, {}),
]
KEYS = {
    "gradient_checkpointing": "gradient_checkpointing",
    "boundaries_on_host": "boundaries: host",
    "offload_optimizer": "zero3_offload.json",
}


def shape_of(name: str, lora: LoraConfig | None) -> ModelShape:
    """A published model with or without adapters."""
    return ModelShape.planned(MODELS[name], ModelConfig(path=name, pooling="mean", lora=lora))


def plan_of(
    name: str,
    lora: LoraConfig | None,
    ranks: int,
    stage: int,
    tokens: int,
    options: dict[str, bool],
) -> RunPlan:
    """Return what `diffembed plan run --gpu h100` plans, for texts that are all of one length."""
    batch = ranks * tokens // TEXT // 2
    # Draws are rounded down.
    lengths = Lengths(mean=TEXT + 0.5, deviation=0, limit=TEXT)
    groups = (("texts", "", 2 * batch),)
    shape = Shape(groups=groups, query=lengths, document=lengths, num_negatives=0)
    kind = "zero3_offload" if "offload_optimizer" in options else f"zero{stage}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(MODELS[name]))
        config = TrainConfig(
            output_dir=folder / "run",
            num_steps=1,
            model=ModelConfig(
                path=str(folder),
                pooling="mean",
                lora=lora,
                gradient_checkpointing=options.get("gradient_checkpointing", False),
            ),
            data=DataConfig(path=write_shards(folder / "shards", shape), global_batch_size=batch),
            chunks=ChunkConfig(
                max_tokens=CHUNK, boundaries="host" if "boundaries_on_host" in options else "device"
            ),
        )
        return plan_run(
            config,
            resolve_ds_config(load_ds_config(DEEPSPEED / f"{kind}.json"), config, world_size=ranks),
            world_size=ranks,
            target=Target.gpu("h100"),
            build=False,
            speed=GPUS["h100"],
        )


def memory_rows() -> list[list[str]]:
    """One row for each run, on GPUs of 80 GB."""
    title = ["model", "trained", "GPUs", "stage", "tokens a GPU", "config", "schedule"]
    rows = [[*title, *PARTS, "peak", "free", "host"]]
    for name, adapted, ranks, stage, tokens, options in RUNS:
        plan = plan_of(name, LoraConfig() if adapted else None, ranks, stage, tokens, options)
        moment, size = peak(plan.terms)
        parts = [
            sum(t.size for t in plan.terms if t.part == part and moment in t.moments)
            for part in PARTS
        ]
        host = sum(host_memory(plan.shape, plan.workload, plan.schedule).values())
        cells = [name, "LoRA 16" if adapted else "all", str(ranks), str(stage), f"{tokens:,}"]
        cells += [", ".join(KEYS[key] for key in options) or "-", plan.schedule]
        cells += [gib(part) for part in parts]
        rows.append([*cells, gib(size), gib(plan.target.available - size), f"{host / GIB:.0f}"])
    return rows


def gib(size: float) -> str:
    """GiB with one decimal; `-` for nothing."""
    return f"{size / GIB:.1f}" if size else "-"


def activation_rows() -> list[list[str]]:
    """Saved bytes of a layer for one token, by kind of training."""
    adapters = {"all": None, "LoRA, no dropout": LoraConfig(dropout=0.0), "LoRA": LoraConfig()}
    rows = [["model", *(f"{kind}, KiB" for kind in adapters), "a chunk with LoRA, GiB"]]
    for name in MODELS:
        shapes = [shape_of(name, lora) for lora in adapters.values()]
        saved = [saved_by_layer(shape, 2) for shape in shapes]
        whole = saved[-1] * shapes[-1].num_layers * CHUNK
        rows.append([name, *(f"{size / 1024:.1f}" for size in saved), gib(whole)])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Rows as a table; the first is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def replace_between(page: str, begin: str, end: str, text: str) -> str:
    """The page with other text between two lines."""
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def written(page: str) -> str:
    """The page with new tables."""
    for name, rows in (("memory", memory_rows()), ("activations", activation_rows())):
        page = replace_between(page, BEGIN.format(name), END.format(name), markdown(rows))
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
