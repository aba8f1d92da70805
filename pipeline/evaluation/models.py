"""Load exports as mteb models, on the right device."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.checkpoint_folder import checkpoint_name
from pipeline.config import EvaluateConfig, Precision, RopeScaling, Template
from pipeline.errors import UserError, blame
from pipeline.evaluation.datasets import Role
from pipeline.evaluation.tasks import Element, list_elements, load_mteb
from pipeline.launch import discover_world
from pipeline.model.export_folder import (
    SETTINGS,
    ExportSettings,
    backbone_folder,
    export_fingerprint,
    is_export,
    model_fingerprint,
    read_settings,
)
from pipeline.model.load_export import LoadedExport, load_export
from pipeline.tokenizer import limits_of
from pipeline.workers import child_number, num_children, num_cores

if TYPE_CHECKING:
    from mteb.models import ModelMeta


def require_finite(
    vectors_ND: NDArray[np.floating], texts: Sequence[str], *, source: str, fix: str
) -> None:
    """Refuse NaN and infinity.

    Args:
        vectors_ND: one row per text.
        texts: (N,) the first one with such a vector is quoted.
        source: what gave the vectors.
        fix: what to do about it.

    Raises:
        UserError: a vector is not finite.
    """
    broken_N = ~np.isfinite(vectors_ND).all(axis=1)
    if broken_N.any():
        first = texts[int(np.argmax(broken_N))][:60]
        raise UserError(
            f"{source}: {broken_N.sum()} of {len(texts)} vectors are not finite, the first of "
            f"{first!r}",
            fix=fix,
        )


def not_finite_fix(precision: Precision) -> str:
    """What to do about a model whose vectors are not finite."""
    if precision == "bfloat16":
        return "compute in precision float32, or export an earlier checkpoint"
    return "export an earlier checkpoint: the weights of this one are damaged, or diverged"


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
    return _settings(export).get("checkpoint")


def _settings(export: Path) -> ExportSettings:
    """What `diffembed export` noted; nothing in a folder of others."""
    if not is_export(export):
        return {}
    return read_settings(export, SETTINGS, ExportSettings)


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


# The names of the two widths in config.json: those of most models, GPT-2's, LLaDA's.
_WIDTH = ("hidden_size", "n_embd", "d_model")
_INNER_WIDTH = ("intermediate_size", "n_inner", "mlp_hidden_size")
# Room for the CUDA context, fragmentation and what a kernel needs for itself.
_USABLE = 0.85


def tokens_that_fit(export: Path, memory: int, bytes_per_value: int) -> int | None:
    """Packed tokens of the largest forward without gradients; 0 if not even the weights fit.

    None where the backbone is not here yet: to be exported, or an adapter's to be fetched.

    Per token the widest moment of a layer holds the residual stream, its norm, and the gate, up and
    product of the feed-forward: 2 x width + 3 x inner width values. Attention adds nothing of the
    square of the length, because its kernels keep no score matrix.

    Args:
        memory: free bytes of the GPU before the weights are loaded.
        bytes_per_value: 2 for bfloat16, 4 for float32.
    """
    backbone = backbone_folder(export)
    if backbone is None or not (backbone / "config.json").is_file():
        return None
    tree = read_settings(backbone, "config.json", dict[str, Any])
    with blame(f"{backbone}/config.json: no width", fix=f"fetch {backbone} again"):
        width = next(int(tree[key]) for key in _WIDTH if key in tree)
        inner = next((int(tree[key]) for key in _INNER_WIDTH if tree.get(key)), 4 * width)
    left = memory * _USABLE - num_parameters(export) * bytes_per_value
    return max(0, int(left // ((2 * width + 3 * inner) * bytes_per_value)))


def check_fit(config: EvaluateConfig) -> None:
    """Refuse a plan whose longest text a model has no positions for, or the named GPU no room.

    Raises:
        UserError: with the length that would fit.
    """
    longest = max(element.max_length for element in list_elements(config))
    for model in config.models:
        backbone = backbone_folder(model.path)
        if backbone is not None and (backbone / "config.json").is_file():
            hf_config = read_settings(backbone, "config.json", dict[str, Any])
            limits = limits_of(hf_config, model.name)
            limits.require_length({f"{model.name}: max_length or lengths": longest})
        if config.gpu_memory_gib is None:
            continue
        size = 4 if model.precision == "float32" else 2
        fits = tokens_that_fit(model.path, int(config.gpu_memory_gib * 2**30), bytes_per_value=size)
        if fits is not None and fits < longest:
            raise UserError(
                f"{model.name}: one text of {longest} tokens on a GPU of "
                f"{config.gpu_memory_gib:g} GiB",
                allowed=f"at most {fits} tokens" if fits else "a GPU that holds the weights",
                fix="shorten max_length or lengths, or use a larger GPU",
            )


def num_parameters(export: Path) -> int:
    """Parameters by the headers of the weight files; their values are not read.

    Those of an adapter alone with its base model's, where that is on this machine.
    """
    folders = {export, backbone_folder(export) or export}
    total = 0
    for path in [file for folder in folders for file in folder.glob("*.safetensors")]:
        with path.open("rb") as file, blame(f"{path}: damaged", fix=f"fetch {path.parent} again"):
            # Of a file that is no safetensors, the first bytes may be any number.
            size = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            header = json.loads(file.read(size))
            total += sum(
                math.prod(tensor["shape"])
                for name, tensor in header.items()
                if name != "__metadata__"
            )
    return total


# What torch, transformers and the tensors of a forward take beside the weights.
_PROCESS_BYTES = 2**30


def load_here(
    path: Path,
    *,
    max_tokens: int,
    precision: Precision = "auto",
    dimensions: int | None = None,
    rope_scaling: RopeScaling | None = None,
) -> LoadedExport:
    """An export on this process's GPU, or on its share of the cores.

    Args:
        path: the export.
        max_tokens: packed tokens of one forward; fewer where the GPU has no room for them.
        precision: of weights and arithmetic; see `resolve`.
        dimensions: keep only so many of a vector's first numbers.
        rope_scaling: for texts longer than the export was trained on.
    """
    device, dtype = _device(), resolve(precision)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fits = tokens_that_fit(path, free, bytes_per_value=4 if dtype == "float32" else 2)
        max_tokens = max_tokens if fits is None else min(max_tokens, fits)
    share_cores()
    return load_export(
        path,
        device=device,
        dtype=dtype,
        max_tokens=max_tokens,
        dimensions=dimensions,
        rope_scaling=rope_scaling,
    )


def share_cores() -> None:
    """Take no more threads than this process's share, where children share the work."""
    if num_children() > 1:
        share = max(1, num_cores() // num_children())
        torch.set_num_threads(min(torch.get_num_threads(), share))


def resolve(precision: Precision) -> Literal["float32", "bfloat16"]:
    """What `auto` is on this machine: bfloat16 on a GPU, float32 elsewhere."""
    if precision != "auto":
        return precision
    # A CPU that multiplies bfloat16 is 1.7 times as fast with it, but small corpora of near ties
    # show it: p-MRR moved by 0.028 on a replica of FollowIR.
    return "bfloat16" if torch.cuda.is_available() else "float32"


def processes_here(exports: Sequence[Path]) -> int:
    """How many processes embed fastest on this machine: one per GPU, else one per core.

    On a quiet CPU that is as fast as many threads of one process, on a busy one four times as
    fast: threads wait for each other in every small product. There are fewer processes where
    copies of the largest export would fill half the memory.
    """
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    largest = max(_PROCESS_BYTES + 4 * num_parameters(export) for export in exports)
    # Torch's own number of threads: it respects OMP_NUM_THREADS and the cores of a Slurm job.
    return max(1, min(torch.get_num_threads(), int(memory // largest)))


def _device() -> torch.device:
    if torch.cuda.is_available():
        # One process per GPU where a step has several; Slurm may show each process only its own.
        number = (child_number() + discover_world().local_rank) % torch.cuda.device_count()
        return torch.device("cuda", number)
    return torch.device("cpu")


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
    export = _loaded[key].with_max_length(
        element.max_length, key=f"{element.model.name}: max_length"
    )
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
