"""Exports as models to evaluate."""

from __future__ import annotations

from pipeline.config import EvaluateConfig, Precision, RopeScaling
from pipeline.errors import UserError
from pipeline.evaluation.models.encoder import EvaluatedEncoder, TemplatedEmbedder, revision
from pipeline.evaluation.models.fingerprints import export_fingerprint
from pipeline.evaluation.models.place import load_here
from pipeline.evaluation.tasks.elements import Element
from pipeline.model.load import LoadedExport

# The export loaded last, so that an element's next task or length does not load it again.
_loaded: dict[tuple[str, RopeScaling | None, Precision, int], LoadedExport] = {}


def load_encoder(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
    """An element's export at its length, where and as exactly as this process embeds."""
    fingerprint = export_fingerprint(element.model.path)
    model = element.model
    key = (fingerprint, model.rope_scaling, model.precision, config.max_tokens)
    if key not in _loaded:
        # First out, then in: two models may not fit side by side.
        _loaded.clear()
        _loaded[key] = load_here(
            model.path,
            max_tokens=config.max_tokens,
            precision=model.precision,
            rope_scaling=model.rope_scaling,
        )
    if element.max_length > _loaded[key].max_tokens:
        raise UserError(
            f"{element.model.name}: a text of {element.max_length} tokens",
            allowed=f"at most {_loaded[key].max_tokens} in the free memory of this GPU",
            fix="shorten max_length or lengths, or use a larger GPU",
        )
    export = _loaded[key].cut_at(element.max_length, key=f"{element.model.name}: max_length")
    template = element.model.template or export.template
    return EvaluatedEncoder(
        embedder=TemplatedEmbedder(
            encoder=export,
            template=template,
            name=f"{model.name} ({model.path})",
            precision=export.encoder.config.dtype,
            normalize=export.similarity == "cosine" and not export.encoder.config.normalize,
        ),
        template=template,
        name=element.model.name,
        revision=revision(element),
        max_length=element.max_length,
        num_dimensions=export.num_dimensions,
        precision=export.encoder.config.dtype,
    )
