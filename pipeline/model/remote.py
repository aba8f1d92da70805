"""Models whose code comes with them: run padded, because only their own code knows their layers.

Nothing is taken on trust that can be measured: how the code attends and what padding does to a
vector are probed when it is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.families import Family, LayerInputs
from pipeline.model.packing import Rows


class PaddedModel(nn.Module):
    """A foreign model with the outside of a packed one: an embedding and a single block."""

    base_model_prefix = ""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.config = inner.config
        self.layers = nn.ModuleList([_PaddedBlock(inner)])

    def gradient_checkpointing_enable(self, arguments: dict[str, Any]) -> None:
        """Hand the request to the foreign code."""
        self.layers[0].inner.gradient_checkpointing_enable(arguments)  # type: ignore[operator, union-attr]


class _PaddedBlock(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, *, attention_mask: None, rows: Rows) -> Tensor:
        """(1, T, D) input embeddings to (1, T, D) last hidden states, by way of (C, L, D)."""
        padded = pad_sequence(list(torch.split(hidden[0], rows.sizes)), batch_first=True)
        columns = torch.arange(rows.longest, device=hidden.device)
        mask = columns < rows.lengths[:, None]  # (C, L)
        packed: Tensor = last_states(self.inner, padded, mask)[mask].unsqueeze(0)
        return packed


def last_states(inner: Any, embedded: Tensor, mask: Tensor) -> Tensor:
    """(C, L, D) embeddings and (C, L) mask of real tokens -> (C, L, D) last hidden states.

    Raises:
        UserError: the model returns something else.
    """
    out = inner(inputs_embeds=embedded, attention_mask=mask.long())
    states: Tensor | None = getattr(out, "last_hidden_state", None)
    if states is None:
        raise UserError(
            "model.path: its code returns no last_hidden_state",
            fix="point AutoModel in its auto_map at the backbone, not at a head",
        )
    return states


def _embed(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    return model.layers[0].inner.get_input_embeddings()(ids), [{}]


REMOTE = Family(
    embed=_embed,
    layers=lambda model: model.layers,
    finish=lambda model, hidden: hidden,
    decoder=True,
    attention_dropout="attention_dropout",
)


def check_behaviour(model: PaddedModel, config: ModelConfig) -> None:
    """Probe foreign code with three forwards of a few tokens.

    Raises:
        UserError: it does not attend as the config says, or a vector depends on padding.
    """
    inner: Any = model.layers[0].inner
    inner.eval()
    ids = torch.arange(1, 9)[None]
    real = torch.tensor([[True] * 5 + [False] * 3])  # what follows token 5 is padding, not zeros
    with torch.no_grad():
        embedded = inner.get_input_embeddings()(ids)
        alone = last_states(inner, embedded[:, :5], real[:, :5]).float()
        padded = last_states(inner, embedded, real)[:, :5].float()
        longer = last_states(inner, embedded, torch.ones_like(real))[:, :5].float()
    noise = (1e-4 if config.dtype == "float32" else 3e-2) * alone.abs().max()
    if (alone - padded).abs().max() > noise:
        raise UserError(
            f"model.path: in the code of {config.path} padding changes the vectors of a text",
            fix="correct its attention mask; embeddings would depend on their batch mates",
        )
    attends = "bidirectional" if (alone - longer).abs().max() > noise else "causal"
    if attends != config.attention:
        raise UserError(
            f"model.attention: {config.attention}, but the code of {config.path} is {attends}",
            allowed=attends,
        )
