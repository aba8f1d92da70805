"""Load an export, or a sentence-transformers folder, as a packed encoder.

    folder -> ModelConfig -> encoder                   (`load_export`)
    texts  -> prefix + text + suffix -> token ids      (`tokenize`)
    ids    -> forwards of `max_tokens`, longest texts first -> (N, D) vectors in the given order

Everything is read from the folder: pooling, normalisation, prompts, similarity and lengths. What
this package does not compute (another pooling, a projection) is refused rather than ignored.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import (
    POOLINGS,
    SENTENCE_CONFIGS,
    ModelConfig,
    Pooling,
    RopeScaling,
    Template,
    build_config,
    pooling_mode,
)
from pipeline.errors import UserError
from pipeline.model.architectures import FAMILIES, known_kinds
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.model.export_folder import (
    SETTINGS,
    BackboneConfig,
    ExportSettings,
    ModuleEntry,
    NormalizeConfig,
    PoolingConfig,
    SentenceBertConfig,
    SentenceTransformersConfig,
    adapted_model_config,
    holds_adapter,
    is_adapter_only,
    is_export,
    read_settings,
)
from pipeline.model.weights import Placement
from pipeline.model_limits import ModelLimits, limits_of
from pipeline.tokenizer import (
    cut_before,
    instruction_characters,
    load_tokenizer,
    row_without_text,
    tokens_within,
)

Similarity = Literal["cosine", "dot"]
_DECLARED = "config_sentence_transformers.json"
# Packed tokens of one forward on a CPU, at most. More would not fit its caches, and tensors of that
# size are returned to the kernel after every layer, so that each layer pays for fresh pages.
_CPU_TOKENS = 2048
# Arguments in sentence-transformers' settings that change no vector.
_HARMLESS = {"padding_side", "use_fast", "trust_remote_code", "use_cache", "attn_implementation"}
_TASK = "feature-extraction"
# In this order; `Dense` keeps a vector's first numbers and is read only in our own exports.
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadedExport:
    """A model ready to embed strings.

    Attributes:
        encoder: the packed encoder, in evaluation mode on its device.
        tokenizer: a Hugging Face tokenizer.
        template: how instructions and texts become strings.
        similarity: how vectors are compared.
        max_length: tokens after which a text is cut.
        num_dimensions: width of a vector.
        max_tokens: packed tokens of one forward; a longer text is run alone.
        limits: of the model; `num_tokens` is None if the tokenizer cannot exceed it.
    """

    encoder: Encoder
    tokenizer: Any
    template: Template
    similarity: Similarity
    max_length: int
    num_dimensions: int
    max_tokens: int = 16384
    limits: ModelLimits

    def with_max_length(self, length: int, *, key: str) -> LoadedExport:
        """Return the same model with another length at which texts are cut.

        Args:
            length: in tokens.
            key: the config key or flag that sets it.

        Raises:
            UserError: the model has no positions for it.
        """
        self.limits.require_length({key: length})
        return dataclasses.replace(self, max_length=length)

    def encode_texts(
        self, texts: Sequence[str], prefix: str = "", suffix: str = ""
    ) -> NDArray[np.float32]:
        """Embed texts that share a prefix and a suffix.

        Args:
            texts: (N,) strings.
            prefix: text before each of them, from the template.
            suffix: text after each of them, from the template.

        Returns:
            (N, D) float32 in the order given.
        """
        return self.encode_tokens(*self.tokenize(texts, prefix, suffix))

    def encode_tokens(self, ids: list[list[int]], prefix_tokens: list[int]) -> NDArray[np.float32]:
        """Embed the rows that `tokenize` returned: (N, D) float32 in the order given."""
        out = np.zeros((len(ids), self.num_dimensions), dtype=np.float32)
        order, vectors = [], []
        with torch.inference_mode():
            for chosen, packed, lengths in self._forwards(ids):
                not_pooled = self._on_device([prefix_tokens[i] for i in chosen])
                order += chosen
                vectors.append(self.encoder(packed, lengths, not_pooled))
            # Copied once at the end: each copy would wait for the GPU and leave it idle.
            if vectors:
                out[order] = torch.cat(vectors).cpu().numpy()
        return out

    def token_states(self, ids: list[list[int]]) -> list[Tensor]:
        """Return the hidden states of each text after the final norm: (L, D) each, on the CPU.

        They keep the model's dtype, because float32 would add no precision.
        """
        out = [torch.empty(0)] * len(ids)
        with torch.inference_mode():
            for chosen, packed, lengths in self._forwards(ids):
                states = self.encoder.hidden_states(packed, lengths).cpu()
                for i, rows in zip(chosen, torch.split(states, lengths.tolist()), strict=True):
                    out[i] = rows
        return out

    def _forwards(self, ids: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield for each forward the texts in it, their (T,) tokens on the device, (C,) lengths."""
        on_cpu = self._device.type == "cpu"
        size = min(self.max_tokens, _CPU_TOKENS) if on_cpu else self.max_tokens
        for chosen in _group_texts([len(row) for row in ids], size):
            packed = self._on_device([token for i in chosen for token in ids[i]])
            # Lengths stay on the host, where the encoder reads them.
            yield chosen, packed, torch.tensor([len(ids[i]) for i in chosen])

    def _on_device(self, values: list[int]) -> Tensor:
        return torch.tensor(values).to(self._device, non_blocking=True)

    @property
    def _device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def tokenize(
        self, texts: Sequence[str], prefix: str = "", suffix: str = ""
    ) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of each text with prefix and suffix, and each prefix's token count.

        A text that is too long is cut; its prefix and suffix are kept. The counts are 0 where the
        model pools the prefix.
        """
        if not texts:
            return [], []
        # Offsets take time, so they are computed only where a prefix is to be left out.
        count_prefix = bool(prefix) and not self.encoder.config.pool_instruction
        strings = [prefix + text for text in texts]
        if suffix:
            batch, rows = self._tokenize_whole(strings, suffix)
        else:
            batch = self.tokenizer(
                strings,
                truncation=True,
                max_length=self.max_length,
                return_offsets_mapping=count_prefix,
            )
            rows = batch["input_ids"]
        # A tokenizer without special tokens makes no token of "".
        rows = [row or row_without_text(self.tokenizer.eos_token_id) for row in rows]
        if self.limits.num_tokens is not None:
            self.limits.require_token(max(map(max, rows)), where="a text to embed")
        if not count_prefix:
            return rows, [0] * len(rows)
        # One fewer than the row has, at most: pooling needs a token that is not the prefix's.
        return rows, [
            min(tokens_within(offsets, instruction_characters(prefix)), len(row) - 1)
            for row, offsets in zip(rows, batch["offset_mapping"], strict=True)
        ]

    def _tokenize_whole(self, strings: list[str], suffix: str) -> tuple[Any, list[list[int]]]:
        """Tokenise strings with their suffix, and cut only the part before it."""
        # `verbose=False`: no warning about texts that are too long, since they are cut here.
        batch = self.tokenizer(
            [text + suffix for text in strings], return_offsets_mapping=True, verbose=False
        )
        return batch, [
            cut_before(ids, offsets, num_characters=len(text), max_length=self.max_length)
            for ids, offsets, text in zip(
                batch["input_ids"], batch["offset_mapping"], strings, strict=True
            )
        ]


def _group_texts(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of texts that share a forward.

    Longest first, so that running out of memory shows at once.
    """
    chosen: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chosen and total + lengths[index] > max_tokens:
            yield chosen
            chosen, total = [], 0
        chosen.append(index)
        total += lengths[index]
    if chosen:
        yield chosen


def load_export(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_tokens: int = 16384,
    dimensions: int | None = None,
    rope_scaling: RopeScaling | None = None,
) -> LoadedExport:
    """Load an export of ours, or a supported model in sentence-transformers layout.

    Args:
        path: the folder.
        device: where the encoder goes.
        dtype: of the weights.
        max_tokens: packed tokens of one forward.
        dimensions: how many of a vector's first numbers to keep; None: as exported.
        rope_scaling: for texts longer than in training.

    Raises:
        UserError: a file is missing, or declares a model that this package does not compute.
    """
    folder = Path(path)
    config: ModelConfig
    max_length: int | None
    if is_adapter_only(folder):
        config = adapted_model_config(folder)
        max_length = read_settings(folder, SETTINGS, ExportSettings, "max_length")["max_length"]
    else:
        config, max_length = _read_modules(folder)
    overrides = {"dimensions": dimensions, "rope_scaling": rope_scaling}
    changes: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    if dimensions and config.dimensions and dimensions > config.dimensions:
        raise UserError(f"{dimensions} dimensions of {folder}", allowed=f"1 to {config.dimensions}")
    config = dataclasses.replace(config, dtype=dtype, **changes)
    # An export is a transformers model like any other, so it is built as a base model would be. Its
    # weights are read straight to the device: a node's memory might not hold one copy for each of
    # its processes.
    encoder = build_encoder(config, placement=Placement(device)).to(device)
    tokenizer = load_tokenizer(str(folder))
    limits = limits_of(encoder.model.config.to_dict(), str(folder))
    # Checking every text for too large ids costs time, and most tokenizers cannot give any.
    if limits.num_tokens is not None and max(tokenizer.get_vocab().values()) < limits.num_tokens:
        limits = dataclasses.replace(limits, num_tokens=None)
    if max_length is None:  # as sentence-transformers does
        longest = limits.positions or limits.trained_length or sys.maxsize
        max_length = min(int(tokenizer.model_max_length), longest)
    return LoadedExport(
        encoder=encoder,
        tokenizer=tokenizer,
        template=read_template(folder),
        similarity=_read_similarity(folder),
        max_length=limits.cut_length(max_length, where=str(folder)),
        limits=limits,
        num_dimensions=encoder.num_dimensions,
        max_tokens=max_tokens,
    )


class NotComputedError(UserError):
    """A sentence-transformers folder whose vectors only that package computes."""


def is_computed(folder: Path) -> bool:
    """Return False for a sentence-transformers folder that only that package computes.

    That is a folder of another kind of backbone, or of a form that `load_export` refuses.
    """
    if is_export(folder):
        return True
    try:
        _read_modules(folder)
    except NotComputedError:
        return False
    return read_settings(folder, "config.json", BackboneConfig)["model_type"] in known_kinds()


def _read_modules(folder: Path) -> tuple[ModelConfig, int | None]:
    """Read a folder in sentence-transformers layout: the model section, and the largest length."""
    if holds_adapter(folder):
        raise NotComputedError(
            f"{folder}: an adapter that `diffembed export` did not write",
            allowed="whole models, and exports of ours",
            fix="merge it into its base model with peft and save both as one folder; or name it as "
            "model.adapter in a training config, and export that",
        )
    modules = read_settings(folder, "modules.json", list[ModuleEntry])
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    ours = is_export(folder)
    _require_known_modules(folder, modules, kinds, ours=ours)
    backbone = read_settings(folder, "config.json", BackboneConfig)
    trained: dict[str, Any] = {}
    if ours:
        trained = read_settings(folder, SETTINGS, ExportSettings, "model")["model"]
    pooling, pool_instruction = _read_pooling(folder, modules[1]["path"])
    config = ModelConfig(
        path=str(folder),
        attention="bidirectional" if _is_bidirectional(backbone) else "causal",
        pooling=pooling,
        pool_instruction=pool_instruction,
        normalize="Normalize" in kinds,
        # Our own Dense only keeps the first numbers, so its weights need not be read.
        dimensions=trained.get("dimensions") if "Dense" in kinds else None,
    )
    name = next((name for name in SENTENCE_CONFIGS if (folder / name).is_file()), None)
    texts = read_settings(folder, name, SentenceBertConfig) if name else {}
    if beyond := _beyond_reading(texts):
        raise NotComputedError(
            f"{folder / str(name)}: {', '.join(beyond)}",
            allowed="max_seq_length, do_lower_case",
            fix="remove them if vectors without them are wanted",
        )
    return config, texts.get("max_seq_length")


def _require_known_modules(
    folder: Path, modules: list[ModuleEntry], kinds: list[str], *, ours: bool
) -> None:
    """Refuse modules that would change the vectors in another way than a model section can say."""
    optional = [kind for kind in _MODULES[2:] if kind in kinds]
    # Exactly these modules in this order: any other one would change the vectors.
    if kinds != [*_MODULES[:2], *optional] or ("Dense" in kinds and not ours):
        raise NotComputedError(
            f"{folder}/modules.json: {kinds}",
            allowed=f"{', '.join(_MODULES)}; the last two optional, Dense only in our exports",
        )
    if modules[0]["path"] not in ("", "."):
        raise NotComputedError(
            f"{folder}/modules.json: the Transformer lies in {modules[0]['path']!r}",
            allowed="the top of the folder",
            fix="load and save the folder with a new sentence-transformers, which moves it there",
        )
    last = folder / modules[-1]["path"]
    if "Normalize" in kinds and (last / "config.json").is_file():
        over = read_settings(last, "config.json", NormalizeConfig).get("module_input_name")
        if over not in (None, "sentence_embedding"):
            raise NotComputedError(
                f"{last / 'config.json'}: module_input_name {over!r}", allowed="sentence_embedding"
            )
    if _read_declared(folder).get("truncate_dim") is not None:
        raise NotComputedError(
            f"{folder / _DECLARED}: truncate_dim, which cuts vectors without normalising them "
            "again",
            fix="remove that key, and give the number of dimensions where vectors are made",
        )


def _beyond_reading(texts: Mapping[str, Any]) -> list[str]:
    """Return the settings with which sentence-transformers reads texts as this package does not."""
    cuts = ("query_length", "document_length", "query_expansion", "processing_kwargs")
    found = [key for key in cuts if texts.get(key)]
    given = ("tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
    found += [f"{key}.{name}" for key in given for name in texts.get(key, {}).keys() - _HARMLESS]
    if texts.get("transformer_task", _TASK) != _TASK:
        found.append("transformer_task")
    # Otherwise texts would go through a chat template.
    if "text" not in texts.get("modality_config", {"text": None}):
        found.append("modality_config")
    return sorted(found)


def _read_declared(folder: Path) -> SentenceTransformersConfig:
    """Read prompts and similarity, which a folder need not declare: E5's does not."""
    if not (folder / _DECLARED).is_file():
        return {}
    return read_settings(folder, _DECLARED, SentenceTransformersConfig)


def _is_bidirectional(hf_config: BackboneConfig) -> bool:
    """Return True for an encoder, or a decoder with `is_causal: false`, as transformers runs it."""
    family = FAMILIES.get(hf_config["model_type"])
    return not hf_config.get("is_causal", family is None or family.decoder)


def _read_pooling(folder: Path, name: str) -> tuple[Pooling, bool]:
    """Read the pooling, and whether the prompt's tokens are part of it."""
    settings = read_settings(folder / name, "config.json", PoolingConfig)
    mode = pooling_mode(settings)
    if mode not in POOLINGS:
        raise NotComputedError(f"{folder}/{name}/config.json: {mode}", allowed=", ".join(POOLINGS))
    return POOLINGS[mode], bool(settings.get("include_prompt", True))


def read_template(folder: Path) -> Template:
    """Read our own template, or make one from the prompts of sentence-transformers."""
    if is_export(folder):
        settings = read_settings(folder, SETTINGS, ExportSettings, "template")
        return build_config(Template, settings["template"], origin=str(folder / SETTINGS))
    # There a prompt is a plain prefix, and these are the names of the two roles.
    prompts = _read_declared(folder).get("prompts", {})
    return Template(
        query=prompts.get("query", "") + "{text}", document=prompts.get("document", "") + "{text}"
    )


def _read_similarity(folder: Path) -> Similarity:
    """Read how vectors are compared: by the cosine, if a folder does not declare it.

    Raises:
        UserError: it is neither cosine nor dot product.
    """
    if is_export(folder):
        settings = read_settings(folder, SETTINGS, ExportSettings)
        if "similarity" in settings:  # earlier versions did not write it
            return settings["similarity"]
    found = _read_declared(folder).get("similarity_fn_name")
    if found not in (None, "", "cosine", "dot"):
        raise UserError(
            f"{folder / _DECLARED}: similarity_fn_name {found!r}", allowed="cosine, dot"
        )
    return "dot" if found == "dot" else "cosine"
