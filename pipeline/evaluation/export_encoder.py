"""Texts to vectors with an export: tokenised once, longest first, packed without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.config import EvaluateConfig
from pipeline.evaluation.elements import Element, export_fingerprint
from pipeline.evaluation.encoder import EvaluatedEncoder
from pipeline.model.load import load_export


def load_encoder(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
    """Load an element's export: bfloat16 on a GPU, float32 elsewhere."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    export = load_export(element.model.path, device=device, dtype=dtype)
    encoder = PackedTextEncoder(
        export.encoder,
        export.tokenizer,
        max_length=config.max_length,
        max_tokens=config.max_tokens,
        device=device,
    )
    fingerprint = export_fingerprint(element.model.path)
    return EvaluatedEncoder(
        encoder=encoder,
        template=export.template,
        name=element.model.name,
        revision=f"{fingerprint}-length-{config.max_length}",
        max_length=config.max_length,
        num_dimensions=encoder.encode_texts(["."]).shape[1],
        precision=str(dtype).removeprefix("torch."),
    )


class PackedTextEncoder:
    """Embeds texts in forwards of at most `max_tokens` tokens, in order of length.

    Args:
        encoder: packed tokens (T,) and lengths (C,) -> (C, D) unit rows.
        tokenizer: the export's own, with its special tokens.
        max_length: tokens kept of each text.
        max_tokens: tokens of one forward.
        device: where the encoder is.
    """

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        *,
        max_length: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self._encoder = encoder.eval()
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._max_tokens = max_tokens
        self._device = device

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) texts -> (N, D) float32 unit rows, in the order given."""
        tokens = self._tokenizer(
            list(texts), truncation=True, max_length=self._max_length, padding=False
        )["input_ids"]
        lengths = np.array([len(row) for row in tokens])
        vectors = []
        chunks = list(chunks_by_length(lengths, self._max_tokens))
        for rows in chunks:
            packed = np.concatenate([np.asarray(tokens[row], dtype=np.int64) for row in rows])
            embeddings = self._encoder(
                torch.from_numpy(packed).to(self._device),
                torch.from_numpy(lengths[rows]).to(self._device),
            )
            vectors.append(embeddings.float().cpu().numpy())
        sorted_ND = np.concatenate(vectors)
        restored_ND = np.empty_like(sorted_ND)
        restored_ND[np.concatenate(chunks)] = sorted_ND
        return restored_ND


def chunks_by_length(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Rows of each forward: longest first, so that a shortage of memory shows at once.

    Args:
        lengths: (N,) tokens of each text.
        max_tokens: budget of a forward; a longer text gets a forward of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    start, total = 0, 0
    for place, row in enumerate(order):
        if place > start and total + lengths[row] > max_tokens:
            yield order[start:place]
            start, total = place, 0
        total += int(lengths[row])
    if start < len(order):
        yield order[start:]
