"""Speed and memory of a 7B model's step, next to the planner's prediction."""

from __future__ import annotations

import dataclasses
import time

import torch

from tests.gpu import bench_gpu
from tests.gpu.bench_gpu import Cell, Setting
from tests.gpu.contact import Place, Report

# Dense bf16 TFLOP/s by name of the device.
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250}
HFU = 0.55


def run(place: Place, report: Report) -> None:
    """Measure cell after cell, most telling first, while there is time for the next."""
    setting = make_setting(place)
    names = bench_gpu.all_cells(setting)
    if place.tiny:
        names = names[:2] if place.kind == "pretended" else names[:6]
    slowest = 0.0
    skipped = []
    for name in names:
        if place.seconds_left < 2 * slowest + 5:
            skipped.append(name)
            continue
        began = time.monotonic()
        (cell,) = bench_gpu.run_cells(setting, [name])
        slowest = max(slowest, time.monotonic() - began)
        _report_cell(report, cell, setting, rehearsal=place.kind != "cuda")
    if skipped:
        report("not measured, for lack of time", ", ".join(skipped))


def make_setting(place: Place, *, step_tokens: int = 16384) -> Setting:
    """Return what is measured, on what."""
    peak = 1.0
    if place.kind == "cuda":
        device = torch.cuda.get_device_properties(0).name
        peak = next((value for name, value in PEAKS.items() if name in device), PEAKS["H100"])
    setting = bench_gpu.settings(
        tiny=place.tiny, peak_tflops=peak, device=place.device, repeats=1, step_tokens=step_tokens
    )
    if place.kind == "pretended":
        # In 16 bits, because these take the kernel's way.
        changes = {"dtype": "bfloat16", "made_on": torch.device("cpu")}
        setting = dataclasses.replace(setting, **changes, to_device=place.to_device)
    return setting


def _report_cell(report: Report, cell: Cell, setting: Setting, *, rehearsal: bool) -> None:
    name = f"{cell.train}, {cell.schedule}, texts of {cell.length:,} tokens"
    if not cell.tokens_per_second:
        report(name, f"out of memory; {cell.planned_gib:.1f} GiB extra planned")
        return
    measured = (
        f"{cell.tokens_per_second:,.0f} tokens/s, HFU {cell.hfu:.1%}, MFU {cell.mfu:.1%}, "
        f"extra memory {cell.extra_gib:.1f} GiB, planned {cell.planned_gib:.1f}"
    )
    if cell.factor:
        measured += f"; step / plain {cell.factor:.3f}, by FLOPs {cell.theory:.3f}"
    asked, ok = "", None
    # Only these compute hardly anything but linear layers.
    if cell.length == setting.lengths[0] and cell.schedule == "cache" and not rehearsal:
        asked, ok = f"HFU >= {HFU:.0%}", cell.hfu >= HFU
    values = {key: getattr(cell, key) for key in ("hfu", "mfu", "extra_gib", "planned_gib")}
    # A slow device is a finding, not a failure of the code.
    report(name, measured, asked, ok or None, tokens_per_second=cell.tokens_per_second, **values)
