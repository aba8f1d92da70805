"""What a run learns instead of the contrastive loss: to predict tokens of plain texts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pipeline.config.rules import require, strict


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
