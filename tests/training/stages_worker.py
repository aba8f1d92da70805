"""One rank of the published stages on a tiny model, each by the functions behind its command.

Started by test_stages.py through a launcher; the test reads the runs' metrics.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from pipeline import comm, train
from pipeline.config import TrainConfig, load_config
from pipeline.errors import Stopped
from pipeline.training.export_run import export_run

ZERO = "ds_configs/zero3.json"
LORA = "model.lora={rank: 4, dropout: 0.0}"
MNTP = ("objective={mntp: {}}", LORA, "data.block_length=24", "model.attention_dropout=0.1")
SIMCSE = ("model.attention_dropout=0.3", LORA)


def run(recipe: Path, name: str, *changes: str) -> None:
    """Train in the folder `name` next to the recipe."""
    train.run([str(recipe), "--deepspeed", ZERO, f"output_dir={recipe.parent / name}", *changes])


def export(recipe: Path, name: str, *changes: str, adapter_only: bool) -> Path:
    """Export a run by rank 0; all ranks wait for it."""
    folder = recipe.parent / name
    output = folder / ("adapter" if adapter_only else "merged")
    if comm.rank() == 0:
        config = load_config(TrainConfig, recipe, (f"output_dir={folder}", *changes))
        export_run(config, which="latest", output=output, adapter_only=adapter_only, check=False)
    comm.barrier()
    return output


def main() -> None:
    recipe = Path(sys.argv[1])
    torch.set_num_threads(1)
    run(recipe, "mntp", *MNTP)
    stopped, halves = recipe.parent / "stopped", recipe.parent / "halves"
    if comm.rank() == 0:
        stopped.mkdir()
        (stopped / "stop").touch()  # as `diffembed stop` does
    comm.barrier()
    try:
        run(recipe, "stopped", *MNTP)
    except Stopped:
        # This process keeps the stopped run to itself for as long as it lives.
        if comm.rank() == 0:
            shutil.copytree(stopped / "checkpoints", halves / "checkpoints")
            shutil.copy(stopped / "metrics.jsonl", halves)
        comm.barrier()
        run(recipe, "halves", *MNTP)
    adapter = export(recipe, "mntp", *MNTP, adapter_only=True)
    merged = export(recipe, "mntp", *MNTP, adapter_only=False)

    run(recipe, "simcse", *SIMCSE, f"model.path={merged}")
    run(recipe, "simcse on the adapter", *SIMCSE, f"model.adapter={adapter}")
    run(recipe, "simcse without mntp", *SIMCSE)
    second = export(recipe, "simcse", *SIMCSE, f"model.path={merged}", adapter_only=True)

    path = f"model.path={merged}"
    run(recipe, "supervised", path, f"model.adapter={second}", "model.adapter_use=continue")
    run(recipe, "supervised on the merged", path, f"model.adapter={second}", LORA)
    run(recipe, "supervised without simcse", path, LORA)
    comm.leave(0, gracefully=True)


if __name__ == "__main__":
    main()
