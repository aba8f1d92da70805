"""Read the widths of a model from its config.json, and which linear layers a block of it has.

config.json --read_architecture--> Architecture: widths, kind of block, dropouts, biases

Names of blocks are transformers' `model_type`. No torch, and no weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.errors import UserError


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
        tied: the head is the token table unless config.json says otherwise.
        defaults: values of config keys that published files leave out.
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
    tied: bool = False
    defaults: Mapping[str, int] = dataclasses.field(default_factory=dict)


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
    "gemma": Block(norm="rms_fp32", bias_keys=_ATTENTION_BIAS, tied=True),
    "gemma2": Block(norm="rms_fp32", num_norms=4, bias_keys=_ATTENTION_BIAS, tied=True),
    "gemma3_text": Block(
        norm="rms_fp32",
        num_norms=4,
        head_norms="head",
        bias_keys=_ATTENTION_BIAS,
        rotations=2,
        tied=True,
        # The `text_config` of 4B and larger holds little more than widths.
        defaults={
            **{"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4},
            "head_dim": 256,
        },
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
    "smollm3": Block(bias_keys=_BIASES, tied=True),
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
        tied=True,
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
            "tie_word_embeddings": "weight_tying",
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
    tied: bool  # a head that predicts tokens is the token table
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
    known, block = model_type in BLOCKS, BLOCKS.get(model_type, Block())

    def size(key: str, default: int | None = None) -> int:
        default = block.defaults.get(key, default)
        default = default if known or key == "hidden_size" else default or 1
        # `or`, because null means the default too (GPT-2's n_inner).
        value = tree.get(renamed.get(key, key)) or tree.get(key) or default
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"config.json: {renamed.get(key, key)}: {value!r}", allowed="a whole number >= 1"
            )
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
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
        tied=bool(tree.get(renamed.get("tie_word_embeddings", "tie_word_embeddings"), block.tied)),
        biases=(*block.biases, *(part for parts in chosen for part in parts)),
    )
