"""Predict the seconds of a step from a calibration, without torch.

A step is the sum of its pieces, each from the constants measured with as many ranks on a host:

    products    2 tokens inputs outputs / FLOP/s of that shape: forward, and both gradients
    attention   row by row: FLOP/s at its length and head width
    rest        of a layer, a chunk, an adapter or a dropout: a fixed time, and a time for each byte
                or number
    sums        gradients of weights added up over chunks, and the token table's
    ranks       gather, reduction and update by DeepSpeed: a time a tensor, and a time a number

FLOP/s between measured shapes are interpolated in logarithms; outside of them the nearest counts.
Speeds and not seconds, which outside of the grid must grow with the work.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.data.batch import IntArray
from pipeline.errors import UserError
from pipeline.planning.calibration import (
    Attention,
    Both,
    Calibration,
    Constants,
    DtypeSpeed,
    EngineSpeed,
    Line,
    Product,
)
from pipeline.planning.memory import Schedule
from pipeline.planning.shape import (
    NUMBER_BYTES,
    Dtype,
    ModelShape,
    saved_by_layer,
    saved_outside,
)
from pipeline.planning.speed import (
    LINK_USE,
    Seconds,
    StepWork,
    exposed,
    forwards_of,
    offload_seconds,
)

# Collective calls in which the ranks agree: after either pass, and at the end of a step.
_AGREEMENTS = 3


def measured_seconds(
    shape: ModelShape, work: StepWork, schedule: Schedule, machine: Calibration
) -> tuple[Seconds, ...]:
    """Predict the consecutive parts of one step.

    Raises:
        UserError: several ranks share a machine, but one alone was measured; or another type of
            numbers.
    """
    workload, on_host = work.workload, work.workload.ranks_on_host
    constants = machine.of(on_host)
    _speed_of(machine, constants, workload.dtype)  # refuses a type that was not measured
    # One rank alone shares no memory bandwidth and exchanges nothing: its constants say too little.
    if on_host > 1 and constants.ranks == 1:
        raise UserError(
            f"calibration of 1 rank on {machine.device}, but {on_host} share a machine",
            fix=f"diffembed plan calibrate --ranks {on_host}",
        )
    compute = _compute(shape, work, schedule, constants, overlaps=machine.on_gpu)
    parts = [Seconds("compute", compute, "products, attention and the rest of all layers")]
    # On a CPU the same cores compute and exchange, so that nothing is hidden.
    parts += _exchanges(shape, work, schedule, constants, compute if machine.on_gpu else 0.0)
    if machine.on_gpu:
        host = offload_seconds(shape, work, schedule, compute, constants.host)
        parts.append(Seconds("host", *host))
    if work.loss is not None:
        seconds = constants.loss.at(work.loss.matmul_flops)
        seconds += _between_hosts(work.loss.received_bytes, work)
        parts.append(Seconds("loss", seconds, "a call, and its products"))
    # An optimizer on the host of a GPU is in `offload_seconds`; a CPU's is on the host anyway.
    if not (workload.offload_optimizer and machine.on_gpu):
        update = _engine(constants, workload.stage).update
        share = shape.trainable / workload.world_size
        seconds = update.at(share, num_tensors(shape, trained=True))
        parts.append(Seconds("update", seconds, "clip and AdamW: a tensor, and T / N numbers"))
    agreements = _AGREEMENTS * constants.agreement
    parts.append(Seconds("agreement", agreements, "ranks agree to continue"))
    return tuple(part for part in parts if part.seconds)


def _engine(constants: Constants, stage: int) -> EngineSpeed:
    # Stage 1 reduces and updates as stage 2 does.
    return constants.engine[str(max(stage, 2))]


def _compute(
    shape: ModelShape, work: StepWork, schedule: Schedule, constants: Constants, *, overlaps: bool
) -> float:
    """Return the seconds of all passes over this rank's chunks."""
    workload, forwards = work.workload, forwards_of(work, schedule)
    speed, width, total = constants.dtypes[workload.dtype], workload.width, 0.0
    for lengths in work.chunks:
        forward, backward = _layer(shape, lengths, speed, width, work.causal, overlaps=overlaps)
        size = saved_outside(shape, width) * float(lengths.sum())
        outside = [speed.outside.forward.at(size), speed.outside.backward.at(size)]
        total += forwards * (shape.num_layers * forward + outside[0])
        total += shape.num_layers * backward + outside[1]
    # Read the sum, read the gradient, write the sum: all in fp32, or from a gradient in 16 bits.
    bytes_of_sum = 3 * 4 if width == 4 else 4 + 2 + 4
    num_chunks = len(work.chunks)
    # The first chunk's gradient becomes the sum.
    total += (num_chunks - 1) * shape.trainable * bytes_of_sum * constants.add
    if shape.outer_trained:
        # Every backward makes a gradient of the whole table, for however few tokens.
        architecture = shape.architecture
        table = architecture.vocab_size * architecture.hidden_size * width
        total += num_chunks * table * constants.table
    return total


def forward_seconds(
    shape: ModelShape, lengths: IntArray, machine: Calibration, *, dtype: Dtype, causal: bool
) -> float:
    """Predict one forward of a chunk without a backward, on one rank with all weights.

    Raises:
        UserError: the calibration lacks this type of numbers.
    """
    speed, width = _speed_of(machine, machine.of(1), dtype), NUMBER_BYTES[dtype]
    # Nothing is dropped outside of training.
    architecture = dataclasses.replace(shape.architecture, masks=0, attention_dropout=False)
    adapters = shape.adapters and dataclasses.replace(shape.adapters, dropout=0.0)
    shape = dataclasses.replace(shape, architecture=architecture, adapters=adapters)
    forward, _ = _layer(shape, lengths, speed, width, causal, overlaps=machine.on_gpu)
    outside = speed.outside.forward.at(saved_outside(shape, width) * float(lengths.sum()))
    return shape.num_layers * forward + outside


def _speed_of(machine: Calibration, constants: Constants, dtype: Dtype) -> DtypeSpeed:
    if dtype not in constants.dtypes:
        raise UserError(
            f"calibration of {machine.device}: nothing in {dtype}",
            allowed=", ".join(constants.dtypes),
        )
    return constants.dtypes[dtype]


def _layer(
    shape: ModelShape,
    lengths: IntArray,
    speed: DtypeSpeed,
    width: int,
    causal: bool,
    *,
    overlaps: bool,
) -> tuple[float, float]:
    """Return the seconds of one layer's forward and backward for a chunk."""
    known = layer_products(shape, int(lengths.sum()), speed.products)
    dropped = shape.architecture.attention_dropout
    measured = speed.dropped_attention if dropped else speed.attention
    rows = attention_seconds(measured, lengths, shape.architecture.head_width)
    # Measured without a mask: a causal one leaves out half of the scores.
    heads = shape.architecture.num_heads * (0.5 if causal else 1.0)
    growing = [known[0] + heads * rows[0], known[1] + heads * rows[1]]
    fixed = [0.0, 0.0]
    for both, size, times in _rest(shape, lengths, speed, width):
        for index, line in enumerate((both.forward, both.backward)):
            fixed[index] += times * line.fixed
            growing[index] += size * line.each
    if overlaps:
        # The host starts kernels while earlier ones run: the slower of the two decides.
        return max(fixed[0], growing[0]), max(fixed[1], growing[1])
    return fixed[0] + growing[0], fixed[1] + growing[1]


def _rest(
    shape: ModelShape, lengths: IntArray, speed: DtypeSpeed, width: int
) -> list[tuple[Both, float, int]]:
    """Return what a layer does besides products and attention: speed, size, number of calls."""
    tokens, block = float(lengths.sum()), shape.architecture.block
    norm = "layer" if block is not None and block.norm == "layer" else "rms"
    # `rest` was measured by the bytes that a layer without adapters saves.
    own = dataclasses.replace(shape, adapters=None)
    rest = [(speed.rest[norm], saved_by_layer(own, width) * tokens, 1)]
    if masks := shape.architecture.masks:
        rest.append((speed.dropout, masks * tokens * shape.hidden_size, masks))
    if shape.adapters is not None:
        linears = shape.adapters.linears
        numbers = tokens * sum(linear.inputs + linear.outputs for linear in linears)
        rest.append((speed.adapters, numbers, len(linears)))
        if shape.adapters.dropout:
            dropped = tokens * sum(linear.inputs for linear in linears)
            rest.append((speed.dropout, dropped, len(linears)))
    return rest


def layer_products(
    shape: ModelShape, tokens: int, products: Sequence[Product]
) -> tuple[float, float]:
    """Return the seconds of a layer's linear layers: forward and backward."""
    forward = backward = 0.0
    adapters = shape.adapters
    sizes = [(each.inputs, each.outputs, adapters is None) for each in shape.architecture.linears]
    if adapters is not None:
        for each in adapters.linears:  # A, then B
            sizes += [(each.inputs, adapters.rank, True), (adapters.rank, each.outputs, True)]
    for inputs, outputs, trained in sizes:
        seconds = _product(products, (tokens, inputs, outputs))
        forward += seconds[0]
        # The gradient by the input always, by the weight only where it is trained.
        backward += seconds[1] + trained * seconds[2]
    return forward, backward


def _product(products: Sequence[Product], at: tuple[int, int, int]) -> tuple[float, float, float]:
    flops = 2.0 * math.prod(at)

    def seconds(part: str) -> float:
        table: dict[tuple[int, ...], float] = {
            (p.tokens, p.inputs, p.outputs): p.flops / getattr(p, part) for p in products
        }
        return flops / interpolate(table, at)

    return seconds("forward"), seconds("by_input"), seconds("by_weight")


def attention_seconds(
    measured: Sequence[Attention], lengths: IntArray, head_width: int
) -> tuple[float, float]:
    """Return the seconds of attention in all rows, of one head: forward and backward."""

    def seconds(part: str) -> float:
        table: dict[tuple[int, ...], float] = {
            (row.length, row.head_width): row.flops / getattr(row, part) for row in measured
        }
        total = 0.0
        for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
            flops = 4.0 * float(length) ** 2 * head_width
            total += int(count) * flops / interpolate(table, (int(length), head_width))
        return total

    return seconds("forward"), seconds("backward")


def interpolate(table: Mapping[tuple[int, ...], float], at: tuple[int, ...]) -> float:
    """Interpolate between the points of a full grid, in logarithms of axes and values.

    Multilinear: of the 2^n corners around `at`, each counts by its closeness.
    """
    around = []
    for axis, value in enumerate(at):
        points = sorted({key[axis] for key in table})
        value = min(max(value, points[0]), points[-1])
        low = max(point for point in points if point <= value)
        high = min(point for point in points if point >= value)
        # On a point of the grid both corners are that point, and the second has no weight.
        share = math.log(value / low) / math.log(high / low) if high > low else 0.0
        around.append(((low, 1 - share), (high, share)))
    total = 0.0
    for corner in itertools.product(*around):
        weight = math.prod(share for _, share in corner)
        if weight:
            total += weight * math.log(table[tuple(point for point, _ in corner)])
    return math.exp(total)


def _exchanges(
    shape: ModelShape, work: StepWork, schedule: Schedule, constants: Constants, compute: float
) -> list[Seconds]:
    """Return the parts gather and reduction; `compute` is the time that may hide them."""
    workload, sweep = work.workload, schedule == "sweep"
    engine, layers, parts = _engine(constants, workload.stage), shape.num_layers, []
    if workload.stage == 3:
        tensors = num_tensors(shape, trained=False)
        whole = _over_ranks(engine.gather, shape.parameters, tensors, work, constants)
        source = "ZeRO-3's weights, once"
        if sweep:
            # All but the weights outside of the layers, twice.
            inside = whole * (1 - shape.outer_parameters / shape.parameters)
            whole = whole - inside + exposed(2 * inside, compute, 2 * layers)
            source = "ZeRO-3's weights, twice; next layer while one computes"
        parts.append(Seconds("gather", whole, source))
    tensors = num_tensors(shape, trained=True)
    reduced = _over_ranks(engine.reduce, shape.trainable, tensors, work, constants)
    source = "after the last backward"
    if sweep:
        inside = reduced * (1 - shape.outer_trained / shape.trainable)
        # Only the backward sweep has reductions to hide: at least half of the compute.
        reduced = reduced - inside + exposed(inside, compute / 2, layers)
        source = "one layer while the next computes"
    parts.append(Seconds("reduce", reduced, source))
    return parts


def _over_ranks(
    line: Line, numbers: float, tensors: int, work: StepWork, constants: Constants
) -> float:
    """Return the seconds to gather or reduce, on one machine or between several."""
    workload, on_host = work.workload, work.workload.ranks_on_host
    # Rings: a rank receives all but its own share.
    received = (on_host - 1) / on_host
    measured = (constants.ranks - 1) / constants.ranks
    scale = received / measured if measured else 1.0
    # `each` is of a number in fp32, in which the engine is measured.
    inside = line.at(numbers * workload.width / 4 * scale, tensors)
    # A ring over hosts runs at the pace of its slowest link.
    return max(inside, _between_hosts(numbers * workload.width, work))


def _between_hosts(size: float, work: StepWork) -> float:
    hosts = work.workload.num_hosts
    return size * (hosts - 1) / hosts / work.network / LINK_USE


def num_tensors(shape: ModelShape, *, trained: bool) -> int:
    """Return the number of weight tensors, or of the trained ones."""
    architecture, adapters = shape.architecture, shape.adapters
    of_adapters = 2 * len(adapters.linears) * shape.num_layers if adapters else 0
    if trained and adapters:
        return of_adapters
    block = architecture.block
    linears = sum(1 + linear.bias for linear in architecture.linears)
    # Weights and biases of norms, also by head; then tables, and norms outside of the layers.
    norms = block.num_norms * block.norm_biases + 2 * (block.head_norms != "none") if block else 2
    outer = 1 + len(block.tables) + block.outer_norms * block.norm_biases if block else 2
    return of_adapters + shape.num_layers * (linears + norms) + outer
