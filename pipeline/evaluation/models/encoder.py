"""An embedding model as mteb wants to see it: satisfies its protocols, inherits nothing from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.config import EvaluateConfig, Precision, Template
from pipeline.evaluation.models.fingerprints import model_fingerprint
from pipeline.evaluation.models.finite import not_finite_fix, require_finite
from pipeline.evaluation.tasks.elements import Element
from pipeline.evaluation.tasks.library import load_mteb
from pipeline.evaluation.tasks.texts import Role
from pipeline.model.parts import SETTINGS, Origin, is_export, read_settings
from pipeline.run_dir import checkpoint_name

if TYPE_CHECKING:
    from mteb.models import ModelMeta


class TextEncoder(Protocol):
    """Anything that turns texts into vectors, similar where their dot product is large."""

    def encode_texts(self, texts: Sequence[str], prefix: str = "", suffix: str = "") -> np.ndarray:
        """(N,) texts, each put between prefix and suffix and cut to fit -> (N, D) float32."""


class Embedder(Protocol):
    """Vectors of queries and documents: computed now, or read from a store."""

    def embed(self, role: Role, instruction: str, texts: Sequence[str]) -> np.ndarray:
        """(N,) texts of one role and instruction -> (N, D) float32."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TemplatedEmbedder:
    """Puts each text into the model's template and encodes it.

    Args:
        encoder: the model.
        template: what is put around texts.
        name: the model's, for messages.
        precision: what its vectors are computed in, for messages.
        normalize: scale vectors to unit length, so that their dot product is the cosine.
    """

    encoder: TextEncoder
    template: Template
    name: str = "the model"
    precision: Precision = "auto"
    normalize: bool = False

    def embed(self, role: Role, instruction: str, texts: Sequence[str]) -> np.ndarray:
        """(N,) texts of one role and instruction -> (N, D) float32.

        Raises:
            UserError: a vector is not finite.
        """
        vectors_ND = self.encoder.encode_texts(texts, *self.template.frame(role, instruction))
        fix = not_finite_fix(self.precision)
        require_finite(vectors_ND, texts, source=self.name, fix=fix)
        if self.normalize:
            norms_N = np.linalg.norm(vectors_ND, axis=1)
            vectors_ND = vectors_ND / np.maximum(norms_N, 1e-12)[:, None]
        return vectors_ND


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedEncoder:
    """A model to evaluate and what the report says about it."""

    embedder: Embedder
    template: Template
    name: str
    revision: str
    max_length: int
    num_dimensions: int
    precision: str

    def meta(self) -> ModelMeta:
        """mteb's description of the model; name and revision key its result files."""
        # Here, not at the top: embedding needs no mteb, and every element of an array would wait.
        load_mteb()
        from mteb.models import ModelMeta
        from mteb.models.model_meta import ScoringFunction

        return ModelMeta(
            loader=None,
            name=f"diffembed/{self.name}",
            revision=self.revision,
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=self.max_length,
            embed_dim=self.num_dimensions,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch", "Transformers"],
            # The cosine, where the model normalises its vectors.
            similarity_fn_name=ScoringFunction.DOT_PRODUCT,
            use_instructions=True,
            training_datasets=None,
        )


def revision(element: Element) -> str:
    """What tells a result from those of other steps, exports, templates and lengths.

    mteb finds result files by model name and revision alone.
    """
    step = _settings(element.model.path).get("step")
    parts = [] if step is None else [checkpoint_name(step)]
    parts += [model_fingerprint(element.model), f"length-{element.max_length}"]
    return "-".join(parts)


def checkpoint_of(export: Path) -> str | None:
    """Identity of the checkpoint that an export was made of; None where the export names none."""
    found: str | None = _settings(export).get("checkpoint")
    return found


def _settings(export: Path) -> dict[str, Any]:
    """What `diffembed export` noted; nothing in a folder of others."""
    if not is_export(export):
        return {}
    settings: dict[str, Any] = read_settings(export, SETTINGS, Origin)
    return settings


LoadEncoder = Callable[[EvaluateConfig, Element], EvaluatedEncoder]


class MtebEncoder:
    """mteb's `EncoderProtocol`: `mteb.evaluate(MtebEncoder(...), task)` works as it stands.

    Args:
        model: the loaded export.
        instruction: what the queries ask of the model; documents never get it.
    """

    def __init__(self, model: EvaluatedEncoder, instruction: str) -> None:
        self.model = model
        self.instruction = instruction
        self.mteb_model_meta = model.meta()

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) query texts as mteb gives them -> (N, D), with the instruction."""
        return self.model.embedder.embed("query", self.instruction, texts)

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) document texts -> (N, D); never with an instruction."""
        return self.model.embedder.embed("document", "", texts)

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
        """Embed a data loader of mteb's batches.

        A query's `text` holds its own instruction already (FollowIR), a document's its title.

        Returns:
            (N, D) float32 rows in the loader's order.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type is not None and prompt_type.value == "document":
            return self.embed_documents(texts)
        return self.embed_queries(texts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """(N, D), (M, D) vectors -> (N, M) dot products."""
        products: np.ndarray = (
            np.atleast_2d(_rows(embeddings1)) @ np.atleast_2d(_rows(embeddings2)).T
        )
        return products

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """(N, D), (N, D) vectors -> (N,) dot products."""
        products: np.ndarray = np.einsum("nd,nd->n", _rows(embeddings1), _rows(embeddings2))
        return products


def _rows(embeddings: Any) -> np.ndarray:
    return np.asarray(embeddings, dtype=np.float32)
