"""Count a model's weights, and the bytes that its layers save for the backward, without torch.

config.json --read_architecture--> widths and the kind of block
            --ModelShape--> parameters, parameters of a layer, saved bytes for one token

    one layer saves, for one token         RMS norm     (fp32 copy, normalised, its output)
    h width, i inner, q heads x width,     attention    query, key, value, output, one sum per head
    k key heads x width, w bytes           gated MLP    gate, its activation, up, their product
                                           adapters     rank-wide inputs; dropped inputs and masks

Names of blocks are transformers' `model_type`. The table is exact to the byte for the layers of
every family here; `tests/planning/test_saved_bytes.py` compares it with what autograd keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.config import ModelConfig
from pipeline.errors import UserError

Dtype = Literal["float32", "bfloat16"]
# Bytes of a number (`w` in every formula of this package).
NUMBER_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
# Bytes of what norms, attention and pooling keep in fp32, whatever the model's type.
_FP32 = NUMBER_BYTES["float32"]
# Bytes of a token's int64 id: the embedding's backward adds each row's gradient to the table by it.
_TOKEN_ID = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The layout of one kind of transformer layer.

    Attributes:
        query_key_value, out, up, down: last names of the linear layers, in order of use.
        norm: `rms` normalises in fp32 and scales in the model's type, `rms_fp32` scales in fp32
            too, `layer` is torch's own LayerNorm.
        num_norms: of the whole width.
        head_norms: query and key are normalised by head, as a whole, or not.
        gated: the MLP multiplies an activated half with another one.
        copies_out: the attention's output is copied before its linear layer.
        biases: the linear layers that have one in every model, by the attribute's name here.
        bias_keys: config keys that give a bias to the same attributes.
        dropouts: config keys of a dropout on the width, and how often a layer uses each.
        activation: the config key of the MLP's activation.
        tables: config keys of further embedding tables of the full width.
        norm_biases: parameters of a norm per number of its width: 2 with a bias.
        outer_norms: norms outside of the layers, `embedding_norms` of them before the first.
        norm_first: a layer normalises its input.
        rotations: tables of rotary positions: 2 where layers with a window have a base of their
            own, 0 with learned positions.
    """

    query_key_value: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    norm: Literal["rms", "rms_fp32", "layer"] = "rms"
    num_norms: int = 2
    head_norms: Literal["none", "head", "whole"] = "none"
    gated: bool = True
    copies_out: bool = False
    biases: tuple[str, ...] = ()
    bias_keys: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    dropouts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"
    tables: tuple[str, ...] = ()
    norm_biases: int = 1
    outer_norms: int = 1
    embedding_norms: int = 0
    norm_first: bool = True
    rotations: int = 1


_ATTENTION_BIAS = {"attention_bias": ("query_key_value", "out")}
_BIASES = {**_ATTENTION_BIAS, "mlp_bias": ("up", "down")}
_ALL = ("query_key_value", "out", "up", "down")
# The same setting in configs like Llama's, BERT's and GPT-2's.
_ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
_BERT = Block(
    query_key_value=("query", "key", "value"),
    out="dense",
    up=("dense",),
    down="dense",
    norm="layer",
    gated=False,
    biases=_ALL,
    dropouts={"hidden_dropout_prob": 2},
    tables=("max_position_embeddings", "type_vocab_size"),
    norm_biases=2,
    embedding_norms=1,
    norm_first=False,
    rotations=0,
)
# By the `model_type` of the native config.
BLOCKS = {
    "qwen2": Block(biases=("query_key_value",)),
    "qwen3": Block(head_norms="head", bias_keys=_ATTENTION_BIAS),
    "llama": Block(bias_keys=_BIASES),
    "mistral": Block(),
    "gemma": Block(norm="rms_fp32", bias_keys=_ATTENTION_BIAS),
    "gemma2": Block(norm="rms_fp32", num_norms=4, bias_keys=_ATTENTION_BIAS),
    "gemma3_text": Block(
        norm="rms_fp32", num_norms=4, head_norms="head", bias_keys=_ATTENTION_BIAS, rotations=2
    ),
    "olmo2": Block(
        norm="rms_fp32", head_norms="whole", bias_keys=_ATTENTION_BIAS, norm_first=False
    ),
    "phi3": Block(
        query_key_value=("qkv_proj",),
        up=("gate_up_proj",),
        # It rotates by `cat`, which lays queries out head by head. Attention's output takes that
        # layout, and `o_proj` copies it to token by token.
        copies_out=True,
        dropouts={"resid_pdrop": 2},
    ),
    "smollm3": Block(bias_keys=_BIASES),
    "gpt2": Block(
        query_key_value=("c_attn",),
        out="c_proj",
        up=("c_fc",),
        down="c_proj",
        norm="layer",
        gated=False,
        biases=_ALL,
        dropouts={"resid_pdrop": 2},
        activation="activation_function",
        tables=("n_positions",),
        norm_biases=2,
        rotations=0,
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "eurobert": Block(bias_keys=_BIASES),
    "modernbert": Block(
        query_key_value=("Wqkv",),
        out="Wo",
        up=("Wi",),
        down="Wo",
        norm="layer",
        bias_keys=_BIASES,
        activation="hidden_activation",
        outer_norms=2,
        embedding_norms=1,
        rotations=2,
    ),
}
# Tensors of the inner width that an activation saves; one, its input x, where it is not listed.
# transformers writes `gelu_new` out: x, 0.5 x, tanh, 1 + tanh. `relu` needs only its output, which
# the product or the trained linear layer behind it saves anyway.
_ACTIVATION_SAVES = {"gelu_new": 4, "relu": 0}
# Published layouts that are read as another model: their names of the usual keys.
_RENAMED = {
    "Dream": ("qwen2", {}),
    "llada": (
        "llama",
        {
            "hidden_size": "d_model",
            "intermediate_size": "mlp_hidden_size",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "num_key_value_heads": "n_kv_heads",
            # LLaDA's table may have more rows than its vocabulary has tokens.
            "vocab_size": "embedding_size",
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
        },
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One linear layer of a block."""

    name: str
    part: str  # query_key_value, out, up or down
    inputs: int
    outputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        """Weights and bias."""
        return (self.inputs + self.bias) * self.outputs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The widths of a model, from its config.json."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    vocab_size: int
    activation: str
    table_rows: int  # of further embedding tables
    masks: int  # dropouts on the width that are used, in one layer
    attention_dropout: bool  # attention weights are dropped in training
    biases: tuple[str, ...]

    @property
    def block(self) -> Block | None:
        """The layout of a layer; None where it is not known."""
        return BLOCKS.get(self.model_type)

    @property
    def query_width(self) -> int:
        """Numbers of a token's query, all heads together."""
        return self.num_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Numbers of a token's key, or of its value."""
        return self.num_kv_heads * self.head_width

    @property
    def linears(self) -> list[Linear]:
        """All linear layers of a block."""
        block = self.block or Block()
        h, i, q, kv = self.hidden_size, self.intermediate_size, self.query_width, self.kv_width
        fused = len(block.query_key_value) == 1
        # One linear layer of a gated MLP makes both halves.
        ups = [i] * len(block.up) if len(block.up) > 1 else [(1 + block.gated) * i]
        parts = (
            ("query_key_value", block.query_key_value, h, [q + 2 * kv] if fused else [q, kv, kv]),
            ("out", (block.out,), q, [h]),
            ("up", block.up, h, ups),
            ("down", (block.down,), i, [h]),
        )
        return [
            Linear(name=name, part=part, inputs=inputs, outputs=size, bias=part in self.biases)
            for part, names, inputs, outputs in parts
            for name, size in zip(names, outputs, strict=True)
        ]

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        block = self.block or Block()
        whole = self.query_width + self.kv_width
        # A norm by head has one head's weights, which all heads share.
        heads = {"none": 0, "head": 2 * self.head_width, "whole": whole}
        norms = block.num_norms * block.norm_biases * self.hidden_size + heads[block.head_norms]
        return sum(linear.parameters for linear in self.linears) + norms

    @property
    def outer_parameters(self) -> int:
        """Weights outside of the layers: tables, and norms."""
        block = self.block or Block()
        outside = self.vocab_size + self.table_rows + block.outer_norms * block.norm_biases
        # ModernBERT's first layer normalises nothing before its attention. Layers are counted as if
        # they were equal, so the difference is taken off here.
        missing = self.hidden_size if self.model_type == "modernbert" else 0
        return outside * self.hidden_size - missing


def read_architecture(tree: Mapping[str, Any]) -> Architecture:
    """Read the widths in a config.json, published or native.

    A model with its own code has its own keys: a missing one counts as 1.

    Raises:
        UserError: a width is missing or wrong.
    """
    published = str(tree.get("model_type", ""))
    if isinstance(tree.get("text_config"), Mapping):  # Gemma 3 with images
        tree = tree["text_config"]
        published = str(tree.get("model_type", published))
    model_type, renamed = _RENAMED.get(published, (published, {}))
    known = model_type in BLOCKS

    def size(key: str, default: int | None = None) -> int:
        default = default if known or key == "hidden_size" else default or 1
        # `or`, because null means the default too (GPT-2's n_inner).
        value = tree.get(renamed.get(key, key)) or tree.get(key) or default
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"config.json: {renamed.get(key, key)}: {value!r}", allowed="a whole number >= 1"
            )
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    block = BLOCKS.get(model_type, Block())
    chosen = [parts for key, parts in block.bias_keys.items() if tree.get(key)]
    ratio = tree.get("mlp_ratio") or 4  # LLaDA, and GPT-2's default
    return Architecture(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size", int(ratio * hidden)),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_width=size("head_dim", hidden // heads),
        vocab_size=size("vocab_size"),
        activation=str(tree.get(block.activation, "silu")),
        table_rows=sum(size(key) for key in block.tables),
        masks=sum(count for key, count in block.dropouts.items() if tree.get(key)),
        attention_dropout=any(tree.get(key) for key in _ATTENTION_DROPOUTS),
        biases=(*block.biases, *(part for parts in chosen for part in parts)),
    )


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
        untied = head and not tree.get("tie_word_embeddings", False)
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
