"""Load an export, or a sentence-transformers folder, as a packed encoder."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import (
    POOLINGS,
    ModelConfig,
    Pooling,
    RopeScaling,
    Template,
    build_config,
    pooling_mode,
)
from pipeline.errors import UserError, say_warning
from pipeline.model.architectures import FAMILIES
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.model.export_folder import (
    SETTINGS,
    Backbone,
    Compared,
    Cut,
    Lengths,
    Module,
    PoolingModes,
    PromptSettings,
    Trained,
    Worded,
    adapted_model,
    is_adapter,
    is_export,
    read_settings,
)
from pipeline.tokenizer import (
    ModelLimits,
    cut_before,
    instruction_characters,
    limits_of,
    load_tokenizer,
    tokens_within,
)

Similarity = Literal["cosine", "dot"]
# Packed tokens that a CPU takes at a time: larger ones leave its caches, and their tensors are so
# large that the allocator gives each back to the kernel and asks for new pages at every layer.
_CPU_TOKENS = 2048
# `Dense` keeps a vector's first numbers; see `export`.
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadedExport:
    """A model ready to embed strings.

    Attributes:
        encoder: the packed encoder, in evaluation mode on its device.
        tokenizer: a Hugging Face tokenizer.
        template: how instructions and texts become strings.
        similarity: by which vectors are compared.
        max_length: tokens after which a text is cut.
        num_dimensions: width of a vector.
        max_tokens: packed tokens of one forward; a longer text gets a forward of its own.
        limits: of the model; its number of tokens only where the tokenizer has more.
    """

    encoder: Encoder
    tokenizer: Any
    template: Template
    similarity: Similarity
    max_length: int
    num_dimensions: int
    max_tokens: int
    limits: ModelLimits

    def cut_at(self, length: int, *, key: str) -> LoadedExport:
        """Return the same model that cuts texts at another length.

        Args:
            length: in tokens.
            key: the config key or flag that asks for it.

        Raises:
            UserError: the model has no positions for it.
        """
        self.limits.require_length({key: length})
        return dataclasses.replace(self, max_length=length)

    def encode_texts(
        self, texts: Sequence[str], prefix: str = "", suffix: str = ""
    ) -> NDArray[np.float32]:
        """Embed texts that share an instruction.

        Args:
            texts: (N,) strings.
            prefix: what stands before each of them, from the template.
            suffix: what stands behind each of them, from the template.

        Returns:
            (N, D) float32 in the order given.
        """
        return self.encode_tokens(*self.tokenize(texts, prefix, suffix))

    def encode_tokens(self, ids: list[list[int]], skipped: list[int]) -> NDArray[np.float32]:
        """Embed what `tokenize` returned: (N, D) float32 in the order given."""
        out = np.zeros((len(ids), self.num_dimensions), dtype=np.float32)
        order, vectors = [], []
        with torch.inference_mode():
            for chosen, packed, lengths in self._packed(ids):
                left_out = self._on_device([skipped[i] for i in chosen])
                order += chosen
                vectors.append(self.encoder(packed, lengths, left_out))
            # Fetched at the end: a GPU that is waited for stands idle until its next work.
            if vectors:
                out[order] = torch.cat(vectors).cpu().numpy()
        return out

    def token_states(self, ids: list[list[int]]) -> list[Tensor]:
        """Hidden states of every token of each text after the final norm: (L, D) each, on the CPU.

        In the model's own type, which is as exact as they are.
        """
        out = [torch.empty(0)] * len(ids)
        with torch.inference_mode():
            for chosen, packed, lengths in self._packed(ids):
                states = self.encoder.hidden_states(packed, lengths).cpu()
                for i, rows in zip(chosen, torch.split(states, lengths.tolist()), strict=True):
                    out[i] = rows
        return out

    def _packed(self, ids: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """For each forward the texts it takes, their (T,) tokens on the device, (C,) lengths."""
        on_cpu = next(self.encoder.parameters()).device.type == "cpu"
        size = min(self.max_tokens, _CPU_TOKENS) if on_cpu else self.max_tokens
        for chosen in _chunks([len(row) for row in ids], size):
            packed = self._on_device([token for i in chosen for token in ids[i]])
            yield chosen, packed, torch.tensor([len(ids[i]) for i in chosen])

    def _on_device(self, values: list[int]) -> torch.Tensor:
        device = next(self.encoder.parameters()).device
        return torch.tensor(values).to(device, non_blocking=True)

    def tokenize(
        self, texts: Sequence[str], prefix: str = "", suffix: str = ""
    ) -> tuple[list[list[int]], list[int]]:
        """Token ids of each text in its frame, and how many of them are the prefix's.

        A text that is too long is cut; its prefix and suffix stay.
        """
        if not texts:
            return [], []
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
        # An empty string of a tokenizer without special tokens has no token to pool.
        filler = [self.tokenizer.pad_token_id or 0]
        rows = [row or filler for row in rows]
        if self.limits.num_tokens is not None:
            self.limits.require_token(max(map(max, rows)), where="a text to embed")
        if not count_prefix:
            return rows, [0] * len(rows)
        return rows, [
            min(tokens_within(offsets, instruction_characters(prefix)), len(row) - 1)
            for row, offsets in zip(rows, batch["offset_mapping"], strict=True)
        ]

    def _tokenize_whole(self, strings: list[str], suffix: str) -> tuple[Any, list[list[int]]]:
        """Tokenise strings with their suffix, and cut only what stands before it."""
        batch = self.tokenizer(
            [text + suffix for text in strings], return_offsets_mapping=True, verbose=False
        )
        return batch, [
            cut_before(ids, offsets, num_characters=len(text), max_length=self.max_length)
            for ids, offsets, text in zip(
                batch["input_ids"], batch["offset_mapping"], strings, strict=True
            )
        ]


def _chunks(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of texts that share a forward: longest first, so that running out shows at once."""
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
    """Load a folder in sentence-transformers layout.

    Args:
        path: an export, or a folder of a supported family in that layout.
        device: where the encoder goes.
        dtype: of the weights.
        max_tokens: packed tokens of one forward.
        dimensions: keep only so many of a vector's first numbers.
        rope_scaling: for texts longer than the export was trained on.

    Raises:
        UserError: a file is missing, or asks for something this package does not compute.
    """
    folder = Path(path)
    max_length: int | None
    if is_adapter(folder):
        config, max_length = (
            adapted_model(folder),
            read_settings(folder, SETTINGS, Cut)["max_length"],
        )
    else:
        config, max_length = _sentence_transformers_settings(folder)
    asked = {"dimensions": dimensions, "rope_scaling": rope_scaling}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if dimensions and config.dimensions and dimensions > config.dimensions:
        raise UserError(f"{dimensions} dimensions of {folder}", allowed=f"1 to {config.dimensions}")
    encoder = build_encoder(dataclasses.replace(config, dtype=dtype, **changes)).to(device)
    tokenizer = load_tokenizer(str(folder))
    limits = limits_of(encoder.model.config.to_dict(), str(folder))
    if limits.num_tokens is not None and max(tokenizer.get_vocab().values()) < limits.num_tokens:
        limits = dataclasses.replace(limits, num_tokens=None)
    return LoadedExport(
        encoder=encoder,
        tokenizer=tokenizer,
        template=_template(folder),
        similarity=_similarity(folder),
        max_length=_length_that_fits(folder, max_length, tokenizer, limits),
        limits=limits,
        num_dimensions=encoder.num_dimensions,
        max_tokens=max_tokens,
    )


def _similarity(folder: Path) -> Similarity:
    """Return the folder's own similarity; that of sentence-transformers is the cosine by default.

    Raises:
        UserError: it is another one, which no score here is made of.
    """
    name = "config_sentence_transformers.json"
    told = read_settings(folder, SETTINGS, Compared) if is_export(folder) else {}
    if "similarity" in told:
        similarity: Similarity = told["similarity"]
        return similarity
    if (folder / name).is_file():
        told = read_settings(folder, name, Compared)
    found = told.get("similarity_fn_name") or "cosine"
    if found not in ("cosine", "dot"):
        raise UserError(f"{folder / name}: similarity_fn_name {found!r}", allowed="cosine, dot")
    return "dot" if found == "dot" else "cosine"


def _length_that_fits(folder: Path, asked: int | None, tokenizer: Any, limits: ModelLimits) -> int:
    """The folder's own length, cut to the positions that its model has."""
    limit = limits.positions
    if asked is None:  # as sentence-transformers does
        return min(int(tokenizer.model_max_length), limit or limits.trained_length or sys.maxsize)
    if limit is None or asked <= limit:
        return asked
    say_warning(
        f"{folder}: it says {asked} tokens, its model has {limit} positions; texts are cut at "
        f"{limit}"
    )
    return limit


def _sentence_transformers_settings(folder: Path) -> tuple[ModelConfig, int | None]:
    modules = read_settings(folder, "modules.json", list[Module])
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    ours = is_export(folder)
    optional = [kind for kind in _MODULES[2:] if kind in kinds]
    if kinds != [*_MODULES[:2], *optional] or ("Dense" in kinds and not ours):
        raise UserError(
            f"{folder}/modules.json: {kinds}",
            allowed=f"{', '.join(_MODULES)}; the last two optional, Dense only in our exports",
        )
    prompts = folder / "config_sentence_transformers.json"
    told = read_settings(folder, prompts.name, PromptSettings) if prompts.is_file() else {}
    if told.get("truncate_dim") is not None:
        raise UserError(
            f"{prompts}: truncate_dim, which cuts vectors without normalising them again",
            fix="remove that key, and ask for the number of dimensions where vectors are made",
        )
    settings = read_settings(folder, "sentence_bert_config.json", Lengths)
    bidirectional = _is_bidirectional(read_settings(folder, "config.json", Backbone))
    trained = read_settings(folder, SETTINGS, Trained)["model"] if ours else {}
    config = ModelConfig(
        path=str(folder),
        attention="bidirectional" if bidirectional else "causal",
        pooling=_pooling(folder, modules[1]["path"]),
        pool_instruction=_pools_prompt(folder, modules[1]["path"]),
        normalize="Normalize" in kinds,
        dimensions=trained.get("dimensions") if "Dense" in kinds else None,
    )
    return config, settings.get("max_seq_length")


def _is_bidirectional(hf_config: dict[str, Any]) -> bool:
    """What transformers computes for this config.json: decoders are causal unless it says not."""
    family = FAMILIES.get(hf_config.get("model_type", ""))
    return not hf_config.get("is_causal", family is None or family.decoder)


def _pooling(folder: Path, name: str) -> Pooling:
    settings = read_settings(folder / name, "config.json", PoolingModes)
    mode = pooling_mode(settings)
    if mode not in POOLINGS:
        raise UserError(f"{folder}/{name}/config.json: {mode}", allowed=", ".join(POOLINGS))
    return POOLINGS[mode]


def _pools_prompt(folder: Path, name: str) -> bool:
    return bool(
        read_settings(folder / name, "config.json", PoolingModes).get("include_prompt", True)
    )


def _template(folder: Path) -> Template:
    """Ours where the folder is our export, else the prompts of sentence-transformers."""
    if is_export(folder):
        origin = str(folder / SETTINGS)
        template = read_settings(folder, SETTINGS, Worded)["template"]
        return build_config(Template, template, origin=origin)
    prompts = read_settings(folder, "config_sentence_transformers.json", PromptSettings).get(
        "prompts", {}
    )
    return Template(
        query=prompts.get("query", "") + "{text}", document=prompts.get("document", "") + "{text}"
    )
