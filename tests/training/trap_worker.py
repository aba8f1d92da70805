"""One rank of the trap tests: the trainer's step on engines where DeepSpeed has a trap.

Prints one JSON line per case on rank 0.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from checkpoint_worker import WIDTH, TwoGroups
from parity_worker import SEED, TEMPERATURE, make_batch, reference_gradients

from pipeline import comm
from pipeline.config import DataConfig, LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.launch import discover_world
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import StepGivenUpError, build_optimizer
from pipeline.training.zero import ZeroEngine
from tests.benchmarks.bench_support import tiny_qwen2
from tests.support import PATIENCE
from tests.traffic import Traffic
from tests.training.exactness import whole_state

CPU = torch.device("cpu")
NUM_CHUNKS = 128
# Well above rounding, or AdamW would amplify it where gradients are nearly zero.
EPS = 1e-3
LR = 1e-2
# DeepSpeed keeps small parameters whole by default, which would hide ZeRO-3's faults.
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ZEROS = {
    "3": ZERO3,
    "3 hpz": {**ZERO3, "zero_hpz_partition_size": 2},
    **{f"{stage} offload": {**ZERO3, "stage": stage, **OFFLOAD} for stage in (1, 2, 3)},
}


def make_config(
    path: str, *, schedule: str = "cache", dtype: str = "float32", clip: float = 0.0
) -> TrainConfig:
    return TrainConfig(
        output_dir=Path("unused"),
        seed=SEED,
        schedule=schedule,
        num_steps=10,
        model=ModelConfig(path=path, dtype=dtype),
        data=DataConfig(path=Path("unused")),
        loss=LossConfig(temperature=TEMPERATURE),
        optimizer=OptimizerConfig(eps=EPS, max_grad_norm=clip),
    )


def make_engine(
    model: torch.nn.Module,
    zero: dict[str, Any],
    config: TrainConfig,
    kind: type[ZeroEngine] = ZeroEngine,
) -> ZeroEngine:
    tree = {"zero_optimization": copy.deepcopy(zero)}
    ds_config = resolve_ds_config(tree, config, world_size=comm.world_size())
    return kind(model, build_optimizer(model, config.optimizer), ds_config)


@functools.cache  # the same for every stage and schedule
def plain_updates(
    path: str, clip: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Run three steps in plain torch; gradients of the third before clipping, and weights after it.

    Args:
        path: of the model.
        clip: the norm at which gradients are clipped, 0 for none.
    """
    config = make_config(path, clip=clip)
    oracle = build_encoder(config.model).train()
    batches = [make_batch(rank, 2, [3, 5]) for rank in range(2)]
    optimizer = build_optimizer(oracle, config.optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        _, wanted = reference_gradients(oracle, batches)
        for group in optimizer.param_groups:
            group["lr"] = LR
        if clip:
            torch.nn.utils.clip_grad_norm_(oracle.parameters(), clip)
        optimizer.step()
    return wanted, {name: weight.detach() for name, weight in oracle.named_parameters()}


def updates(
    path: str, zero: dict[str, Any], schedule: str, *, padded: bool = True, clip: float = 0.0
) -> dict[str, float]:
    """Run three steps, and the same in plain torch; 3 and 5 chunks.

    Gradients of the third step tell whether the updates reached every copy of the weights.

    Args:
        padded: give the rank with 3 chunks two dummies, as the loader does.
        clip: the norm at which gradients are clipped, 0 for none.
    """
    config = make_config(path, schedule=schedule, clip=clip)
    encoder = build_encoder(config.model).train()
    batch = make_batch(comm.rank(), 2, [3, 5])
    if not padded:
        batch = dataclasses.replace(batch, chunks=batch.chunks[: (3, 5)[comm.rank()]])
    engine = make_engine(encoder, zero, config)
    for step in range(3):
        accumulate_gradients(engine, batch, config, device=CPU)
        if step == 2:
            ours = {name: engine.full_gradient(name) for name in engine.parameter_names}
        norm = engine.step(LR)
    wanted, wanted_weights = plain_updates(path, clip)
    # The whole gradient as one vector: single parameters may have next to none.
    length = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    difference = torch.cat([(ours[name] - wanted[name]).flatten() for name in wanted]).norm()
    weights = {
        name: whole_state(engine, name)["weight"] - weight
        for name, weight in wanted_weights.items()
    }
    engine.close()
    return {
        "gradient_error": float(difference / length),
        "weight_error": max(float(error.abs().max()) for error in weights.values()),
        "norm_error": abs(norm / float(length) - 1),
        "norm": norm,
    }


def moments(stage: int) -> dict[str, Any]:
    """Compare the worst first moment after one update with (1 - beta1) times the gradient.

    Before it comes an update that is not finite, and must not count as one.
    """
    model = TwoGroups()
    config = make_config("unused")
    engine = make_engine(model, {**ZERO3, "stage": stage}, config)
    ids = torch.arange(8)
    with whole(engine), engine.accumulation():
        engine.backward((engine.embed(ids, torch.ones_like(ids)) * math.inf).sum())
    left_out = not math.isfinite(engine.step(LR)) and engine.optimizer_steps == 0
    for name, parameter in TwoGroups().named_parameters():
        state = whole_state(engine, name)  # as in a checkpoint
        left_out &= torch.equal(state["weight"], parameter.detach())
        left_out &= not (state["exp_avg"].any() or state["exp_avg_sq"].any())
    with whole(engine), engine.accumulation():
        engine.backward((engine.embed(ids, torch.ones_like(ids)) ** 3).sum())
    gradients = {name: engine.full_gradient(name) for name in engine.parameter_names}
    engine.step(LR)
    errors = []
    for name, gradient in gradients.items():
        moment = whole_state(engine, name)["exp_avg"]
        errors.append(float((moment - 0.1 * gradient).abs().max() / gradient.abs().max()))
    steps = engine.optimizer_steps
    engine.close()
    return {"error": max(errors), "left_out": left_out, "steps": steps}


def drift(stage: int) -> dict[str, float]:
    """Error of bfloat16 gradients summed over many chunks, ours and autograd's own.

    The reference adds the same bfloat16 gradients of single chunks, in fp64. A step that was given
    up comes before, and must leave nothing behind.
    """
    config = make_config("unused", dtype="bfloat16")
    engine = make_engine(TwoGroups().bfloat16(), {**ZERO3, "stage": stage}, config)
    with suppress(StepGivenUpError), whole(engine), engine.accumulation():
        engine.backward(_chunk_loss(engine.embed, 0, comm.rank()))
        raise StepGivenUpError
    engine.discard()
    with whole(engine), engine.accumulation():
        for chunk in range(NUM_CHUNKS):
            engine.backward(2 * _chunk_loss(engine.embed, chunk, comm.rank()))
    ours = {name: engine.full_gradient(name).double() for name in engine.parameter_names}
    engine.close()
    wanted, plain = summed_by_torch()
    errors: dict[str, list[float]] = {"ours": [], "autograd": []}
    for name, exact in wanted.items():
        for kind, gradient in (("ours", ours[name]), ("autograd", plain[name].double())):
            error = (gradient - exact).norm() / exact.norm()
            errors[kind].append(float(error))
    return {kind: max(values) for kind, values in errors.items()}


@functools.cache  # the same for every stage
def summed_by_torch() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sum bfloat16 gradients of all ranks' chunks, in fp64 and as autograd does."""
    plain, wanted = TwoGroups().bfloat16(), TwoGroups().double()
    for rank in range(2):
        for chunk in range(NUM_CHUNKS):
            _chunk_loss(plain, chunk, rank).backward()
            single = TwoGroups().bfloat16()
            _chunk_loss(single, chunk, rank).backward()
            for total, part in zip(wanted.parameters(), single.parameters(), strict=True):
                assert part.grad is not None
                total.grad = part.grad.double() + (0 if total.grad is None else total.grad)
    sums = []
    for model in (wanted, plain):
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        sums.append({name: grad for name, grad in found.items() if grad is not None})
        assert set(sums[-1]) == set(found)
    return sums[0], sums[1]


def _chunk_loss(embed: Any, chunk: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + chunk)
    ids = torch.randint(0, 50, (8,), generator=generator)
    target = torch.randn(8, WIDTH, generator=generator) + 1
    loss: torch.Tensor = ((embed(ids, torch.ones_like(ids)).float() - target) ** 2).mean()
    return loss / NUM_CHUNKS


def traffic(path: str, schedule: str, num_chunks: int) -> dict[str, float]:
    """Return traffic and peak of the third step, in units of the model and of a layer."""
    config = make_config(path, schedule=schedule)
    encoder = build_encoder(config.model).train()
    whole = sum(p.numel() for p in encoder.parameters())
    layer = sum(p.numel() for p in encoder.layers[0].parameters())
    batch = make_batch(comm.rank(), 2, [num_chunks, num_chunks])
    engine = make_engine(encoder, ZERO3, config)
    counted, live = Traffic(), _watch(encoder)
    for _ in range(3):
        counted.bytes.clear()
        live.clear()
        accumulate_gradients(engine, batch, config, device=CPU)
        moved: Counter[str] = Counter()
        for (_, kind), value in counted.bytes.items():
            moved[kind] += value
        engine.step(LR)
    engine.close()
    return {
        "gathered": moved["gathered"] / (4 * whole),
        "reduced": moved["reduced"] / (4 * whole),
        # In addition to the embedding and the final norm.
        "live_layers": (max(live) - (whole - len(encoder.layers) * layer)) / layer,
    }


def _watch(encoder: Encoder) -> list[int]:
    """Elements of gathered parameters, noted whenever a layer or the pooling has run."""
    live: list[int] = []

    def note(*_: Any) -> None:
        live.append(sum(p.numel() for p in encoder.parameters()))

    for layer in encoder.layers:
        layer.register_forward_hook(note)
    return live


def whole(engine: ZeroEngine) -> AbstractContextManager[None]:
    """Hold all parameters, as the schedule `cache` does."""
    return engine.hold(list(engine.encoder.parameters()))


class Measured(ZeroEngine):
    """Notes after each backward how many bytes of whole gradients this rank has."""

    peak = 0

    def backward(self, surrogate: torch.Tensor) -> None:
        super().backward(surrogate)
        found = [p.grad for p in self.encoder.parameters()] + [
            *self._reduction._sums._sums.values()
        ]
        # DeepSpeed's bucket, of a fixed size, is one storage.
        kept = {t.untyped_storage().data_ptr(): t.nbytes for t in found if t is not None}
        self.peak = max(self.peak, sum(kept.values()))


def gradients_held(path: str) -> dict[str, int]:
    """Return the peak bytes of whole gradients in a sweep over 2 and over 6 layers."""
    peaks = {}
    for layers in (2, 6):
        folder = Path(path, f"{layers}-layers")
        if comm.rank() == 0:
            tiny_qwen2(folder, hidden_size=32, num_layers=layers, vocab_size=500)
        comm.barrier()
        config = make_config(str(folder), schedule="sweep", dtype="bfloat16")
        encoder = build_encoder(config.model).train()
        layer = sum(p.numel() for p in encoder.layers[0].parameters())
        engine = make_engine(encoder, ZERO3, config, Measured)
        assert isinstance(engine, Measured)
        accumulate_gradients(engine, make_batch(comm.rank(), 2, [3, 5]), config, device=CPU)
        engine.close()
        peaks[f"{layers} layers"] = engine.peak
    return {**peaks, "one layer": 4 * layer}


def outside_of_hold(path: str) -> dict[str, Any]:
    """Use partitioned parameters that nothing has gathered; list hooks that are left."""
    config = make_config(path)
    encoder = build_encoder(config.model)
    engine = make_engine(encoder, ZERO3, config)
    hooks = [
        name
        for name, module in encoder.named_modules()
        if name and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    ]
    ids = torch.arange(8)
    error = ""
    try:
        engine.embed(ids, torch.tensor([8]))
    except RuntimeError as caught:
        error = str(caught)
    with whole(engine):
        shape = engine.embed(ids, torch.tensor([8])).shape[0]
    engine.close()
    return {"hooks": hooks, "error": error, "rows": shape}


def fail_in_accumulation() -> None:
    """Rank 1 fails while rank 0 is in another collective, as it is in the next chunk's gather."""
    engine = make_engine(TwoGroups(), ZERO3, make_config("unused"))
    ids = torch.arange(8)
    with whole(engine), engine.accumulation():
        engine.backward(engine.embed(ids, torch.ones_like(ids)).sum())
        if comm.rank() == 1:
            raise RuntimeError("rank 1 ran out of luck")
        comm.barrier()


def run_cases(mode: str, path: str) -> Iterator[dict[str, Any]]:
    """Named results of all cases of a mode."""
    schedules = ("cache", "sweep")
    if mode == "traffic":
        for schedule, chunks in itertools.product(schedules, (2, 5)):
            yield {"case": f"{schedule} {chunks}", **traffic(path, schedule, chunks)}
        return
    for stage in (1, 2, 3):
        yield {"case": f"moments {stage}", **moments(stage)}
        yield {"case": f"drift {stage}", **drift(stage)}
    for schedule in schedules:
        for name, zero in ZEROS.items():
            yield {"case": f"updates {name} {schedule}", **updates(path, zero, schedule)}
        result = updates(path, ZERO3, schedule, padded=False)
        yield {"case": f"updates 3 unpadded {schedule}", **result}
    for stage in (1, 2, 3):
        result = updates(path, {**ZERO3, "stage": stage}, "sweep", clip=1.0)
        yield {"case": f"updates {stage} clipped sweep", **result}
    yield {"case": "gradients held", **gradients_held(path)}
    yield {"case": "outside", **outside_of_hold(path)}


def main() -> None:
    torch.set_num_threads(1)
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    mode, path = sys.argv[1:]
    if mode == "fail":
        with _leaving_at_once():
            fail_in_accumulation()
    for result in run_cases(mode, path):
        if comm.rank() == 0:
            print(json.dumps(result), flush=True)
    comm.leave(0, gracefully=True)


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Handle an error as pipeline/train.py does."""
    try:
        yield
    except RuntimeError as error:
        print(error, flush=True)
        comm.leave(1, gracefully=False)


if __name__ == "__main__":
    main()
