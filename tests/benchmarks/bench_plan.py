"""Seconds and bytes of a step as predicted from a calibration, and as observed.

python -m tests.benchmarks.bench_plan [CALIBRATION]

Calibrates this machine, unless a file is given, and trains five different configs of MiniLM on a
CPU. With one thread a rank all seconds are CPU seconds of rank 0, predicted and observed, so that
other programs do not count. Bytes that layers save for their backward: `test_saved_bytes.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace

# Before torch starts its threads, here and in every rank.
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")

from pipeline import comm, train
from pipeline.measuring.calibrate import calibrate
from pipeline.planning.calibration import FOLDER_VARIABLE, default_path, load, save
from pipeline.planning.described_data import Lengths, Shape, write_shards
from pipeline.tokenizer import load_tokenizer, tokenizer_fingerprint
from pipeline.training import trainer
from tests.benchmarks.bench_support import minilm_path
from tests.support import launch_ranks

STEPS, WARM_UP = 7, 3
SHORT, LONG = (12, 48), (24, 360)  # mean tokens of queries and documents
LORA = ("model.lora.rank=16", "model.lora.dropout=0.0", "model.lora.targets=all-linear")
# Name: ranks, ZeRO stage, mean tokens, pairs, changes.
CASES: dict[str, tuple[int, int, tuple[int, int], int, tuple[str, ...]]] = {
    "all weights, cache, short": (1, 1, SHORT, 12, ("schedule=cache",)),
    "all weights, sweep, long": (1, 3, LONG, 2, ("schedule=sweep",)),
    "LoRA, cache, long": (1, 1, LONG, 2, ("schedule=cache", *LORA)),
    "all weights, cache, long": (2, 3, LONG, 4, ("schedule=cache",)),
    "LoRA, sweep, short": (2, 3, SHORT, 24, ("schedule=sweep", *LORA)),
}


def worker(arguments: list[str]) -> None:
    """Train as one rank, with steps in CPU seconds."""
    trainer.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    train.run(arguments)
    comm.leave(0, gracefully=True)


def make_config(folder: Path, lengths: tuple[int, int], pairs: int) -> Path:
    """Write shards of random lengths, and a config that trains MiniLM on them."""
    query, document = (Lengths(mean=mean, deviation=mean / 2, limit=480) for mean in lengths)
    shape = Shape(
        groups=(("described", "", 4 * pairs),), query=query, document=document, num_negatives=1
    )
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(minilm_path())))
    shards = write_shards(folder / "shards", shape, tokenizer=fingerprint)
    config = folder / "train.yaml"
    config.write_text(
        f"output_dir: {folder / 'run'}\nnum_steps: {STEPS}\n"
        f"model: {{path: {minilm_path()}, dtype: float32}}\n"
        f"data: {{path: {shards}, global_batch_size: {pairs}, num_hard_negatives: 1}}\n"
        "chunks: {max_tokens: 1024, keep_graphs: 0}\ncheckpoint: {every: 1000}\n"
    )
    return config


def measure(folder: Path, name: str) -> tuple[float, float]:
    """Train one case; return the predicted and the observed seconds of a step."""
    ranks, stage, lengths, pairs, changes = CASES[name]
    config = make_config(folder, lengths, pairs)
    zero = f"ds_configs/zero{stage}.json"
    launch_ranks(*(ranks, Path(__file__), str(config), "--deepspeed", zero, *changes), seconds=1800)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    timed = lines[WARM_UP:]
    return timed[0]["predicted_seconds"], median(line["seconds"] for line in timed)


def main() -> None:
    """Calibrate, run all cases, and print the table."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        found = load(Path(sys.argv[1])) if sys.argv[1:] else calibrate(2)
        os.environ[FOLDER_VARIABLE] = str(folder)
        save(found, default_path(found.device))
        print("| config | ranks | ZeRO | predicted | observed | ratio |\n|---|---|---|---|---|---|")
        for number, case in enumerate(CASES):
            (folder / str(number)).mkdir()
            predicted, observed = measure(folder / str(number), case)
            cells = (f"{predicted:.3f} s", f"{observed:.3f} s", f"{predicted / observed:.2f}")
            print("|", " | ".join((case, *map(str, CASES[case][:2]), *cells)), "|", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].endswith(".yaml"):
        worker(sys.argv[1:])
    else:
        main()
