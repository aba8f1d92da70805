"""Embed packed rows: backbone, pooling and normalisation; or predict their tokens.

    (T,) ids, (C,) lengths -> embed -> layer 0 ... layer n -> finish -> (C, D) unit rows
                                                   |
                                             final norm, gather P states -> logits (P, V)

`forward` is exactly these three calls, so a schedule that runs layer by layer computes the same.

Shapes: C rows, T packed tokens of all rows, D hidden width, P predictions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from pipeline.config import ModelConfig, Pooling, TrainConfig
from pipeline.errors import UserError
from pipeline.model.adapters import add_lora, continue_adapter
from pipeline.model.architectures import NATIVE_FORMS, Family, LayerInputs
from pipeline.model.attention import (
    PACKED,
    PackedRows,
    check_lengths,
    describe_kernel,
    packed_attention,
)
from pipeline.model.backbones import load_backbone, quiet, read_config, unused_names, unused_weights
from pipeline.model.weights import Placement, WeightFiles
from pipeline.model_limits import limits_of, read_limits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerContext:
    """The inputs of layers in addition to hidden states; computed once per chunk."""

    rows: PackedRows
    layer_inputs: LayerInputs


class Encoder(nn.Module):
    """A backbone that embeds packed rows without padding.

    Args:
        backbone: a Hugging Face model, possibly with adapters of peft.
        family: how its kind of model is taken apart.
        config: attention, pooling and normalisation.
    """

    def __init__(self, backbone: nn.Module, family: Family, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.family = family
        self.is_compiled = False
        # Checked in `embed`, because a lookup beyond them would crash a GPU process.
        self._positions = limits_of(self.model.config.to_dict(), config.path).positions

    def forward(
        self, input_ids: Tensor, lengths: Tensor, instruction_tokens: Tensor | None = None
    ) -> Tensor:
        """Embed rows of packed tokens.

        Args:
            input_ids: (T,) tokens of all rows, one row after another.
            lengths: (C,) tokens of each row, in host memory; they sum to T.
            instruction_tokens: (C,) tokens of the instruction at the front of each row, fewer than
                the row has; None if no row has any.

        Returns:
            (C, D) float32, unit rows if the config normalises.
        """
        hidden, context = self._run_layers(input_ids, lengths, instruction_tokens)
        return self.finish(hidden, context)

    @property
    def num_dimensions(self) -> int:
        """Width of a vector."""
        return self.config.dimensions or int(self.model.config.hidden_size)

    def describe_attention(self, device: torch.device) -> str:
        """Return a line for the log: how a run computes attention on `device`."""
        config = self.model.config
        if self.config.trust_remote_code:
            return "attention: the model's own code"
        heads = int(config.num_attention_heads)
        return describe_kernel(
            device,
            next(self.parameters()).dtype,
            int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            dropout=float(getattr(config, self.family.attention_dropout, 0) or 0),
            softcap=getattr(config, "attn_logit_softcapping", None),
        )

    def hidden_states(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the (T, D) hidden states of packed rows after the final norm."""
        hidden, _ = self._run_layers(input_ids, lengths, None)
        return self.family.finish(self.model, hidden).squeeze(0)

    def _run_layers(
        self, input_ids: Tensor, lengths: Tensor, instruction_tokens: Tensor | None
    ) -> tuple[Tensor, LayerContext]:
        hidden, context = self.embed(input_ids, lengths, instruction_tokens)
        for index in range(len(self.layers)):
            hidden = self.run_layer(index, hidden, context)
        return hidden, context

    @property
    def model(self) -> Any:
        """The Hugging Face model itself, inside any adapters."""
        inner = getattr(self.backbone, "get_base_model", None)  # only peft's wrapper has it
        return inner() if inner else self.backbone

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        return self.family.layers(self.model)

    def embed(
        self, input_ids: Tensor, lengths: Tensor, instruction_tokens: Tensor | None = None
    ) -> tuple[Tensor, LayerContext]:
        """Look up (T,) token ids: the (1, T, D) hidden states before the first layer."""
        rows = PackedRows.of(
            lengths,
            causal=self.config.attention == "causal",
            not_pooled=None if self.config.pool_instruction else instruction_tokens,
            device=input_ids.device,
        )
        check_lengths(input_ids, rows)
        if self._positions is not None and rows.longest > self._positions:
            raise UserError(
                f"a text of {rows.longest} tokens, but {self.config.path} has "
                f"{self._positions} positions",
                fix="cut texts to that length",
            )
        hidden, inputs = self.family.embed(
            self.model, input_ids.unsqueeze(0), rows.positions.unsqueeze(0)
        )
        if self.is_compiled and torch.is_grad_enabled():
            # With frozen embeddings, the first layer would have graphs of its own, which need no
            # gradient of its input: as long again to compile as the backward of all other layers.
            hidden.requires_grad_()
        return hidden, LayerContext(rows=rows, layer_inputs=inputs)

    def run_layer(self, index: int, hidden: Tensor, context: LayerContext) -> Tensor:
        """Run one block on (1, T, D) hidden states."""
        # No mask: `packed_attention` takes `rows`, which the layer passes through as a keyword.
        out: Tensor = self.layers[index](
            hidden, attention_mask=None, rows=context.rows, **context.layer_inputs[index]
        )
        return out

    def finish(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """Apply final norm, pooling and normalisation: (1, T, D) to (C, D) float32."""
        hidden = self.family.finish(self.model, hidden)
        vectors = pool(hidden.squeeze(0), context.rows, self.config.pooling)
        # Cut first, so that the shortened vectors have length 1.
        vectors = vectors[:, : self.config.dimensions]
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def save_backbone(self, folder: Path) -> None:
        """Write weights and config.json for transformers; adapters are merged permanently."""
        self.merge_adapters()
        unused = unused_weights(self.model, self.family, self.config)
        with quiet():
            # Under native names, not the names of a published diffusion checkpoint.
            self.model.save_pretrained(
                folder,
                state_dict={**self.model.state_dict(), **unused},
                save_original_format=False,
            )

    def names_from_base(self) -> list[str]:
        """Return the names of an export's tensors that training this model does not change."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        held = [name for name in self.model.state_dict() if name not in trained]
        return held + unused_names(self.model, self.family, self.config)

    def merge_adapters(self) -> None:
        """Add adapters to the weights that they adapt; they cannot be trained afterwards."""
        merge = getattr(self.backbone, "merge_and_unload", None)
        if merge is not None:
            self.backbone = merge()

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter without the weights of its base model, for peft."""
        backbone: Any = self.backbone
        # "default" is peft's name for an adapter that was given none. It would record the name of
        # the base model, but a model that was built from its config has none.
        backbone.peft_config["default"].base_model_name_or_path = self.config.path
        backbone.peft_config["default"].revision = self.config.revision
        # peft would look the base up on the hub, and save the whole embedding where its config.json
        # counts other tokens than it has rows (DiffuGPT).
        backbone.save_pretrained(folder, save_embedding_layers=False)


def pool(hidden_TD: Tensor, rows: PackedRows, how: Pooling) -> Tensor:
    """Pool the tokens of each row into one vector.

    `weighted_mean` gives the i-th token of L the weight i / (1 + ... + L)
    (Muennighoff, "SGPT", arXiv 2202.08904). Tokens that are not pooled still count in i, but not in
    any sum, as in sentence-transformers.

    Args:
        hidden_TD: (T, D) of any floating type.
        rows: how T is divided into rows, and how many tokens at the front of each are not pooled.
        how: the pooling of the model's config.

    Returns:
        (C, D) float32.
    """
    lengths, not_pooled = rows.lengths, rows.not_pooled
    if how == "first_token":
        first = rows.boundaries[:-1].long()
        return hidden_TD[first if not_pooled is None else first + not_pooled].float()
    if how == "last_token":
        return hidden_TD[rows.boundaries[1:].long() - 1].float()
    hidden_TD = hidden_TD.float()  # a 16-bit sum would lose the later tokens of a long row
    ordinals_T = rows.positions + 1
    if not_pooled is not None:
        kept = ordinals_T > rows.per_token(not_pooled)
        hidden_TD = hidden_TD.masked_fill(~kept[:, None], 0)
    if how == "mean":
        total = lengths if not_pooled is None else lengths - not_pooled
        return _sum_rows(hidden_TD, lengths) / total[:, None]
    # The weights 1 ... L sum to L (L + 1) / 2; without the first k tokens, k (k + 1) / 2 less.
    total = lengths * (lengths + 1) / 2
    if not_pooled is not None:
        total = total - not_pooled * (not_pooled + 1) / 2
    weights = ordinals_T.to(hidden_TD.dtype)
    return _sum_rows(hidden_TD * weights[:, None], lengths) / total[:, None]


def _sum_rows(values_TD: Tensor, lengths: Tensor) -> Tensor:
    """Sum each row: (T, D) -> (C, D).

    In order, unlike `index_add`, so that equal inputs give equal bits on GPUs.
    """
    # `unsafe` leaves out a check of the lengths, which would wait for the GPU; `check_lengths` has
    # made it on the host.
    return torch.segment_reduce(values_TD, "sum", lengths=lengths, unsafe=True)


def build_encoder(
    config: ModelConfig, *, meta: bool = False, placement: Placement | None = None
) -> Encoder:
    """Load a backbone and make it an embedder, in evaluation mode.

    Args:
        config: the model section.
        meta: build shapes only, on the meta device, without reading weights.
        placement: where the weights go; by default they stay whole, on the CPU.

    Raises:
        UserError: the model cannot be loaded, or does not fit the config.
    """
    placement = None if meta else placement or Placement()
    backbone, family = load_backbone(config, placement=placement)
    _check_dimensions(backbone, config)
    if config.gradient_checkpointing:
        _checkpoint_activations(backbone)
    with placement.together() if placement else nullcontext():
        if config.adapter is not None and config.adapter_use == "continue":
            backbone = continue_adapter(backbone, config.adapter, meta=meta)
        if config.lora is not None:
            backbone = add_lora(backbone, config.lora)
    return Encoder(backbone, family, config).eval()


def _check_dimensions(backbone: Any, config: ModelConfig) -> None:
    width = int(backbone.config.hidden_size)
    if config.dimensions is not None and config.dimensions > width:
        raise UserError(f"model.dimensions: {config.dimensions}", allowed=f"1 to {width}")


def _checkpoint_activations(backbone: Any) -> None:
    """Keep only each layer's input for the backward."""
    # The method's name in newer transformers, and its old name.
    enable = getattr(backbone, "activation_checkpointing_enable", None)
    (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})


def build_model(
    config: TrainConfig, *, meta: bool = False, placement: Placement | None = None
) -> Encoder:
    """Build the model of a run: an encoder, with a head where the objective predicts tokens.

    Args:
        config: of the training run.
        meta, placement: as for `build_encoder`.

    Raises:
        UserError: the model cannot be loaded, or does not fit the config.
    """
    build = build_encoder if config.objective is None else build_language_model
    return build(config.model, meta=meta, placement=placement)


class LanguageModel(Encoder):
    """An encoder that also predicts tokens.

    Args:
        encoder: the packed encoder; this model takes over its parts.
        head: (D -> V) without bias; its weight may be tied to the token embedding.
    """

    def __init__(self, encoder: Encoder, head: nn.Linear) -> None:
        super().__init__(encoder.backbone, encoder.family, encoder.config)
        self.lm_head = head

    def logits(self, hidden: Tensor) -> Tensor:
        """Score all tokens for (P, D) hidden states: (P, V) float32."""
        # float32, because the loss sums exponentials over the whole vocabulary.
        scores: Tensor = self.lm_head(hidden).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def save_backbone(self, folder: Path) -> None:
        """Write a causal language model of transformers; adapters are merged permanently.

        Its backbone loads alone as well, so both kinds of training can start from the folder.
        """
        self.merge_adapters()
        with quiet():
            # Only the class is new: our trained modules take the place of its empty ones.
            with torch.device("meta"):
                whole: Any = AutoModelForCausalLM.from_config(
                    self.model.config, trust_remote_code=False
                )
            setattr(whole, whole.base_model_prefix, self.model)
            whole.lm_head = self.lm_head
            whole.save_pretrained(folder, save_original_format=False)


def build_language_model(
    config: ModelConfig, *, meta: bool = False, placement: Placement | None = None
) -> LanguageModel:
    """Load a backbone and its head, in evaluation mode.

    The head is trained together with the backbone's own weights; with an adapter it stays fixed.

    Args:
        config, meta, placement: as for `build_encoder`.

    Raises:
        UserError: the model cannot be loaded, or has no plain head that predicts tokens.
    """
    placement = None if meta else placement or Placement()
    encoder = build_encoder(config, meta=meta, placement=placement)
    if not encoder.family.decoder:
        raise UserError(
            f"objective: {config.path} has no language-model head that this package reads",
            allowed="decoders of transformers, Dream, LLaDA, DiffuLLaMA",
            fix="train it contrastively, without objective",
        )
    head = _build_head(encoder, config, placement)
    # An adapter-only export has no place for a trained head.
    if config.lora is not None or config.adapter_use == "continue":
        head.requires_grad_(False)
    return LanguageModel(encoder, head).eval()


def _build_head(encoder: Encoder, config: ModelConfig, placement: Placement | None) -> nn.Linear:
    """Return the token embedding as the head where the two are tied, else the published head."""
    embedding = encoder.model.get_input_embeddings().weight
    # Under ZeRO-3 the weight itself is empty, and DeepSpeed keeps its whole shape here.
    vocabulary, width = getattr(embedding, "ds_shape", embedding.shape)
    # Without storage; the weight comes from the embedding or from the files.
    head = nn.Linear(width, vocabulary, bias=False, dtype=embedding.dtype, device="meta")
    if encoder.model.config.tie_word_embeddings:
        head.weight = embedding
    elif placement is not None:  # otherwise the head stays on the meta device
        with placement.together():
            if placement.reads:
                weight = _read_head(config, (vocabulary, width))
                weight = weight.to(placement.device, head.weight.dtype)
            else:
                weight = torch.empty_like(head.weight, device=placement.device)
            head.weight = nn.Parameter(weight)
        placement.take([head.weight])
    return head


# The native name of the head.
_HEAD = "lm_head.weight"


def _read_head(config: ModelConfig, shape: tuple[int, int]) -> Tensor:
    """Read the head's weight, whatever name it was published under."""
    native = NATIVE_FORMS.get(read_config(config)["model_type"])
    files = WeightFiles(config.path, config.revision)
    for name, found in files.shapes.items():
        if _native_name(name, native.keys if native else {}) == _HEAD:
            if tuple(found) != shape:
                raise UserError(
                    f"model.path: {config.path}: {name} has shape {tuple(found)}",
                    allowed=str(shape),
                )
            with files.slices([name]) as slices:
                weight: Tensor = slices[name][...]
            return weight
    raise UserError(
        f"model.path: the safetensors of {config.path} hold no {_HEAD}",
        fix="start from the language model, not from an embedder made of it",
    )


def _native_name(name: str, keys: dict[str, str]) -> str:
    """Rename a published weight by the rules of its native form."""
    for pattern, native in keys.items():
        name = re.sub(pattern, native, name)
    return name


def predicts_shifted(config: ModelConfig) -> bool:
    """Return True if the model predicts a token from the hidden state before it."""
    native = NATIVE_FORMS.get(read_config(config)["model_type"])
    return native is None or native.shifted


def find_mask_token(config: ModelConfig, tokenizer: Any, name: str | None) -> int:
    """Return the id of the token that hides others: `name`, or the one that the model declares.

    Raises:
        UserError: there is no such token, or the model has no embedding for it.
    """
    published = read_config(config)
    if name is None:
        known = tokenizer.mask_token_id
        known = published.get("mask_token_id") if known is None else known
    else:
        known = tokenizer.get_vocab().get(name)
    if known is None:
        what = "has no mask token" if name is None else f"has no token {name!r}"
        raise UserError(
            f"objective: the tokenizer of {config.path} {what}",
            fix="set mask_token in the objective's section to a token of its vocabulary, such as _",
        )
    # Tokens that were added to the tokenizer alone may have ids beyond the embedding.
    size = read_limits(config.path, config.revision).num_tokens
    if size is not None and known >= size:
        raise UserError(
            f"objective: the mask token of {config.path} is number {known}",
            allowed=f"below {size}, the tokens that the model knows",
            fix="set mask_token in the objective's section to one of them, such as _",
        )
    return int(known)


# --- compilation -----------------------------------------------------------------------------

# Dropout draws from torch's generators, so its masks equal the masks of an uncompiled run.
_OPTIONS = {"fallback_random": True}
# With more graphs of one function than this, torch runs it uncompiled. Its default of 8 is too few
# for models that alternate two kinds of layers.
_MOST_GRAPHS = 32


def require_compiler(*, on_gpu: bool) -> None:
    """Check that this machine has what torch's compiler needs.

    Raises:
        UserError: there is no C++ compiler, or on a GPU no Triton or C compiler.
    """
    compilers = ("CC", "gcc", "clang", "cc") if on_gpu else ("CXX", "g++")
    chosen = os.environ.get(compilers[0])
    missing = None
    if on_gpu and find_spec("triton") is None:
        missing = "the package triton"
    elif not any(shutil.which(name) for name in (chosen, *compilers[1:]) if name):
        missing = "a C compiler (gcc)" if on_gpu else "a C++ compiler (g++)"
    if missing:
        raise UserError(
            f"compile: true, but this machine lacks {missing}",
            fix=f"install {missing.removeprefix('the package ')}, or set compile: false",
        )


def compile_layers(encoder: Any, *, backend: str = "inductor") -> str:
    """Have the layers of an encoder compiled when they first run; return a line for the log.

        norm, projections, rotary positions | attention | projection, norm, feed-forward
        compiled                              as it is    compiled

    Element-wise operations fuse. All layers of a kind share their graphs, and a graph serves any
    number of tokens. There are a few for each kind: with and without gradients, and for a chunk of
    one token. Names, parameters and saved files stay as they are.

    Args:
        encoder: its layers are changed in place.
        backend: of `torch.compile`.
    """
    # Not attention: its number of rows differs between chunks, and its kernels are written by hand.
    as_it_is = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(PACKED, as_it_is)
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    options = _OPTIONS if backend == "inductor" else None
    for layer in encoder.layers:
        layer.compile(backend=backend, dynamic=True, options=options)
    encoder.is_compiled = True
    kinds = sorted({type(layer).__name__ for layer in encoder.layers})
    return f"compile: {len(encoder.layers)} layers of {', '.join(kinds)}, without their attention"


def num_graphs() -> int:
    """Return the number of graphs that this process has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
