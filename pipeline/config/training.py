"""Configure a training run: objective, loss, optimizer, chunks, checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.rules import UserPath, require, strict


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MntpConfig:
    """Masked next-token prediction (LLM2Vec, BehnamGhader et al., arXiv 2404.05961, section 2.1).

    A masked token is predicted from the hidden state of the position before it.

    Args:
        mask_rate: share of the tokens to predict.
        replace: `bert` puts the mask token in 80 %, a random token in 10 %, and leaves 10 % as they
            are (Devlin et al., arXiv 1810.04805, section 3.1); `all` always puts the mask token.
        mask_token: the token to put; by default the tokenizer's mask token.
    """

    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.2
    replace: Literal["bert", "all"] = "bert"
    mask_token: str | None = None


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDiffusionConfig:
    """Masked diffusion (LLaDA, Nie et al., arXiv 2502.09992, equation 3).

    Each row draws t from U(0, 1) and masks each of its tokens with probability t.

    Args:
        shift: predict a token from the hidden state before it; by default as the model was
            pre-trained: LLaDA predicts in place, Dream and autoregressive models predict shifted.
            An export of LLaDA is loaded as a Llama: set `shift: false` for it.
        mask_token: the token to put; by default the tokenizer's mask token.
    """

    shift: bool | None = None
    mask_token: str | None = None


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NextTokenConfig:
    """Autoregressive language modelling: each token from the tokens before it."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Exactly one kind of token prediction."""

    mntp: MntpConfig | None = None
    masked_diffusion: MaskedDiffusionConfig | None = None
    next_token: NextTokenConfig | None = None

    def __post_init__(self) -> None:
        kinds = [field.name for field in dataclasses.fields(self)]
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        require(
            len(given) == 1,
            "objective",
            given,
            f"exactly one of {', '.join(kinds)}",
            "write for example `objective: {mntp: {}}`, or no objective for the contrastive loss",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """Learning a teacher's scores of a query's positives and own negatives.

    KL(teacher || model) over that list (Hinton et al., arXiv 1503.02531, where a query's list
    replaces the classes). Its share of the loss is `weight`, the contrastive term keeps the rest.
    `temperature` divides the teacher's scores.
    """

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    temperature: PositiveFloat = 1.0


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """InfoNCE over the global batch (van den Oord et al., arXiv 1807.03748, eq. 4).

    The defaults are cosine / 0.02 against every document of the batch. RepLLaMA's loss is
    `{similarity: scaled_dot, temperature: 1, negatives: own}`.
    """

    temperature: PositiveFloat = 0.02
    learn_temperature: bool = False
    # cosine normalises inside the loss; scaled_dot divides the dot product by the width.
    similarity: Literal["cosine", "dot", "scaled_dot"] = "cosine"
    negatives: Literal["batch", "own"] = "batch"
    symmetric: bool = False
    # Smaller widths to train in addition to the full one; the loss is the mean over all.
    matryoshka_dims: tuple[int, ...] = ()
    # A negative that exceeds the query's best positive by more than this is left out.
    false_negative_margin: float | None = None
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        require(
            not (self.symmetric and self.negatives == "own"),
            "loss.symmetric",
            True,
            "true only with loss.negatives: batch",
            "set loss.symmetric: false; documents have no list of negatives",
        )
        dims = self.matryoshka_dims
        require(
            all(dim >= 1 for dim in dims) and list(dims) == sorted(set(dims)),
            "loss.matryoshka_dims",
            list(dims),
            "ascending integers >= 1, each once",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), warm-up and decay."""

    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: Annotated[float, Field(ge=0, description="0 for no clipping")] = 1.0
    warmup_steps: NonNegativeInt = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    # The step at which the decay would reach 0; num_steps by default, more for a run that ends
    # before its learning rate does.
    decay_steps: int | None = None


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChunkConfig:
    """The chunks of a rank's share of the global batch, each one cached forward."""

    max_tokens: PositiveInt = 8192
    # Sum over a chunk's texts of L * (1 + L / 32500), L in tokens; null: tokens alone decide.
    max_cost: PositiveFloat | None = None
    min_chunks: PositiveInt = 1
    # schedule cache: this many chunks keep their graph and need no second forward.
    # `auto`: as many as fit into memory by the plan.
    keep_graphs: NonNegativeInt | Literal["auto"] = 0
    # schedule sweep: the memory that holds the inputs of all layers until the backward.
    boundaries: Literal["device", "host"] = "device"


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """The steps at which a run saves a checkpoint, and the checkpoints that stay."""

    every: Annotated[int, Field(ge=1, description="steps")] = 100
    keep_last: PositiveInt = 2
    # Checkpoints whose step is a multiple of this are never deleted.
    keep_every: PositiveInt | None = None
    # A folder on slower, safer storage to which every checkpoint is copied in the background.
    mirror: UserPath | None = None

    def __post_init__(self) -> None:
        kept = self.keep_every
        require(
            kept is None or kept % self.every == 0,
            "checkpoint.keep_every",
            kept,
            f"a multiple of checkpoint.every ({self.every}), or null",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateEveryConfig:
    """Scores of checkpoints during training.

    Args:
        every: steps between two scored checkpoints; a multiple of checkpoint.every.
        config: an evaluation's YAML; its last model gives the wording of queries.
        where: separate Slurm jobs, or a process of low priority on the CPU of rank 0's node.
        text_elements: slurm: array elements that share the texts of all tasks; null: one element
            for each task and length.
    """

    every: PositiveInt
    config: UserPath
    where: Literal["slurm", "local"] = "slurm"
    text_elements: int | None = None


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run: `pipeline/train.py CONFIG`."""

    output_dir: UserPath
    num_steps: PositiveInt
    model: ModelConfig
    data: DataConfig
    seed: int = 42
    schedule: Literal["auto", "plain", "cache", "sweep"] = "auto"
    chunks: ChunkConfig = dataclasses.field(default_factory=ChunkConfig)
    # Token prediction instead of the contrastive loss; `loss` must then be left out.
    objective: ObjectiveConfig | None = None
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    # A loss or gradient that is not finite: stop with a dump of the batch, or skip the update.
    non_finite: Literal["stop", "skip"] = "stop"
    evaluate: EvaluateEveryConfig | None = None
    log_every: Annotated[int, Field(ge=1, description="steps")] = 1
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()

    def __post_init__(self) -> None:
        # Only a step with a checkpoint can be scored.
        every = self.evaluate.every if self.evaluate else self.checkpoint.every
        require(
            every % self.checkpoint.every == 0,
            "evaluate.every",
            every,
            f"a multiple of checkpoint.every ({self.checkpoint.every})",
        )
        require(
            self.optimizer.warmup_steps < self.num_steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"less than num_steps ({self.num_steps})",
        )
        end = self.optimizer.decay_steps
        require(
            end is None or end >= self.num_steps,
            "optimizer.decay_steps",
            end,
            f"at least num_steps ({self.num_steps})",
        )
        self._check_schedule()
        # Settings of the other kind of training would have no effect, so they are refused.
        if self.objective is None:
            require(
                self.data.block_length is None,
                "data.block_length",
                self.data.block_length,
                "null without an objective",
                "the contrastive loss compares whole texts",
            )
        else:
            self._check_token_prediction(self.objective)

    def _check_schedule(self) -> None:
        """Refuse settings that a schedule ignores or contradicts."""
        require(
            self.schedule in ("auto", "cache") or self.chunks.keep_graphs == 0,
            "chunks.keep_graphs",
            self.chunks.keep_graphs,
            "0 unless schedule is cache or auto",
            "schedule plain keeps all graphs, sweep keeps none",
        )
        require(
            self.schedule != "sweep" or not self.model.gradient_checkpointing,
            "model.gradient_checkpointing",
            True,
            "false with schedule sweep",
            "a sweep already recomputes one layer at a time",
        )

    def _check_token_prediction(self, objective: ObjectiveConfig) -> None:
        """Refuse settings that token prediction would silently ignore."""
        require(
            self.loss == LossConfig(),
            "loss",
            "given together with objective",
            "one of the two",
            "remove loss, or remove objective to train contrastively",
        )
        require(
            self.schedule != "plain" and self.chunks.keep_graphs == 0,
            "schedule, chunks.keep_graphs",
            (self.schedule, self.chunks.keep_graphs),
            "auto, cache or sweep, and 0, with an objective",
            "tokens are predicted chunk by chunk: no graph outlives its chunk",
        )
        require(
            objective.next_token is None or self.model.attention == "causal",
            "model.attention",
            self.model.attention,
            "causal with objective.next_token",
            "a model that sees the next token has nothing to predict",
        )
        require(
            not self.model.trust_remote_code,
            "model.trust_remote_code",
            True,
            "false with an objective",
            "the language-model head of a model with its own code is unknown to this package",
        )
