"""Load exports to be evaluated, on this machine's devices, and identify their results.

    export folder --load_encoder--> EvaluatedEncoder
                                      .embedder: (role, instruction, texts) -> vectors
                                      everything else: for the report

A text gets its template here, and nowhere else: `TemplatedEmbedder` puts it around the text and
gives both to `LoadedExport.encode_texts`. Memory is checked before a run (`check_fit`), for the GPU
that the config names, and again while loading, for the memory that is free.

Letters: N texts, D width of a vector.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import EvaluateConfig, Precision, Role, RopeScaling, Template
from pipeline.errors import UserError, blame
from pipeline.evaluation.tasks import Element, list_elements, load_mteb
from pipeline.launch import discover_world, let_gpu_memory_grow, require_visible_gpu
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
from pipeline.model_limits import limits_of
from pipeline.run_folder import checkpoint_name
from pipeline.workers import child_number, num_children, num_cores

if TYPE_CHECKING:
    from mteb.models import ModelMeta


class TextEncoder(Protocol):
    """A model that turns texts into vectors: `LoadedExport`, or another one in a test."""

    def encode_texts(self, texts: Sequence[str], prefix: str = "", suffix: str = "") -> np.ndarray:
        """(N,) texts, each put between prefix and suffix and cut to fit -> (N, D) float32."""


class Embedder(Protocol):
    """A source of vectors: computed now (`TemplatedEmbedder`), or stored (`VectorStore`)."""

    def embed(self, role: Role, instruction: str, texts: Sequence[str]) -> np.ndarray:
        """(N,) texts of one role and instruction -> (N, D) float32."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TemplatedEmbedder:
    """Put each text into the model's template and encode it.

    Args:
        encoder: the model.
        template: prefix and suffix of queries and of documents.
        name: the model's, for messages.
        precision: of the model's arithmetic, for messages.
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
        # Prefix and suffix separately: a text that is too long is cut, and its frame stays.
        vectors_ND = self.encoder.encode_texts(texts, *self.template.frame(role, instruction))
        fix = not_finite_fix(self.precision)
        require_finite(vectors_ND, texts, source=self.name, fix=fix)
        if self.normalize:
            norms_N = np.linalg.norm(vectors_ND, axis=1)
            # A vector of zeros has no direction, and stays zero instead of becoming NaN.
            vectors_ND = vectors_ND / np.maximum(norms_N, 1e-12)[:, None]
        return vectors_ND


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedEncoder:
    """A model to evaluate, and its entries in the report."""

    embedder: Embedder
    template: Template
    name: str
    revision: str
    max_length: int
    num_dimensions: int
    precision: str

    def meta(self) -> ModelMeta:
        """Return mteb's description of the model; name and revision key its result files."""
        # Not at the top: array elements that only embed must not wait for mteb's import.
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
            # Equal to the cosine for a model that normalises its vectors.
            similarity_fn_name=ScoringFunction.DOT_PRODUCT,
            use_instructions=True,
            training_datasets=None,
        )


LoadEncoder = Callable[[EvaluateConfig, Element], EvaluatedEncoder]


# The export that was loaded last, so that the next task or length does not load it again.
_loaded: dict[tuple[str, RopeScaling | None, Precision, int], LoadedExport] = {}


def load_encoder(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
    """Load an element's export at its length, on this process's device."""
    model = element.model
    # By fingerprint: an export that was replaced at its path is loaded again.
    fingerprint = export_fingerprint(model.path)
    key = (fingerprint, model.rope_scaling, model.precision, config.max_tokens)
    if key not in _loaded:
        # Free the old model first: two may not fit in memory.
        _loaded.clear()
        _loaded[key] = load_here(
            model.path,
            max_tokens=config.max_tokens,
            precision=model.precision,
            rope_scaling=model.rope_scaling,
        )
    if element.max_length > _loaded[key].max_tokens:
        raise UserError(
            f"{model.name}: a text of {element.max_length} tokens",
            allowed=f"at most {_loaded[key].max_tokens} in the free memory of this GPU",
            fix="shorten max_length or lengths, or use a larger GPU",
        )
    export = _loaded[key].with_max_length(element.max_length, key=f"{model.name}: max_length")
    # The config's template wins: folders of other programs may have none.
    template = model.template or export.template
    return EvaluatedEncoder(
        embedder=TemplatedEmbedder(
            encoder=export,
            template=template,
            name=f"{model.name} ({model.path})",
            precision=export.encoder.config.dtype,
            # The dot product is the cosine only of unit vectors.
            normalize=export.similarity == "cosine" and not export.encoder.config.normalize,
        ),
        template=template,
        name=model.name,
        revision=revision(element),
        max_length=element.max_length,
        num_dimensions=export.num_dimensions,
        precision=export.encoder.config.dtype,
    )


# Memory of torch, transformers and a forward, in addition to the weights.
_PROCESS_BYTES = 2**30


def load_here(
    path: Path,
    *,
    max_tokens: int,
    precision: Precision = "auto",
    dimensions: int | None = None,
    rope_scaling: RopeScaling | None = None,
) -> LoadedExport:
    """Load an export on this process's GPU, or on its share of the cores.

    Args:
        path: the export.
        max_tokens: packed tokens of one forward; fewer if the GPU has no room for them.
        precision: of weights and arithmetic; see `resolve_precision`.
        dimensions: keep only this many of a vector's first numbers.
        rope_scaling: for texts longer than the export was trained on.
    """
    device, dtype = device_here(), resolve_precision(precision)
    if device.type == "cuda":
        let_gpu_memory_grow()
        # First: whatever names no device would otherwise occupy half a gigabyte of GPU 0.
        torch.cuda.set_device(device)
        # A model that was freed still counts as used until torch returns its memory.
        gc.collect()
        torch.cuda.empty_cache()
        # Free, not total: other processes may use the same GPU.
        free, _ = torch.cuda.mem_get_info(device)
        fits = tokens_that_fit(path, free, bytes_per_value=4 if dtype == "float32" else 2)
        max_tokens = max_tokens if fits is None else min(max_tokens, fits)
    share_cores()
    export = load_export(
        path,
        device=device,
        dtype=dtype,
        max_tokens=max_tokens,
        dimensions=dimensions,
        rope_scaling=rope_scaling,
    )
    if (line := export.encoder.describe_attention(device)).startswith("WARNING"):
        print(line, file=sys.stderr, flush=True)
    return export


def share_cores() -> None:
    """Use no more threads than this process's share of the cores, if children share the work."""
    if num_children() > 1:
        share = max(1, num_cores() // num_children())
        torch.set_num_threads(min(torch.get_num_threads(), share))


def resolve_precision(precision: Precision) -> Literal["float32", "bfloat16"]:
    """Resolve `auto` on this machine: bfloat16 on a GPU, float32 elsewhere."""
    if precision != "auto":
        return precision
    # A CPU with bfloat16 instructions is 1.8 times as fast with them, but they move the scores of
    # small corpora with near ties: p-MRR by 0.028 on a replica of FollowIR.
    return "bfloat16" if has_gpu() else "float32"


def processes_here(exports: Sequence[Path]) -> int:
    """Return how many processes embed fastest on this machine: one per GPU, else one per core.

    On an idle CPU that is as fast as many threads of one process, on a busy one four times as
    fast: threads wait for each other in every small product. There are fewer processes if copies
    of the largest export would fill half the memory.
    """
    if has_gpu():
        return torch.cuda.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    # 4 bytes per parameter, because CPUs compute in float32.
    largest = max(_PROCESS_BYTES + 4 * num_parameters(export) for export in exports)
    # Torch's own number of threads: it respects OMP_NUM_THREADS and the cores of a Slurm job.
    return max(1, min(torch.get_num_threads(), int(memory // largest)))


def has_gpu() -> bool:
    """Return whether models run on a GPU here.

    Raises:
        UserError: a GPU was requested, but torch sees none.
    """
    visible = torch.cuda.is_available()
    require_visible_gpu(visible=visible, torch_version=torch.__version__)
    return visible


def device_here() -> torch.device:
    """Return the device of this process: one GPU for each of a node's processes, or the CPU."""
    if has_gpu():
        # One process per GPU of the node; Slurm may hide the GPUs of the other processes.
        number = (child_number() + discover_world().local_rank) % torch.cuda.device_count()
        return torch.device("cuda", number)
    return torch.device("cpu")


# Names of the two widths in config.json: most models', GPT-2's, LLaDA's.
_WIDTH = ("hidden_size", "n_embd", "d_model")
_INNER_WIDTH = ("intermediate_size", "n_inner", "mlp_hidden_size")
# The rest is for the CUDA context, fragmentation and the workspace of kernels.
_USABLE = 0.85


def tokens_that_fit(export: Path, memory: int, bytes_per_value: int) -> int | None:
    """Return the packed tokens of the largest forward without gradients.

    At its peak, a layer holds for each token the residual stream, its norm, and the gate, up and
    product of the feed-forward: 2 x width + 3 x inner width values. Nothing grows with the square
    of the length, because attention kernels keep no score matrix. (Training keeps the values of all
    layers for the backward: `planning.memory` has other formulas.)

    Args:
        memory: free bytes of the GPU before the weights are loaded.
        bytes_per_value: 2 for bfloat16, 4 for float32.

    Returns:
        0 if not even the weights fit; None if the backbone is not on this machine yet, because it
        is still to be exported or, for an adapter, fetched.
    """
    backbone = backbone_folder(export)
    if backbone is None or not (backbone / "config.json").is_file():
        return None
    tree = read_settings(backbone, "config.json", dict[str, Any])
    with blame(f"{backbone}/config.json: no width", fix=f"fetch {backbone} again"):
        # From config.json: a check must not load the model.
        width = next(int(tree[key]) for key in _WIDTH if key in tree)
        inner = next((int(tree[key]) for key in _INNER_WIDTH if tree.get(key)), 4 * width)
    # Memory for tokens, after the weights.
    left = memory * _USABLE - num_parameters(export) * bytes_per_value
    return max(0, int(left // ((2 * width + 3 * inner) * bytes_per_value)))


def check_fit(config: EvaluateConfig) -> None:
    """Check that every model has positions, and the named GPU memory, for the longest text.

    Raises:
        UserError: names the length that would fit.
    """
    # A text of the longest length is enough: shorter ones share a forward.
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
    """Count parameters by the headers of the weight files; their values are not read.

    An adapter counts with its base model, if that is on this machine.
    """
    folders = {export, backbone_folder(export) or export}
    total = 0
    for path in [file for folder in folders for file in folder.glob("*.safetensors")]:
        with path.open("rb") as file, blame(f"{path}: damaged", fix=f"fetch {path.parent} again"):
            # The first bytes of a file in another format may be any number.
            size = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            # A safetensors file starts with the length of a JSON header, and the header.
            header = json.loads(file.read(size))
            total += sum(
                math.prod(tensor["shape"])
                for name, tensor in header.items()
                if name != "__metadata__"
            )
    return total


def revision(element: Element) -> str:
    """Return a name that differs between steps, exports, templates and lengths.

    mteb finds result files only by model name and revision.
    """
    # Exports of other programs have no step.
    step = _settings(element.model.path).get("step")
    words = [] if step is None else [checkpoint_name(step)]
    words += [model_fingerprint(element.model), f"length-{element.max_length}"]
    return "-".join(words)


def checkpoint_of(export: Path) -> str | None:
    """Return the identity of the checkpoint that an export was made from; None if not recorded."""
    return _settings(export).get("checkpoint")


def _settings(export: Path) -> ExportSettings:
    """Read the settings that `diffembed export` wrote; empty for a folder of another program."""
    if not is_export(export):
        return {}
    return read_settings(export, SETTINGS, ExportSettings)


def require_finite(
    vectors_ND: NDArray[np.floating], texts: Sequence[str], *, source: str, fix: str
) -> None:
    """Refuse NaN and infinity: such a vector would be ranked without any message.

    Args:
        vectors_ND: one row per text.
        texts: (N,) the message quotes the first one with such a vector.
        source: model or store, for the message.
        fix: advice for the message.

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
    """Return the advice for a model whose vectors are not finite."""
    if precision == "bfloat16":
        return "compute in precision float32, or export an earlier checkpoint"
    return "export an earlier checkpoint: the weights of this one are damaged, or diverged"
