"""Configure a training run: objective, loss, optimizer, chunks, checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.rules import UserPath, require, strict


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MntpConfig:
    """Masked next-token prediction (LLM2Vec, BehnamGhader et al., arXiv 2404.05961, section 2.1).

    A masked token is predicted from the hidden state before it.

    Args:
        mask_rate: share of the tokens that are predicted.
        replace: `bert` puts the mask token in 80 %, a random token in 10 %, and leaves 10 % as they
            are (Devlin et al., arXiv 1810.04805, section 3.1); `all` always puts the mask token.
        mask_token: the token to put; by default the tokenizer's mask token.
    """

    mask_rate: float = 0.2
    replace: Literal["bert", "all"] = "bert"
    mask_token: str | None = None

    def __post_init__(self) -> None:
        rate = self.mask_rate
        require(0 < rate < 1, "objective.mntp.mask_rate", rate, "0 < mask_rate < 1")


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDiffusionConfig:
    """Masked diffusion (LLaDA, Nie et al., arXiv 2502.09992, equation 3).

    Each row draws t from U(0, 1) and masks each of its tokens with probability t.

    Args:
        shift: whether a token is predicted from the hidden state before it; by default as the
            model was made: LLaDA predicts in place, Dream and autoregressive models shifted. An
            export of LLaDA is a Llama to all that load it: say `shift: false` there.
        mask_token: the token to put; by default the tokenizer's mask token.
    """

    shift: bool | None = None
    mask_token: str | None = None


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NextTokenConfig:
    """Autoregressive language modelling: each token from those before it."""


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

    KL(teacher || model) over that list (Hinton et al., arXiv 1503.02531, with the list of one query
    in the place of the classes). Its share of the loss is `weight`, the contrastive term keeps the
    rest. `temperature` divides the teacher's scores.
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        key = "loss.distillation"
        require(0 < self.weight <= 1, f"{key}.weight", self.weight, "0 < weight <= 1")
        require(self.temperature > 0, f"{key}.temperature", self.temperature, "a number > 0")


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """InfoNCE over the global batch (van den Oord et al., arXiv 1807.03748, eq. 4).

    The defaults are cosine / 0.02 against every document of the batch. RepLLaMA's loss is
    `{similarity: scaled_dot, temperature: 1, negatives: own}`.
    """

    temperature: float = 0.02
    learn_temperature: bool = False
    # cosine normalises inside the loss; scaled_dot divides the dot product by the width.
    similarity: Literal["cosine", "dot", "scaled_dot"] = "cosine"
    negatives: Literal["batch", "own"] = "batch"
    symmetric: bool = False
    # Widths trained beside the full one; the loss is the mean over all of them.
    matryoshka_dims: tuple[int, ...] = ()
    # A negative more similar than the query's best positive by more than this does not count.
    false_negative_margin: float | None = None
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        require(self.temperature > 0, "loss.temperature", self.temperature, "a number > 0")
        require(
            not (self.symmetric and self.negatives == "own"),
            "loss.symmetric",
            True,
            "true only with loss.negatives: batch",
            "a document has no negatives of its own; set loss.symmetric: false",
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

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    # The step at which the decay would reach 0; num_steps by default, more for a run that ends
    # before its learning rate does.
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "a number > 0")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, ">= 0")
        require(
            self.max_grad_norm >= 0,
            "optimizer.max_grad_norm",
            self.max_grad_norm,
            "a number > 0, or 0 for no clipping",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChunkConfig:
    """How a rank's share of the global batch is cut into cached forwards."""

    max_tokens: int = 8192
    # Sum over a chunk's texts of L * (1 + L / 32500), L in tokens; null: tokens alone decide.
    max_cost: float | None = None
    min_chunks: int = 1
    # schedule cache: this many chunks keep their graph and are spared the second forward.
    # `auto`: as many as the planner finds room for.
    keep_graphs: int | Literal["auto"] = 0
    # schedule sweep: where the inputs of all layers wait for the backward.
    boundaries: Literal["device", "host"] = "device"

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "chunks.max_tokens", self.max_tokens, "an integer >= 1")
        cost = self.max_cost
        require(cost is None or cost > 0, "chunks.max_cost", cost, "a number > 0, or null")
        require(self.min_chunks >= 1, "chunks.min_chunks", self.min_chunks, "an integer >= 1")
        kept = self.keep_graphs
        require(kept == "auto" or kept >= 0, "chunks.keep_graphs", kept, "auto, or an integer >= 0")


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run saves itself, and which saves are kept."""

    every: int = 100
    keep_last: int = 2
    # Checkpoints whose step is a multiple of this stay for good.
    keep_every: int | None = None
    # A folder on slower, safer storage that every checkpoint is copied to, in the background.
    mirror: UserPath | None = None

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "an integer >= 1 (steps)")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "an integer >= 1")
        kept = self.keep_every
        require(
            kept is None or (kept >= 1 and kept % self.every == 0),
            "checkpoint.keep_every",
            kept,
            f"a multiple of checkpoint.every ({self.every}), or null",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateEveryConfig:
    """Scores of checkpoints while training goes on.

    Args:
        every: steps between two that are scored; a multiple of checkpoint.every.
        config: an evaluation's YAML; its last model says how queries are worded.
        where: jobs of their own, or a process of low priority on the CPU beside rank 0.
        text_elements: slurm: array elements that share the texts of all tasks; null: one element
            for each task and length.
    """

    every: int
    config: UserPath
    where: Literal["slurm", "local"] = "slurm"
    text_elements: int | None = None


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run: `pipeline/train.py CONFIG`."""

    output_dir: UserPath
    num_steps: int
    model: ModelConfig
    data: DataConfig
    seed: int = 42
    schedule: Literal["auto", "plain", "cache", "sweep"] = "auto"
    chunks: ChunkConfig = dataclasses.field(default_factory=ChunkConfig)
    # Token prediction instead of the contrastive loss; what `loss` says then means nothing.
    objective: ObjectiveConfig | None = None
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    # A loss or gradient that is not finite: end the run with a dump, or leave the step out.
    non_finite: Literal["stop", "skip"] = "stop"
    evaluate: EvaluateEveryConfig | None = None
    log_every: int = 1
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "num_steps", self.num_steps, "an integer >= 1")
        every = self.evaluate.every if self.evaluate else self.checkpoint.every
        require(
            every >= 1 and every % self.checkpoint.every == 0,
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
        require(self.log_every >= 1, "log_every", self.log_every, "an integer >= 1 (steps)")
        self._check_schedule()
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
        """Refuse what a schedule would do anyway, or cannot do."""
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
            "a sweep already computes one layer at a time again",
        )

    def _check_token_prediction(self, objective: ObjectiveConfig) -> None:
        """Refuse what the prediction of tokens would silently ignore."""
        require(
            self.loss == LossConfig(),
            "loss",
            "given beside objective",
            "one of the two",
            "remove loss, or remove objective to train contrastively",
        )
        require(
            self.schedule != "plain" and self.chunks.keep_graphs == 0,
            "schedule, chunks.keep_graphs",
            (self.schedule, self.chunks.keep_graphs),
            "auto, cache or sweep, and 0, beside objective",
            "tokens are predicted chunk by chunk: there is nothing to keep",
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
            "false beside objective",
            "of a model's own code this package knows the vectors, not the head",
        )
