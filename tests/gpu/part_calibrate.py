"""A calibration of this GPU, and the steps of a 7B model as it predicts them."""

from __future__ import annotations

import itertools

from pipeline import comm
from pipeline.launch import discover_world
from pipeline.loss.tiles import loss_cost
from pipeline.measuring.calibrate import SIZES, describe_machine, measure_constants
from pipeline.measuring.layers import Sizes, Timer
from pipeline.planning.calibration import Calibration
from pipeline.planning.measured import measured_seconds
from pipeline.planning.shape import ModelShape
from pipeline.planning.speed import DEFAULT_NETWORK, StepWork
from tests.gpu import bench_gpu
from tests.gpu.bench_gpu import Setting
from tests.gpu.contact import Place, Report
from tests.gpu.part_speed import make_setting

LIMIT = 0.15  # of the observed seconds
# For a rehearsal, and for tests.
TINY = Sizes(
    dtypes=("float32",),
    tokens=(16, 64),
    widths=(16, 64),
    lengths=(8, 32),
    head_widths=(32, 64),
    width=64,
    chunks=(32, 64),
    engine=((2, 16, 64), (1, 64, 512)),
    loss=((4, 16), (16, 32)),
    search=(4, 8, (1, 2)),
    bytes=2**16,
    seconds=1e-4,
    model_seconds=1e-3,
)


def run(place: Place, report: Report) -> None:
    """Measure the constants, then steps of one size after another."""
    comm.start(discover_world())
    with place.measured() as cost:
        sizes = TINY if place.tiny else SIZES[place.device.type]
        constants = measure_constants(sizes, Timer(place.device, sizes.seconds))
    report("diffembed plan calibrate, one rank", f"{cost.seconds:.0f} s", seconds=cost.seconds)
    machine = Calibration(**describe_machine(place.device), constants=[constants])
    setting = make_setting(place)
    cases = itertools.product(setting.lengths[:2], ("cache", "sweep"), (True, False))
    for length, schedule, lora in list(cases)[: 2 if place.tiny else None]:
        if place.seconds_left < 10:
            report("not measured, for lack of time", f"{schedule}, {length} tokens")
            continue
        predicted, observed = _step(setting, machine, schedule, length, lora=lora)
        ratio = predicted / observed
        report(
            f"{'LoRA' if lora else 'full'}, {schedule}, texts of {length:,} tokens: "
            "predicted / observed",
            f"{predicted:.2f} s / {observed:.2f} s = {ratio:.2f}",
            "" if place.tiny else f"within {LIMIT:.0%}",
            None if place.tiny else abs(ratio - 1) <= LIMIT,
            ratio=ratio,
        )
        place.release()


def _step(
    setting: Setting, machine: Calibration, schedule: str, length: int, *, lora: bool
) -> tuple[float, float]:
    """Return the predicted and the observed seconds of a step, without DeepSpeed's parts."""
    encoder = bench_gpu.build(setting, lora=lora, checkpointing=False)
    batch = bench_gpu.batch_of(setting, length, setting.step_tokens)
    observed, _ = bench_gpu.timed(
        lambda: bench_gpu.step(encoder, batch, schedule, setting.device), setting
    )
    work = StepWork(
        workload=bench_gpu.workload_of(setting, batch, checkpointing=False),
        chunks=tuple(chunk.lengths for chunk in batch.chunks),
        causal=False,
        kept=0.0,
        loss=loss_cost(
            num_queries=batch.num_queries,
            num_documents=batch.num_documents,
            width=encoder.num_dimensions,
            world_size=1,
            score_bytes=2**24,
        ),
        network=DEFAULT_NETWORK,
    )
    shape = ModelShape.of(encoder, encoder.config)
    parts = measured_seconds(shape, work, schedule, machine)  # type: ignore[arg-type]
    left_out = ("gather", "reduce", "update")
    return sum(part.seconds for part in parts if part.part not in left_out), observed
