"""Configure a training run: objective, loss, optimizer, chunks, checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config.data import DataConfig
from pipeline.config.loading import UserPath, require, strict
from pipeline.config.model import ModelConfig
from pipeline.errors import UserError


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MntpConfig:
    """Masked next-token prediction (LLM2Vec, BehnamGhader et al., arXiv 2404.05961, section 2.1).

    A masked token is predicted from the hidden state of the position before it.
    """

    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the tokens to predict."""
    replace: Literal["bert", "all"] = "bert"
    """`bert` puts the mask token in 80 %, a random token in 10 %, and leaves 10 % as they are
    (Devlin et al., arXiv 1810.04805, section 3.1); `all` always puts the mask token.
    """
    mask_token: str | None = None
    """The token to put; by default the tokenizer's mask token."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDiffusionConfig:
    """Masked diffusion (LLaDA, Nie et al., arXiv 2502.09992, equation 3).

    Each row draws t from U(0, 1) and masks each of its tokens with probability t.
    """

    shift: bool | None = None
    """Predict a token from the hidden state before it; by default as the model was pre-trained:
    LLaDA predicts in place, Dream and autoregressive models predict shifted. An export of LLaDA is
    loaded as a Llama: set `shift: false` for it.
    """
    mask_token: str | None = None
    """The token to put; by default the tokenizer's mask token."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NextTokenConfig:
    """Autoregressive language modelling: each token from the tokens before it."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Exactly one kind of token prediction."""

    mntp: MntpConfig | None = None
    """Masked next-token prediction."""
    masked_diffusion: MaskedDiffusionConfig | None = None
    """Masked diffusion."""
    next_token: NextTokenConfig | None = None
    """Next-token prediction; needs `model.attention: causal`."""

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
    """Learning a teacher's scores of a query's documents.

    KL(teacher || model) over a list of documents (Hinton et al., arXiv 1503.02531, where a query's
    list replaces the classes). Its share of the loss is `weight`, the contrastive term keeps the
    rest. `temperature` divides the teacher's scores.
    """

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The teacher's share of the loss; the contrastive term keeps the rest."""
    temperature: PositiveFloat = 1.0
    """The teacher's scores are divided by this."""
    documents: Literal["own", "batch"] = "own"
    """A query's positives and own negatives, by scores that the data hold (own), or all
    documents of the global batch, by the cosines of the vectors that mining stored (batch), for
    which a temperature of 0.02 to 0.1 is usual.
    """


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuideConfig:
    """Negatives left out by a teacher (GISTEmbed, Solatorio, arXiv 2402.16829, section 3).

    A document whose stored vector is closer to the query's than that of its best positive, less a
    margin, is no negative of it. The teacher does not run: mining stored its vectors.
    """

    margin: Annotated[float, Field(ge=-1, lt=1)] = 0.0
    """Leave out documents that come within this of the positive; below 0, only those that exceed
    it by as much.
    """
    margin_strategy: Literal["absolute", "relative"] = "absolute"
    """Subtract the margin itself from the positive's cosine (absolute), or that share of it
    (relative), so that 0.05 keeps negatives of at most 95 % of the positive's.
    """


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProjectionConfig:
    """Learning a teacher's vectors, through a matrix from the model's width to the teacher's.

    `weight` times the mean distance over all queries and documents of the batch is added to the
    loss. The matrix is trained with the model and is no part of an export.
    """

    distance: Literal["cosine", "squared"] = "cosine"
    """Of a projected vector to the teacher's, which has length 1: 1 less the cosine, or the squared
    distance.
    """
    weight: PositiveFloat = 1.0
    """The mean distance is multiplied by this."""
    lr: PositiveFloat = 1e-3
    """The highest learning rate of the matrix; it rises and decays as optimizer.lr does."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """InfoNCE over the global batch (van den Oord et al., arXiv 1807.03748, eq. 4).

    The defaults are cosine / 0.02 against every document of the batch. RepLLaMA's loss is
    `{similarity: scaled_dot, temperature: 1, negatives: own}`.
    """

    temperature: PositiveFloat = 0.02
    """Similarities are divided by this."""
    learn_temperature: bool = False
    """Learn the temperature, from this start."""
    similarity: Literal["cosine", "dot", "scaled_dot"] = "cosine"
    """Cosine normalises inside the loss; scaled_dot divides the dot product by the width."""
    negatives: Literal["batch", "own"] = "batch"
    """Contrast with all documents of the global batch, or with a query's own negatives only."""
    symmetric: bool = False
    """Add the loss of documents against queries."""
    matryoshka_dims: tuple[int, ...] = ()
    """Smaller widths to train in addition to the full one; the loss is the mean over all."""
    false_negative_margin: float | None = None
    """A negative that exceeds the query's best positive by more than this is left out."""
    guide: GuideConfig | None = None
    """Leave out negatives that a teacher holds closer than the positive, if the data hold its
    vectors.
    """
    distillation: DistillationConfig | None = None
    """Learn a teacher's scores, if the data hold them."""
    projection: ProjectionConfig | None = None
    """Learn a teacher's vectors through a projection, if the data hold them."""

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

    @property
    def distils_own(self) -> bool:
        """True where a teacher's scores of positives and own negatives are learned."""
        return self.distillation is not None and self.distillation.documents == "own"

    @property
    def distils_batch(self) -> bool:
        """True where a teacher's scores of all documents of the batch are learned."""
        return self.distillation is not None and self.distillation.documents == "batch"

    @property
    def needs_vectors(self) -> bool:
        """True where the loss reads a teacher's stored vectors."""
        return self.guide is not None or self.distils_batch or self.projection is not None

    def require_fit(self, *, width: int, has_scores: bool, has_vectors: bool) -> None:
        """Refuse a loss that the model or the data cannot have; called before a run starts.

        Args:
            width: of the embeddings.
            has_scores: whether the data hold a teacher's scores.
            has_vectors: whether they hold its vectors.

        Raises:
            UserError: a Matryoshka width is not below the embeddings' width, or the loss needs a
                teacher's scores or vectors and there are none.
        """
        for dim in self.matryoshka_dims:
            if dim >= width:
                raise UserError(
                    f"loss.matryoshka_dims: {dim}",
                    allowed=f"widths below the embeddings' width ({width}), which is always "
                    "trained",
                )
        if self.needs_vectors and not has_vectors:
            key = "distillation.documents" if self.distils_batch else "projection"
            key = "guide" if self.guide is not None else key
            raise UserError(
                f"loss.{key} is set but the data set holds no teacher vectors",
                fix="run `diffembed mine` with a teacher whose vectors are stored, or remove "
                f"loss.{key}",
            )
        if self.distils_own and not has_scores:
            raise UserError(
                "loss.distillation is set but the data set holds no teacher scores",
                fix="prepare the data with scores, or remove loss.distillation",
            )


# The weight of the past in a running mean of Adam.
Beta = Annotated[float, Field(ge=0, lt=1)]


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), warm-up and decay."""

    lr: PositiveFloat = 1e-4
    """The highest learning rate, reached after the warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment, which is 0 for a token that no text has."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0, description="0 for no clipping")] = 1.0
    """Gradients are scaled down to this global norm; 0: no clipping."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """The course of the learning rate after the warm-up."""
    decay_steps: PositiveInt | None = None
    """The step at which the decay would reach 0; num_steps by default, more for a run that ends
    before its learning rate does.
    """


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChunkConfig:
    """The chunks of a rank's share of the global batch, each one cached forward."""

    max_tokens: PositiveInt = 8192
    """Packed tokens of one forward; a longer text is a chunk alone."""
    max_cost: PositiveFloat | None = None
    """Sum over a chunk's texts of L * (1 + L / 32500), L in tokens; null: tokens alone decide."""
    min_chunks: PositiveInt = 1
    """Cut a step into at least this many chunks."""
    keep_graphs: NonNegativeInt | Literal["auto"] = 0
    """Schedule cache: this many chunks keep their graph and need no second forward. `auto`: as many
    as fit into memory by the plan.
    """
    boundaries: Literal["device", "host"] = "device"
    """Schedule sweep: the memory that holds the inputs of all layers until the backward."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """The steps at which a run saves a checkpoint, and the checkpoints that stay."""

    every: Annotated[int, Field(ge=1, description="steps")] = 100
    """Steps between two checkpoints."""
    keep_last: PositiveInt = 2
    """Older checkpoints than this many are deleted."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are never deleted."""
    mirror: UserPath | None = None
    """A folder on slower, safer storage to which every checkpoint is copied in the background."""

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
    """Scores of checkpoints during training."""

    every: PositiveInt
    """Steps between two scored checkpoints; a multiple of checkpoint.every."""
    config: UserPath
    """An evaluation's YAML; its last model gives the wording of queries."""
    where: Literal["slurm", "local"] = "slurm"
    """Separate Slurm jobs, or a process of low priority on the CPU of rank 0's node."""
    text_elements: PositiveInt | None = None
    """Slurm: array elements that share the texts of all tasks; null: one element for each task and
    length.
    """


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run: `pipeline/train.py CONFIG`."""

    output_dir: UserPath
    """The folder of the run."""
    num_steps: PositiveInt
    """Optimizer steps."""
    model: ModelConfig
    """The backbone."""
    data: DataConfig
    """The data."""
    seed: NonNegativeInt = 42
    """Seed of data order, dropout and new weights."""
    schedule: Literal["auto", "plain", "cache", "sweep"] = "auto"
    """plain keeps all graphs; cache runs each chunk twice; sweep runs layer by layer; auto takes
    the fastest that fits, by prediction, or the first where no speed is known.
    """
    chunks: ChunkConfig = dataclasses.field(default_factory=ChunkConfig)
    """The size of one forward."""
    objective: ObjectiveConfig | None = None
    """Token prediction instead of the contrastive loss; `loss` must then be left out."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """The contrastive loss."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """The schedule of checkpoints."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop with a dump of the batch, or skip the update."""
    deterministic: bool = False
    """The same bits in every run and after resuming, also on GPUs (of one kind; CPUs do so anyway).
    Costs time and some memory in the backward of attention, whose kernels then add up in a fixed
    order, and time in a few sums of the loss.
    """
    compile: bool = False
    """Fuse the norms, rotary positions and activations of layers by torch's compiler, which takes a
    minute or more at the start. Gradients change by rounding only; resuming is not bit-equal.
    """
    evaluate: EvaluateEveryConfig | None = None
    """Score checkpoints during training; null: do not."""
    log_every: Annotated[int, Field(ge=1, description="steps")] = 1
    """Steps between two printed lines; metrics.jsonl has every step."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Send metrics to these as well."""

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
        self._check_compilation()
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

    def _check_compilation(self) -> None:
        """Refuse settings that compiled layers cannot keep."""
        require(
            not (self.compile and self.deterministic),
            "compile",
            True,
            "false with deterministic",
            "the compiler orders sums by the sizes that it meets first, which resuming changes",
        )
        require(
            not (self.compile and self.model.trust_remote_code),
            "compile",
            True,
            "false with model.trust_remote_code",
            "the layers of a model with its own code are unknown to this package",
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
            self.data.candidates is None,
            "data.candidates",
            "given together with objective",
            "null",
            "token prediction has no negatives",
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
