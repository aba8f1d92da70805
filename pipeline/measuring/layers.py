"""Measure layers and their parts on this rank's device, by shape and type of numbers.

    products, attention                  alone
    models of one and of five layers     in large and small chunks; known parts are subtracted

Every number is the least of several calls. On a CPU with one thread a rank these are CPU seconds:
other programs do not count, nor do waits for other ranks. On a GPU events enclose each call, so
that the time to start kernels does not count where earlier ones still run; work on several streams
is timed by the host, from one moment when the device is idle to the next.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model

from pipeline import comm
from pipeline.config import LoraConfig, ModelConfig
from pipeline.model.adapters import add_lora
from pipeline.model.architectures import FAMILIES
from pipeline.model.attention import PACKED, PackedRows, packed_attention
from pipeline.model.encoder import Encoder
from pipeline.planning.calibration import Attention, Both, DtypeSpeed, Line, Product
from pipeline.planning.measured import attention_seconds, layer_products
from pipeline.planning.shape import (
    NUMBER_BYTES,
    Dtype,
    ModelShape,
    saved_by_layer,
    saved_outside,
)

# One row's tokens in whole models: attention is subtracted, and should be small.
ROW = 32
_RANK = 16  # of adapters
_DROPOUT = 0.1
# Layers of the two models. A layer is a quarter of their difference, with a quarter of its noise.
_DEPTHS = (1, 5)
_HEAD = 64  # width of a head


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The sizes at which a kind of machine is measured.

    Attributes:
        dtypes: types of numbers.
        tokens, widths: the grid of linear layers.
        lengths, head_widths: the grid of attention.
        width: of the layers that are measured as a whole.
        chunks: (small, large) tokens of their chunks.
        engine: (layers, width, vocabulary) of many small weights, and of few large ones.
        loss: (pairs, width) of a small and of a large batch.
        search: queries, width, and blocks of documents in a small and in a large corpus.
        bytes: of tensors that are added up or copied.
        seconds: spent on each number, unless three calls take longer.
        model_seconds: the same for whole models, whose differences need more calls.
    """

    dtypes: tuple[Dtype, ...]
    tokens: tuple[int, ...]
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    head_widths: tuple[int, ...]
    width: int
    chunks: tuple[int, int]
    engine: tuple[tuple[int, int, int], tuple[int, int, int]]
    loss: tuple[tuple[int, int], tuple[int, int]]
    search: tuple[int, int, tuple[int, int]]
    bytes: int
    seconds: float
    model_seconds: float


# --- time ------------------------------------------------------------------------------------


class Timer:
    """Measure the seconds of calls on this rank's device.

    Args:
        device: where the calls compute.
        seconds: for each measurement, unless three calls take longer.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self._seconds = device, seconds
        # `process_time` adds up the seconds of all threads, so that it needs a single one.
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.process_time if alone else time.perf_counter

    def kernels(self, work: Callable[[], object]) -> float:
        """Return the least seconds of a call that uses the current stream alone."""
        if self.device.type != "cuda":
            return self.calls(work)
        work()  # the first call also allocates, and chooses algorithms
        first = self._enclosed(work, 1)[0]
        # Counted beforehand: the host queues calls much faster than the device finishes them, so
        # its clock would admit minutes of work. At least three: the first may meet cold caches.
        return min(self._enclosed(work, max(3, int(self._seconds / max(first, 1e-6)))))

    def _enclosed(self, work: Callable[[], object], count: int) -> list[float]:
        """Return the seconds of each of several calls that follow each other on the device."""
        torch.cuda.synchronize()
        pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        # Read only now, because each reading would wait and leave the device without work.
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) / 1e3 for start, end in pairs]

    def calls(self, work: Callable[[], object]) -> float:
        """Return the least seconds of a call until the device is idle."""
        work()
        times: list[float] = []
        stop = self._clock() + self._seconds
        while len(times) < 3 or self._clock() < stop:
            times.append(self.once(work))
        return min(times)

    def together(self, work: Callable[[], object], repeats: int) -> float:
        """Return the least seconds of a collective call, which all ranks make equally often."""
        work()
        times = []
        for _ in range(repeats):
            # Without it a late rank's delay would count as time of the call.
            comm.barrier()
            times.append(self.once(work))
        return min(times)

    def once(self, work: Callable[[], object]) -> float:
        """Return the seconds of one call until the device is idle, all of its streams."""
        self._wait()
        start = self._clock()
        work()
        self._wait()
        return self._clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


Points = Sequence[tuple[float, float]]  # (size, seconds) of a small and of a large size


def line_through(points: Points, times: int = 1) -> Line:
    """Return the line through two points, neither part below zero.

    Args:
        points: size and seconds, the smaller size first.
        times: calls that both sizes were divided into.
    """
    (few, short), (many, long) = points
    # Noise can make the larger size the faster one: then all of its seconds count by size.
    each = max(0.0, (long - short) / (many - few)) or long / many
    return Line(fixed=max(0.0, short - few * each) / times, each=each)


# --- one type of numbers ---------------------------------------------------------------------


def measure_dtype(dtype: Dtype, timer: Timer, sizes: Sizes) -> DtypeSpeed:
    """Measure layers and their parts in one type of numbers."""
    products = [
        _product(timer, dtype, tokens, inputs, outputs)
        for tokens in sizes.tokens
        for inputs in sizes.widths
        for outputs in sizes.widths
    ]
    attention, dropped = (
        [
            _attention(timer, dtype, length, width, dropout)
            for length in sizes.lengths
            for width in sizes.head_widths
        ]
        for dropout in (0.0, _DROPOUT)
    )
    models = _Models(timer, dtype, sizes, products, attention)
    rest = {norm: models.rest(norm) for norm in ("rms", "layer")}
    return DtypeSpeed(
        products=products,
        attention=attention,
        dropped_attention=dropped,
        rest={norm: found[0] for norm, found in rest.items()},
        outside=rest["rms"][1],
        adapters=models.adapters(rest["rms"][0]),
        dropout=_both([_dropout(timer, dtype, size, sizes.width) for size in sizes.chunks]),
    )


def _product(timer: Timer, dtype: Dtype, tokens: int, inputs: int, outputs: int) -> Product:
    # Tensors as autograd has them: a weight is (outputs, inputs), and transposed where it says.
    kind = {"dtype": getattr(torch, dtype), "device": timer.device}
    x, w = torch.randn(tokens, inputs, **kind), torch.randn(outputs, inputs, **kind)
    y = torch.randn(tokens, outputs, **kind)
    return Product(
        tokens=tokens,
        inputs=inputs,
        outputs=outputs,
        forward=timer.kernels(lambda: torch.nn.functional.linear(x, w)),
        by_input=timer.kernels(lambda: y @ w),
        by_weight=timer.kernels(lambda: y.T @ x),
    )


def _attention(timer: Timer, dtype: Dtype, length: int, width: int, dropout: float) -> Attention:
    # Several rows and heads, so that short rows keep the device busy too.
    heads, num_rows = 4, max(1, 1024 // length)
    rows = PackedRows.of(torch.full((num_rows,), length), causal=False, device=timer.device)
    shape = (1, heads, num_rows * length, width)
    q, k, v = (
        torch.randn(shape, dtype=getattr(torch, dtype), device=timer.device).requires_grad_()
        for _ in range(3)
    )

    def attend() -> torch.Tensor:
        return packed_attention(None, q, k, v, None, rows=rows, dropout=dropout)[0]

    forward, backward = _forward_backward(timer, attend, [q, k, v])
    share = 1 / (heads * num_rows)
    return Attention(
        length=length, head_width=width, forward=forward * share, backward=backward * share
    )


def _dropout(
    timer: Timer, dtype: Dtype, tokens: int, width: int
) -> tuple[float, tuple[float, float]]:
    """Return the numbers of a dropout, and the seconds of its forward and its backward."""
    kind: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": timer.device}
    x = torch.randn(tokens, width, **kind).requires_grad_()
    drop = functools.partial(torch.nn.functional.dropout, x, _DROPOUT)
    return float(x.numel()), _forward_backward(timer, drop, [x])


def _forward_backward(
    timer: Timer, forward: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """Return the seconds of a forward without graph, and of a backward to these tensors."""
    with torch.no_grad():
        # Alone, because autograd runs a forward with every backward; it is subtracted below.
        first = timer.kernels(forward)
    gradient = torch.ones_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), inputs, gradient)

    # Noise may make both the faster; speeds are FLOPs over seconds, which must not be 0.
    return first, max(1e-9, timer.kernels(both) - first)


class _Models:
    """Measure whole models, and subtract the parts that are known already.

    Args:
        timer: of this rank.
        dtype: of the models.
        sizes: of the models and their chunks.
        products, attention: the known parts.
    """

    def __init__(
        self,
        timer: Timer,
        dtype: Dtype,
        sizes: Sizes,
        products: list[Product],
        attention: list[Attention],
    ) -> None:
        self._timer = Timer(timer.device, sizes.model_seconds)
        self._dtype, self._sizes = dtype, sizes
        self._products, self._attention = products, attention

    def rest(self, norm: str) -> tuple[Both, Both]:
        """Return what is left of a layer with this norm, and of a chunk outside of layers."""
        layers, outsides, width = [], [], NUMBER_BYTES[self._dtype]
        for tokens in self._sizes.chunks:
            shape, layer, outside = self._layer(norm, tokens, lora=None)
            known = self._known(shape, tokens)
            layers.append((saved_by_layer(shape, width) * tokens, _less(layer, known)))
            outsides.append((saved_outside(shape, width) * tokens, outside))
        return _both(layers), _both(outsides)

    def adapters(self, rest: Both) -> Both:
        """Return what is left of one linear layer's adapter, given the rest of a plain layer."""
        found = []
        for tokens in self._sizes.chunks:
            # Dropout has a constant of its own.
            lora = LoraConfig(rank=_RANK, dropout=0.0)
            shape, layer, _ = self._layer("rms", tokens, lora=lora)
            assert shape.adapters is not None
            known = self._known(shape, tokens)
            plain = dataclasses.replace(shape, adapters=None)
            size = saved_by_layer(plain, NUMBER_BYTES[self._dtype]) * tokens
            known = (known[0] + rest.forward.at(size), known[1] + rest.backward.at(size))
            linears = shape.adapters.linears
            numbers = tokens * sum(linear.inputs + linear.outputs for linear in linears)
            found.append((float(numbers), _less(layer, known)))
        return _both(found, times=len(linears))

    def _known(self, shape: ModelShape, tokens: int) -> tuple[float, float]:
        """Return the seconds of a layer's products and attention: forward and backward."""
        products = layer_products(shape, tokens, self._products)
        lengths = torch.full((tokens // ROW,), ROW).numpy()
        rows = attention_seconds(self._attention, lengths, shape.architecture.head_width)
        heads = shape.architecture.num_heads
        return products[0] + heads * rows[0], products[1] + heads * rows[1]

    def _layer(
        self, norm: str, tokens: int, *, lora: LoraConfig | None
    ) -> tuple[ModelShape, tuple[float, float], tuple[float, float]]:
        """Return forward and backward of a layer, and of everything else, from two depths."""
        times = []
        for num_layers in _DEPTHS:
            # A small vocabulary: the table's gradient has a constant of its own.
            config = ModelConfig(path="reference", dtype=self._dtype, lora=lora)
            encoder = reference(norm, num_layers, self._sizes.width, 512, config)
            encoder = encoder.to(self._timer.device).train()
            lengths = torch.full((tokens // ROW,), ROW)
            ids = torch.arange(tokens, device=self._timer.device) % 512
            weights = [p for p in encoder.parameters() if p.requires_grad]
            forward = functools.partial(encoder, ids, lengths)
            times.append(_forward_backward(self._timer, forward, weights))
        shallow, deep = times
        few, many = _DEPTHS
        # Two depths differ in layers only, so the difference leaves out table, norm and pooling.
        layer = ((deep[0] - shallow[0]) / (many - few), (deep[1] - shallow[1]) / (many - few))
        inside = (few * layer[0], few * layer[1])
        return ModelShape.of(encoder, config), layer, _less(shallow, inside)


def _less(whole: tuple[float, float], part: tuple[float, float]) -> tuple[float, float]:
    """Subtract seconds of forward and backward; noise makes none negative."""
    return max(0.0, whole[0] - part[0]), max(0.0, whole[1] - part[1])


def _both(points: list[tuple[float, tuple[float, float]]], times: int = 1) -> Both:
    forward, backward = ([(size, found[i]) for size, found in points] for i in (0, 1))
    return Both(forward=line_through(forward, times), backward=line_through(backward, times))


def reference(
    norm: str, num_layers: int, width: int, vocabulary: int, config: ModelConfig
) -> Encoder:
    """Build a random encoder with RMS norms (Qwen2) or layer norms (BERT)."""
    heads = max(1, width // _HEAD)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "use_cache": False,
    }
    # Plain layers: nothing is dropped (dropout has a constant of its own), and no heads are shared.
    hf_config: Any = Qwen2Config(**sizes, num_key_value_heads=heads, is_causal=False)
    if norm == "layer":
        hf_config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    hf_config._attn_implementation = PACKED
    family = FAMILIES[hf_config.model_type]
    model_class = BertModel if norm == "layer" else Qwen2Model
    backbone: Any = model_class(hf_config, **family.arguments).to(getattr(torch, config.dtype))
    if config.lora is not None:
        backbone = add_lora(backbone, config.lora)
    return Encoder(backbone, family, config)
