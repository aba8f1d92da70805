"""Packed token ids to one vector per text: backbone, pooling, normalisation.

    (T,) ids, (C,) lengths -> embed -> layer 0 ... layer n -> finish -> (C, D) unit rows

`forward` is exactly these three calls, so a schedule that runs layer by layer computes the same.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.limits import limits_of
from pipeline.model.adapters import add_lora, continue_adapter
from pipeline.model.backbones import load_backbone, quiet
from pipeline.model.families import Family
from pipeline.model.packing import Rows, check_lengths, describe_kernel
from pipeline.model.pooling import pool
from pipeline.model.unused_weights import unused_weights
from pipeline.model.weights import Placement


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """What every layer needs beside the hidden states; computed once per chunk."""

    rows: Rows
    layer_inputs: list[dict[str, Any]]


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
        self._positions = limits_of(self.model.config.to_dict(), config.path).positions

    def forward(
        self, input_ids: Tensor, lengths: Tensor, instruction_tokens: Tensor | None = None
    ) -> Tensor:
        """Embed rows of packed tokens.

        Args:
            input_ids: (T,) tokens of all rows, one row after another.
            lengths: (C,) tokens of each row, in host memory; they sum to T.
            instruction_tokens: (C,) tokens at the front of each row that are the instruction's,
                fewer than the row has; None where no row has any.

        Returns:
            (C, D) float32, unit rows if the config normalises.
        """
        hidden, packed = self._run_layers(input_ids, lengths, instruction_tokens)
        return self.finish(hidden, packed)

    @property
    def num_dimensions(self) -> int:
        """Width of a vector."""
        return self.config.dimensions or int(self.model.config.hidden_size)

    def describe_attention(self, device: torch.device) -> str:
        """Return the line by which a run says how it computes attention on `device`."""
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
        """Rows of packed tokens, as for `forward`, to (T, D) hidden states after the final norm."""
        hidden, _ = self._run_layers(input_ids, lengths, None)
        return self.family.finish(self.model, hidden).squeeze(0)

    def _run_layers(
        self, input_ids: Tensor, lengths: Tensor, instruction_tokens: Tensor | None
    ) -> tuple[Tensor, PackedRows]:
        hidden, packed = self.embed(input_ids, lengths, instruction_tokens)
        for index in range(len(self.layers)):
            hidden = self.run_layer(index, hidden, packed)
        return hidden, packed

    @property
    def model(self) -> Any:
        """The Hugging Face model itself, inside any adapters."""
        inner = getattr(self.backbone, "get_base_model", None)
        return inner() if inner else self.backbone

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.family.layers(self.model)

    def embed(
        self, input_ids: Tensor, lengths: Tensor, instruction_tokens: Tensor | None = None
    ) -> tuple[Tensor, PackedRows]:
        """Token ids to the hidden states before the first layer, (1, T, D)."""
        rows = Rows.of(
            lengths,
            causal=self.config.attention == "causal",
            skipped=None if self.config.pool_instruction else instruction_tokens,
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
        return hidden, PackedRows(rows=rows, layer_inputs=inputs)

    def run_layer(self, index: int, hidden: Tensor, packed: PackedRows) -> Tensor:
        """One block on (1, T, D) hidden states."""
        out: Tensor = self.layers[index](
            hidden, attention_mask=None, rows=packed.rows, **packed.layer_inputs[index]
        )
        return out

    def finish(self, hidden: Tensor, packed: PackedRows) -> Tensor:
        """Final norm, pooling and normalisation: (1, T, D) to (C, D) float32."""
        hidden = self.family.finish(self.model, hidden)
        vectors = pool(hidden.squeeze(0), packed.rows, self.config.pooling)
        vectors = vectors[:, : self.config.dimensions]
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def save_backbone(self, folder: Path) -> None:
        """Write weights and config.json for transformers; adapters are merged, for good."""
        self.merge_adapters()
        unused = unused_weights(self.model, self.family, self.config)
        with quiet():
            # Under native names, not under those of a published diffusion checkpoint.
            self.model.save_pretrained(
                folder,
                state_dict={**self.model.state_dict(), **unused},
                save_original_format=False,
            )

    def merge_adapters(self) -> None:
        """Add the adapters to the weights they belong to; they cannot be trained after."""
        merge = getattr(self.backbone, "merge_and_unload", None)
        if merge is not None:
            self.backbone = merge()

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter without the weights it belongs to, for peft."""
        backbone: Any = self.backbone
        backbone.peft_config["default"].base_model_name_or_path = self.config.path
        backbone.save_pretrained(folder)


def build_encoder(
    config: ModelConfig, *, meta: bool = False, placement: Placement | None = None
) -> Encoder:
    """Load a backbone and make it an embedder, in evaluation mode.

    Args:
        config: the model section.
        meta: build shapes only, on the meta device, without reading weights.
        placement: where the weights go; by default they stay whole, on the CPU.

    Raises:
        UserError: the model cannot be loaded, or cannot be what the config asks for.
    """
    placement = None if meta else placement or Placement()
    backbone, family = load_backbone(config, placement=placement)
    _check_dimensions(backbone, config)
    if config.gradient_checkpointing:
        _checkpoint_activations(backbone)
    with placement.agreed() if placement else nullcontext():
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
    """Keep only each layer's input for the backward, by the method's new or old name."""
    enable = getattr(backbone, "activation_checkpointing_enable", None)
    (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})
