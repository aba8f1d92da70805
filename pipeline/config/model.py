"""The model section, and the starter that quick trials begin from."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pipeline.config.declared import Pooling, default_pooling
from pipeline.config.rules import PathText, UserPath, require, strict

Attention = Literal["bidirectional", "causal"]


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    # Last parts of names, or every linear layer.
    targets: Literal["all-linear"] | tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    rslora: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, "model.lora.rank", self.rank, "an integer >= 1")
        require(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "0 <= dropout < 1")


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Rotary positions for texts longer than the model was trained on, by transformers' own rules.

    linear: positions are divided by the factor (Chen et al., arXiv 2306.15595). ntk: the base grows
    to theta * factor ** (d / (d - 2)), d the width of a head (Peng et al., arXiv 2309.00071,
    section 3.1). yarn: by wavelength, with a temperature (the same, section 3.4).
    """

    kind: Literal["linear", "ntk", "yarn"]
    factor: float

    def __post_init__(self) -> None:
        require(self.factor > 1, "rope_scaling.factor", self.factor, "a number > 1")


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The backbone, how it attends, and how its hidden states become one vector."""

    path: PathText
    revision: str | None = None
    trust_remote_code: bool = False
    attention: Attention = "bidirectional"
    # Where a config names none, the one that a folder of sentence-transformers declares, or mean.
    pooling: Pooling = None  # type: ignore[assignment]
    # Whether the tokens of an instruction are pooled; they are attended to in any case.
    pool_instruction: bool = True
    normalize: bool = True
    # Vectors keep so many of their first numbers (arXiv 2205.13147); null keeps all.
    dimensions: int | None = None
    rope_scaling: RopeScaling | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention_dropout: float | None = None
    gradient_checkpointing: bool = False
    # A peft adapter to start from: merged into the weights, or trained further.
    adapter: PathText | None = None
    adapter_use: Literal["merge", "continue"] = "merge"
    # Adapters that are merged into the weights before that one, in this order.
    merged_adapters: tuple[PathText, ...] = ()
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.pooling is None:
            chosen = default_pooling(self.path, self.revision)  # type: ignore[unreachable]
            object.__setattr__(self, "pooling", chosen)
        dimensions = self.dimensions
        require(
            dimensions is None or dimensions >= 1, "model.dimensions", dimensions, "an integer >= 1"
        )
        require(
            self.adapter_use == "merge" or (self.adapter is not None and self.lora is None),
            "model.adapter_use",
            self.adapter_use,
            "continue only with model.adapter and without model.lora",
            "the adapter to continue brings its own rank and targets",
        )
        require(
            not self.trust_remote_code or self.revision is not None,
            "model.trust_remote_code",
            True,
            "true only together with model.revision (a pinned commit)",
            "set model.revision, so that the code you reviewed is the code that runs",
        )

    @property
    def all_merged(self) -> tuple[str, ...]:
        """Every adapter that goes into the weights before training, in order."""
        last = self.adapter if self.adapter_use == "merge" else None
        return self.merged_adapters if last is None else (*self.merged_adapters, last)


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StarterConfig:
    """A small model to begin from, and its tokenizer: `diffembed starter CONFIG`."""

    output_dir: UserPath
    corpus: tuple[UserPath, ...]
    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 384
    max_position_embeddings: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.corpus) > 0, "corpus", "an empty list", "at least one file")
        for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "an integer >= 1")
        places = self.max_position_embeddings
        require(places >= 1, "max_position_embeddings", places, "an integer >= 1 (tokens)")
        require(0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")
