"""Tokens per second of encoding with a 7B model, as `diffembed encode` runs it."""

from __future__ import annotations

import numpy as np

from pipeline.config import Template
from pipeline.model.load_export import LoadedExport
from pipeline.model_limits import ModelLimits
from tests.gpu import bench_gpu
from tests.gpu.contact import Place, Report
from tests.gpu.part_speed import make_setting


def run(place: Place, report: Report) -> None:
    """Encode texts of one length, and of lengths as they come."""
    setting = make_setting(place)
    encoder = bench_gpu.build(setting, lora=False, checkpointing=False)
    model = LoadedExport(
        encoder=encoder,
        tokenizer=None,
        template=Template(),
        similarity="cosine",
        max_length=setting.lengths[-1],
        num_dimensions=encoder.num_dimensions,
        max_tokens=setting.chunk_tokens,
        limits=ModelLimits(path="random weights"),
    )
    rng = np.random.default_rng(0)
    length = setting.lengths[0]
    count = max(4, 4 * setting.step_tokens // length)
    cases = {
        f"{count} texts of {length} tokens": np.full(count, length),
        f"{count} texts of 8 to {2 * length} tokens": rng.integers(8, 2 * length, size=count),
    }
    linear, attention = bench_gpu.forward_flops(setting.shape, length)
    for name, lengths in cases.items():
        ids = [rng.integers(5, setting.shape["vocab_size"], size=n).tolist() for n in lengths]
        model.encode_tokens(ids[:2], [0] * 2)
        with place.measured() as cost:
            vectors = model.encode_tokens(ids, [0] * len(ids))
        rate = int(lengths.sum()) / cost.seconds
        of_peak = rate * (linear + attention) / setting.peak
        good = bool(np.isfinite(vectors).all())
        report(
            name,
            f"{rate:,.0f} tokens/s, {of_peak:.1%} of the peak, {cost.gib:.1f} GiB extra",
            "finite vectors",
            good,
            tokens_per_second=rate,
            of_peak=of_peak,
        )
