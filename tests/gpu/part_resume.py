"""A run that is continued from its checkpoint, and a device whose memory ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from pipeline.config import TrainConfig, load_config
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.engine import ChunkOutOfMemoryError
from tests import forks
from tests.benchmarks.bench_support import (
    PlainEngine,
    draw_texts,
    gradient_error,
    load,
    make_batch,
    step_config,
    take_gradients,
    tiny_qwen2,
)
from tests.gpu.contact import Place, Report
from tests.training.tiny_recipe import make_recipe

# On a GPU, sums in any order make two runs differ in their last bits.
LOSS_LIMIT = 1e-3


def run(place: Place, report: Report) -> None:
    """Run out of memory first: it is over in seconds."""
    _recover_from_a_lack_of_memory(place, report)
    _resume(place, report)


def _resume(place: Place, report: Report) -> None:
    """Compare six steps at ZeRO-3 in bf16, with dropout, with three, a checkpoint, and three."""
    recipe = make_recipe(place.folder)
    assert load_config(TrainConfig, recipe).num_steps == 6
    ds_config = place.folder / "zero3.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    common = ["model.dtype=bfloat16", "optimizer.decay_steps=6", "log_every=1"]
    losses = {}
    for name, counts in (("whole", (6,)), ("resumed", (3, 6))):
        for count in counts:
            overrides = [*common, f"num_steps={count}", f"output_dir={place.folder / name}"]
            _train(recipe, ds_config, overrides, place)
        rows = (place.folder / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    pairs = list(zip(losses["whole"], losses["resumed"], strict=True))
    worst = max(abs(a / b - 1) for a, b in pairs)
    same = "bit-equal" if losses["whole"] == losses["resumed"] else f"{worst:.1e}"
    report(
        "losses of 6 steps, resumed after 3, ZeRO-3, bf16: difference",
        same,
        f"<= {LOSS_LIMIT:g}",
        len(pairs) == 6 and worst <= LOSS_LIMIT,
        worst=worst,
    )


def _train(recipe: Path, ds_config: Path, overrides: list[str], place: Place) -> None:
    words = ["pipeline/train.py", str(recipe), *overrides, "--deepspeed", str(ds_config)]
    out, err = place.folder / "train.out", place.folder / "train.err"
    if place.kind == "cuda":  # which a forked child could not use
        with out.open("w") as stdout, err.open("w") as stderr:
            code = subprocess.run(
                [sys.executable, *words],
                cwd=forks.ROOT,
                stdout=stdout,
                stderr=stderr,
                timeout=max(place.seconds_left, 1),
                check=False,
            ).returncode
    else:
        child = forks.Child(
            lambda: forks.run_program(words), folder=forks.ROOT, stdout=out, stderr=err
        )
        code = child.wait(max(place.seconds_left, 1)) or child.poll() or 0
    if code != 0:
        sys.stderr.write(out.read_text()[-2000:] + err.read_text()[-4000:])
        raise subprocess.CalledProcessError(code, words)


def _recover_from_a_lack_of_memory(place: Place, report: Report) -> None:
    """Let a large chunk run into the end of memory, and continue with smaller ones."""
    size, tokens = (64, 400) if place.tiny else (1024, 16384)
    folder = tiny_qwen2(place.folder / "wide", hidden_size=size, num_layers=4, vocab_size=500)
    encoder = place.to_device(load(folder), None if place.kind == "cpu" else torch.bfloat16)
    lengths = np.full(16, tokens // 16)
    texts = draw_texts(lengths, 500)
    large, small = (make_batch(texts, 8, max_tokens=most) for most in (tokens, tokens // 4))
    engine = PlainEngine(encoder)

    def gradients(batch: Any) -> Any:
        accumulate_gradients(engine, batch, step_config("cache"), device=place.device)
        return {name: g.float() for name, g in take_gradients(encoder).items()}

    wanted = gradients(small)
    with place.measured() as roomy:
        gradients(large)
    outcome = "no lack of memory"
    with _less_memory(place, roomy.gib * 0.6, tokens // 2, encoder):
        try:
            gradients(large)
        except ChunkOutOfMemoryError as error:
            outcome = str(error)
        ours = gradients(small)
    report(
        f"a chunk of {tokens:,} tokens with 0.6 of the memory it needs",
        outcome,
        "a chunk does not fit into memory",
        outcome == "a chunk does not fit into memory",
        needed_gib=roomy.gib,
    )
    limit = 1e-6 if place.kind == "cpu" else 2e-2
    report.most("gradients in smaller chunks afterwards", gradient_error(ours, wanted), limit)


@contextlib.contextmanager
def _less_memory(place: Place, gib: float, longest: int, encoder: Any) -> Iterator[None]:
    """Let torch's allocator take only so much more; on a CPU, let long chunks fail instead."""
    if place.kind == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = torch.cuda.memory_reserved() + gib * 2**30
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    forward = encoder.forward

    def refuse(input_ids: torch.Tensor, *rest: Any) -> Any:
        if len(input_ids) > longest:
            raise torch.OutOfMemoryError("a stand-in for a full device")
        return forward(input_ids, *rest)

    with mock.patch.object(encoder, "forward", refuse):
        yield
