"""Count a model's weights, and the bytes that its layers save for the backward, without torch.

config.json --architecture.py--> widths and the kind of block
            --ModelShape--> parameters, parameters of a layer, saved bytes for one token

    one layer saves, for one token         RMS norm     (fp32 copy, normalised, its output)
    h width, i inner, q heads x width,     attention    query, key, value, output, one sum per head
    k key heads x width, w bytes           gated MLP    gate, its activation, up, their product
                                           adapters     rank-wide inputs; dropped inputs and masks

The table is exact to the byte for the layers of every family here;
`tests/planning/test_saved_bytes.py` compares it with what autograd keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.planning.architecture import BLOCKS, Architecture, Block, Linear, read_architecture

Dtype = Literal["float32", "bfloat16"]
# Bytes of a number (`w` in every formula of this package).
NUMBER_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
# Bytes of what norms, attention and pooling keep in fp32, whatever the model's type.
_FP32 = NUMBER_BYTES["float32"]
# Bytes of a token's int64 id: the embedding's backward adds each row's gradient to the table by it.
_TOKEN_ID = 8
# Tensors of the inner width that an activation saves; one, its input x, where it is not listed.
# transformers writes `gelu_new` out: x, 0.5 x, tanh, 1 + tanh. `relu` needs only its output, which
# the product or the trained linear layer behind it saves anyway.
_ACTIVATION_SAVES = {"gelu_new": 4, "relu": 0}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """The linear layers of one block that have low-rank adapters."""

    rank: int
    dropout: float
    linears: tuple[Linear, ...]

    @property
    def parameters(self) -> int:
        """Weights of one layer's adapters."""
        return sum(self.rank * (linear.inputs + linear.outputs) for linear in self.linears)


def adapters_of(architecture: Architecture, model: ModelConfig) -> Adapters | None:
    """Return the adapters that `model.lora` adds to one layer."""
    lora = model.lora
    if lora is None:
        return None
    chosen = tuple(
        linear
        for linear in architecture.linears
        if lora.targets == "all-linear" or linear.name in lora.targets
    )
    return Adapters(rank=lora.rank, dropout=lora.dropout, linears=chosen)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The counts that memory and time depend on.

    Attributes:
        layer_parameters: of one layer, its adapters included.
        layer_trained: the trained ones among them.
        largest_trained: numbers of the largest single weight that is trained.
    """

    architecture: Architecture
    parameters: int
    trainable: int
    layer_parameters: int
    layer_trained: int
    largest_trained: int
    adapters: Adapters | None = None

    @classmethod
    def of(cls, encoder: Any, model: ModelConfig) -> ModelShape:
        """Count an encoder, which may be on the meta device."""
        counts = [(p.numel(), p.requires_grad) for p in encoder.parameters()]
        # The last layer is like all others; the first may lack a norm (ModernBERT).
        layer = [(p.numel(), p.requires_grad) for p in encoder.layers[-1].parameters()]
        # Counted, because configs of models with their own code may name it by any key.
        architecture = dataclasses.replace(
            read_architecture(encoder.model.config.to_dict()), num_layers=len(encoder.layers)
        )
        adapters = adapters_of(architecture, model)
        if adapters is None:  # a published adapter that continues, with its own targets
            adapters = _found_adapters(architecture, encoder.layers[-1])
        return cls(
            architecture=architecture,
            parameters=sum(n for n, _ in counts),
            trainable=sum(n for n, trained in counts if trained),
            layer_parameters=sum(n for n, _ in layer),
            layer_trained=sum(n for n, trained in layer if trained),
            largest_trained=max((n for n, trained in counts if trained), default=0),
            adapters=adapters,
        )

    @classmethod
    def planned(
        cls, tree: Mapping[str, Any], model: ModelConfig, *, head: bool = False
    ) -> ModelShape:
        """Count the model of a config.json, without torch.

        Args:
            tree: config.json.
            model: the section of a training config; an adapter that continues is not counted.
            head: whether tokens are predicted by a head with its own weights.

        Raises:
            UserError: the model has its own code, or a width is missing.
        """
        architecture = read_architecture(tree)
        if model.attention_dropout is not None:
            dropped = model.attention_dropout > 0
            architecture = dataclasses.replace(architecture, attention_dropout=dropped)
        if architecture.block is None:
            raise UserError(
                f"config.json: model_type {architecture.model_type!r}",
                allowed=", ".join(BLOCKS),
                fix="use `python pipeline/train.py CONFIG --dry-run`, which builds the model",
            )
        adapters = adapters_of(architecture, model)
        if adapters is not None and not adapters.linears:
            raise UserError(
                f"model.lora.targets: no layer of {architecture.model_type} has one of them",
                allowed=", ".join(dict.fromkeys(linear.name for linear in architecture.linears)),
                fix="set model.lora.targets: all-linear",
            )
        layer, num_layers = architecture.layer_parameters, architecture.num_layers
        table = architecture.vocab_size * architecture.hidden_size
        # A tied head is the table itself; another one is as large.
        untied = head and not architecture.tied
        base = architecture.outer_parameters + num_layers * layer + untied * table
        added = adapters.parameters if adapters else 0
        largest = max(table, *(linear.inputs * linear.outputs for linear in architecture.linears))
        if adapters:  # all else is frozen: A (rank, inputs) and B (outputs, rank)
            largest = max(
                adapters.rank * max(linear.inputs, linear.outputs) for linear in adapters.linears
            )
        return cls(
            architecture=architecture,
            parameters=base + num_layers * added,
            trainable=num_layers * added if adapters else base,
            layer_parameters=layer + added,
            layer_trained=added if adapters else layer,
            largest_trained=largest,
            adapters=adapters,
        )

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return self.architecture.num_layers

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.architecture.hidden_size

    @property
    def outer_parameters(self) -> int:
        """Weights outside of the layers."""
        return self.parameters - self.num_layers * self.layer_parameters

    @property
    def outer_trained(self) -> int:
        """Trained weights outside of the layers."""
        return self.trainable - self.num_layers * self.layer_trained


def _found_adapters(architecture: Architecture, layer: Any) -> Adapters | None:
    """Return the adapters that peft has put into a layer."""
    found, rank, dropout = [], 0, 0.0
    for name, module in layer.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        # With their sizes: three layers of a BERT block are called `dense`.
        key = (name.split(".")[-1], module.in_features, module.out_features)
        found += [
            linear
            for linear in architecture.linears
            if (linear.name, linear.inputs, linear.outputs) == key
        ][:1]
        for inner in module.lora_A.values():
            rank = max(rank, int(inner.out_features))
        dropout = max(
            [dropout, *(float(d.p) for d in module.lora_dropout.values() if hasattr(d, "p"))]
        )
    return Adapters(rank=rank, dropout=dropout, linears=tuple(found)) if found else None


def saved_by_layer(shape: ModelShape, width: int) -> float:
    """Return the bytes that one layer saves for its backward, for one token.

    Counted on torch's autograd with a variable-length attention kernel, which keeps one fp32 sum
    per head. A linear layer keeps its input where its weight is trained. A frozen one keeps
    nothing; its adapter keeps the same input, or, with dropout, a dropped copy and a mask of one
    byte a number. Qwen2 with all weights trained, by tensor:

        two norms            2 (4 (h + 1) + w h)    fp32 copy, one factor, normalised
        inputs of linears    2 w h                  of query, key, value; of gate, up
        attention            w (2 q + 2 kv) + 4 H   rotated query and key, value, output; H sums
        MLP                  4 w i                  gate, its activation, up, their product

    Args:
        shape: the model.
        width: bytes of a number in the model's type.
    """
    architecture, adapters = shape.architecture, shape.adapters
    block = architecture.block
    h, i = architecture.hidden_size, architecture.intermediate_size
    if block is None:
        # A model with its own code: an upper bound for gated MLPs, 24 % above what a 7B of Qwen2
        # saves. In 16 bits the table above has at most 12 h + 4 i (kv = q = h).
        return (18 * h + 4 * i) * width + (_dropped(adapters, width) if adapters else 0)
    trained = adapters is None
    # Parts of the block that keep their input: for the gradient of a trained weight, or of an
    # adapter's A, which without dropout reads the same tensor.
    kept = {
        linear.part
        for linear in (architecture.linears if adapters is None else adapters.linears)
        if adapters is None or adapters.dropout == 0
    }
    total = block.num_norms * _norm(block.norm, h, 1, width, trained)
    # Query, key and value read one tensor, which is kept once; so do gate and up.
    total += width * h * (("query_key_value" in kept) + ("up" in kept))
    total += _attention(architecture, block, width, trained, copied="out" in kept)
    activated = _ACTIVATION_SAVES.get(architecture.activation, 1)
    # Activated and multiplied with the other half: both halves and the activated one.
    total += width * i * (activated + (2 if block.gated else 0) + ("down" in kept))
    total += architecture.masks * h  # one byte a number
    if adapters is not None:
        # Each B keeps its input, the output of A.
        total += width * adapters.rank * len(adapters.linears)
        total += _dropped(adapters, width)
    return float(total)


def saved_outside(shape: ModelShape, width: int) -> float:
    """Return the bytes saved outside of the layers, for one token.

    Its id, dropout and norms before and after the layers, rotary positions, pooling.
    """
    architecture, block = shape.architecture, shape.architecture.block
    h, trained = architecture.hidden_size, shape.adapters is None
    pooled = _FP32 * h  # the fp32 copy that pooling sums
    if block is None:
        return float(pooled + 2 * h * width)
    rotations = 2 * width * architecture.head_width * block.rotations  # cosines and sines
    # Before the first layer, a frozen model has nothing to save for.
    norms = block.outer_norms - (0 if trained else block.embedding_norms)
    # Families with learned positions (BERT, GPT-2) drop out of the sum of their tables.
    dropped = h if trained and architecture.masks and not block.rotations else 0
    norm = _norm(block.norm, h, 1, width, trained)
    return float(pooled + rotations + norms * norm + dropped + (_TOKEN_ID if trained else 0))


def spared_by_first_layer(shape: ModelShape, width: int) -> float:
    """Return how many bytes less the first layer saves than the others, for one token.

    If the model is frozen, nothing below the first layer is trained: no gradient goes through its
    input's norm, nor through the dropouts of adapters that read this input.
    """
    architecture, adapters = shape.architecture, shape.adapters
    block = architecture.block
    if block is None:
        return 0.0
    norm = _norm(block.norm, architecture.hidden_size, 1, width, adapters is None)
    if adapters is None:  # ModernBERT's first layer normalises nothing
        return float(norm if architecture.model_type == "modernbert" else 0)
    # The masks alone: A still needs the dropped inputs for its own gradient.
    masks = sum(linear.part == "query_key_value" for linear in adapters.linears)
    dropped = architecture.hidden_size * masks if adapters.dropout else 0
    return float(dropped + (norm if block.norm_first else 0))


def _norm(kind: str, size: int, groups: int, width: int, trained: bool) -> int:
    """Return the saved bytes of a norm over `size` numbers in `groups` parts."""
    if kind == "layer":  # its input, mean and deviation
        return width * size + 2 * _FP32 * groups
    # The fp32 copy and one factor a group; for the gradient of its weight, what the weight scales.
    scaled = width if kind == "rms" else _FP32
    return _FP32 * (size + groups) + (scaled * size if trained else 0)


def _attention(
    architecture: Architecture, block: Block, width: int, trained: bool, *, copied: bool
) -> int:
    q, kv = architecture.query_width, architecture.kv_width
    fused = len(block.query_key_value) == 1
    # Rotating makes new tensors of queries and keys, and saves only cosines and sines. Otherwise
    # queries and keys are the linear layers' own outputs.
    rotated = block.rotations > 0
    inputs = q + 2 * kv
    if fused and rotated:
        # The value is a slice of the fused output, and keeps all of it.
        inputs += q + kv
    total = width * (inputs + q) + _FP32 * architecture.num_heads
    # In fp32 no kernel takes all rows at once: attention saves the rows' outputs, and the linear
    # layer the tensor that they are joined to.
    if (block.copies_out or width == _FP32) and copied:
        total += width * q
    if block.head_norms != "none":
        by_head = block.head_norms == "head"
        for size, heads in ((q, architecture.num_heads), (kv, architecture.num_kv_heads)):
            total += _norm(block.norm, size, heads if by_head else 1, width, trained)
    return total


def _dropped(adapters: Adapters, width: int) -> int:
    """Return the bytes of dropped inputs and their masks."""
    if adapters.dropout == 0:
        return 0
    return (width + 1) * sum(linear.inputs for linear in adapters.linears)
