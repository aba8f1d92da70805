"""Embed by sentence-transformers itself, for folders of models that this package does not compute.

Slower than `LoadedExport`, because texts are padded; but any architecture and any modules work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Precision, Template
from pipeline.errors import UserError, blame
from pipeline.evaluation.models import (
    TemplatedEmbedder,
    device_here,
    resolve_precision,
    share_cores,
)
from pipeline.model.load_export import read_template

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForeignEncoder:
    """A `TextEncoder` that leaves everything to sentence-transformers.

    Attributes:
        model: in evaluation mode on its device.
    """

    model: SentenceTransformer

    def encode_texts(
        self, texts: Sequence[str], prefix: str = "", suffix: str = ""
    ) -> NDArray[np.float32]:
        """(N,) texts -> (N, D) float32; cut at the model's length.

        Raises:
            UserError: there is a suffix, which cutting would remove from long texts alone.
        """
        if suffix:
            raise UserError(
                f"template: {suffix!r} after the text, for a model that sentence-transformers runs",
                fix="give a template that ends with {text}",
            )
        # As a prompt, because some models leave its tokens out of the pooling.
        vectors = self.model.encode(list(texts), prompt=prefix, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


def load_foreign(
    folder: Path, *, template: Template | None, max_length: int | None, precision: Precision
) -> TemplatedEmbedder:
    """Load a sentence-transformers folder on this process's device.

    Args:
        folder: in sentence-transformers layout; its own code is not run.
        template: in place of the folder's prompts.
        max_length: in tokens; None: the folder's.
        precision: of weights and arithmetic.

    Raises:
        UserError: sentence-transformers cannot load it, or has no positions for `max_length`.
    """
    # Imported here: it takes seconds, and most models do without.
    from sentence_transformers import SentenceTransformer

    share_cores()
    dtype = resolve_precision(precision)
    with blame(f"{folder}: sentence-transformers cannot load it", fix="take another model"):
        model = SentenceTransformer(
            str(folder),
            device=str(device_here()),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": dtype},
        )
    if max_length is not None:
        longest = model.max_seq_length
        if longest is not None and max_length > longest:
            raise UserError(
                f"max_length: {max_length}", allowed=f"at most {longest} tokens for {folder}"
            )
        model.max_seq_length = max_length
    return TemplatedEmbedder(
        encoder=ForeignEncoder(model=model),
        template=template or read_template(folder),
        name=str(folder),
        precision=dtype,
        normalize=model.similarity_fn_name != "dot",
    )
