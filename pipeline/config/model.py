"""Configure the model, and read the declarations of a sentence-transformers folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from pipeline.config.loading import PathText, UserPath, require, strict
from pipeline.errors import UserError

# The start of the small text file that Git LFS leaves in place of each file not fetched.
_LFS = b"version https://git-lfs"
Pooling = Literal["mean", "weighted_mean", "last_token", "first_token"]
# Our poolings by the names of sentence-transformers.
POOLINGS: dict[str, Pooling] = {
    "mean": "mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
    "cls": "first_token",
}
# The older form, one boolean for each pooling; text-embeddings-inference reads nothing else.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_mode(settings: Mapping[str, Any]) -> str:
    """Return sentence-transformers' name of a pooling, from its config.json, new or old."""
    mode = settings.get("pooling_mode")
    if mode is None:
        # With no flag at all it is the mean there.
        return "+".join(kind for key, kind in POOLING_FLAGS.items() if settings.get(key)) or "mean"
    several = not isinstance(mode, list) or len(mode) != 1
    return str(mode if several else mode[0])


# Of these, sentence-transformers reads the first one that exists.
SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Modules of sentence-transformers that a model section describes, and one that changes no vector.
_DESCRIBED = ("Transformer", "Pooling", "Normalize", "Dropout")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """The declarations of a sentence-transformers folder; None and empty in any other folder.

    Attributes:
        pooling: sentence-transformers' name.
        normalize: its vectors are normalised.
        prompts: the characters put before texts, by name.
        pool_prompt: the tokens of a prompt are part of the pooling.
        others: modules that a model section cannot describe, such as a projection.
        dimensions: how many of a vector's first numbers are kept; None: all.
    """

    pooling: str | None = None
    normalize: bool | None = None
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    pool_prompt: bool = True
    others: tuple[str, ...] = ()
    dimensions: int | None = None


def read_declared(path: str, revision: str | None = None) -> Declared:
    """Read a local folder, or the local cache of a hub name; never use a network.

    A damaged file counts as absent: code that loads such a folder as an embedder refuses it.
    """
    # A folder with this file is a sentence-transformers one.
    modules = _read(path, "modules.json", revision)
    if not isinstance(modules, list):
        return Declared()
    kinds = {
        str(module.get("type")).rpartition(".")[2]: str(module.get("path"))
        for module in modules
        if isinstance(module, dict)
    }
    settings = None
    if "Pooling" in kinds:
        settings = _read(path, str(Path(kinds["Pooling"], "config.json")), revision)
    stated = _read(path, "config_sentence_transformers.json", revision)
    stated = stated if isinstance(stated, dict) else {}
    prompts, width = stated.get("prompts"), stated.get("truncate_dim")
    described: tuple[str, ...] = _DESCRIBED
    own = _read(path, "diffembed.json", revision)
    if isinstance(own, dict) and isinstance(own.get("model"), dict):
        # The Dense of our own exports only keeps the first numbers.
        described, width = (*_DESCRIBED, "Dense"), own["model"].get("dimensions")
    return Declared(
        pooling=pooling_mode(settings) if isinstance(settings, dict) else None,
        normalize="Normalize" in kinds,
        prompts={str(k): str(v) for k, v in prompts.items() if v}
        if isinstance(prompts, dict)
        else {},
        pool_prompt=not (isinstance(settings, dict) and settings.get("include_prompt") is False),
        others=tuple(kind for kind in kinds if kind not in described),
        dimensions=width if isinstance(width, int) else None,
    )


def default_pooling(path: str, revision: str | None) -> Pooling:
    """Return the pooling of a model whose config names none: the declared one, or the mean.

    Raises:
        UserError: the declared one does not exist here.
    """
    declared = read_declared(path, revision).pooling
    if declared is None:
        return "mean"
    if declared not in POOLINGS:
        raise UserError(
            f"model.pooling: not given, and {path} declares {declared!r}",
            allowed=", ".join(sorted(POOLINGS.values())),
            fix="set model.pooling to one of them; the model is then trained to it",
        )
    return POOLINGS[declared]


def _read(path: str, name: str, revision: str | None) -> Any:
    file = local_file(path, name, revision)
    try:
        return json.loads(file.read_text()) if file else None
    except (OSError, ValueError):
        return None


# What `model.path` may be.
MODEL_PATHS = "a folder in Hugging Face layout, or a model name in the local cache"


def require_model_path(path: str, *, key: str) -> None:
    """Refuse a path without a folder; a possible name on the hub is left to the hub's client.

    Args:
        path: a folder of this machine, or a name on the hub.
        key: the config key that gives it.

    Raises:
        UserError: it is a file, or a path that does not exist.
    """
    if Path(path).is_dir():
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(path).exists():
        raise UserError(f"{key}: {path} is a file", allowed=MODEL_PATHS, fix="name its folder")
    try:
        validate_repo_id(path)
    except HFValidationError:
        found = f"{key}: {path}: no such folder"
        fix = f"correct {key}, or put the folder back"
        raise UserError(found, allowed=MODEL_PATHS, fix=fix) from None


def model_fix(path: str) -> str:
    """Return advice for a model whose files cannot be read."""
    folder = Path(path)
    if any(_is_pointer(file) for file in folder.glob("*")):
        return f"run `git lfs pull` in {path}, whose large files are not there yet"
    if folder.is_dir():
        return f"fetch {path} again, or name another folder"
    return f"correct the name, or run `hf download {path}` where there is a network"


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS)) == _LFS
    except OSError:
        return False


def local_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """Find a file in a model's folder, or in the local cache of a hub name; use no network."""
    folder = Path(path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    # Inside, because the hub's client takes a while to import.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:
        return None  # a path that does not exist
    return Path(cached) if isinstance(cached, str) else None


Attention = Literal["bidirectional", "causal"]


def _read_targets(value: Any) -> Any:
    """Take peft's word for every layer as an item of a list too."""
    return "all-linear" if value in (["all-linear"], ("all-linear",)) else value


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685)."""

    rank: PositiveInt = 16
    """The rank of the update."""
    alpha: PositiveInt = 32
    """The update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the adapters' inputs."""
    targets: Annotated[
        Literal["all-linear"] | tuple[str, ...], BeforeValidator(_read_targets)
    ] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """The last components of module names, or every linear layer."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732)."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Rotary positions for texts longer than the model was trained on, by transformers' own rules.

    linear: positions are divided by the factor (Chen et al., arXiv 2306.15595). ntk: the base grows
    to theta * factor ** (d / (d - 2)), d the width of a head (Peng et al., arXiv 2309.00071,
    section 3.1). yarn: by wavelength, with a temperature (the same, section 3.4).
    """

    kind: Literal["linear", "ntk", "yarn"]
    """The rule of scaling."""
    factor: Annotated[float, Field(gt=1)]
    """The longest text, in multiples of the length the model was trained on."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The backbone, its attention, and the pooling of its hidden states to one vector."""

    path: PathText
    """A folder in Hugging Face layout, or a model name in the local cache."""
    revision: str | None = None
    """The commit on the hub; null: the one in the cache."""
    trust_remote_code: bool = False
    """Run the code that came with the model; only with a pinned `revision`."""
    attention: Attention = "bidirectional"
    """Tokens attend to the whole text, or to earlier tokens only."""
    pooling: Pooling = None  # type: ignore[assignment]
    """By default the pooling that a sentence-transformers folder declares, otherwise mean."""
    pool_instruction: bool = True
    """Include the tokens of an instruction in the pooling; they are always attended to."""
    normalize: bool = True
    """Return vectors of length 1."""
    dimensions: PositiveInt | None = None
    """Vectors keep only this many first numbers (arXiv 2205.13147); null keeps all."""
    rope_scaling: RopeScaling | None = None
    """Rotary positions for texts longer than the model was trained on."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The type of weights and arithmetic; masters and moments are always float32."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout on attention weights (SimCSE); null: the model's own."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of layers and compute each layer again in the backward."""
    adapter: PathText | None = None
    """A peft adapter to start from: merge it into the weights, or continue to train it."""
    adapter_use: Literal["merge", "continue"] = "merge"
    """Merge `adapter` into the weights, or continue to train it."""
    merged_adapters: tuple[PathText, ...] = ()
    """Adapters to merge into the weights before that one, in this order."""
    lora: LoraConfig | None = None
    """Train a new adapter; null: train all weights."""

    def __post_init__(self) -> None:
        # Resolved here, so that a dumped config states the pooling that was used.
        if self.pooling is None:
            chosen = default_pooling(self.path, self.revision)  # type: ignore[unreachable]
            object.__setattr__(self, "pooling", chosen)
        require(
            self.adapter_use == "merge" or (self.adapter is not None and self.lora is None),
            "model.adapter_use",
            self.adapter_use,
            "continue only with model.adapter and without model.lora",
            "remove model.lora; an adapter that continues has its own rank and targets",
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
        """All adapters to merge into the weights before training, in order."""
        last = self.adapter if self.adapter_use == "merge" else None
        return self.merged_adapters if last is None else (*self.merged_adapters, last)


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StarterConfig:
    """A small untrained model and its tokenizer: `diffembed starter CONFIG`."""

    output_dir: UserPath
    """The folder of model and tokenizer to write."""
    corpus: Annotated[tuple[UserPath, ...], Field(min_length=1, description="file")]
    """Texts to train the tokenizer on: JSON lines, or plain text."""
    vocab_size: Annotated[int, Field(ge=300, description="256 are bytes")] = 4096
    """Tokens of the vocabulary."""
    hidden_size: PositiveInt = 128
    """The width of hidden states."""
    num_layers: PositiveInt = 2
    """Layers of the model."""
    num_heads: PositiveInt = 4
    """Query heads of a layer."""
    num_kv_heads: PositiveInt = 2
    """Key and value heads of a layer."""
    intermediate_size: PositiveInt = 384
    """The width inside the feed-forward blocks."""
    max_position_embeddings: Annotated[int, Field(ge=1, description="tokens")] = 4096
    """The longest text."""
    seed: NonNegativeInt = 0
    """Seed of the weights."""
