"""The two schedules of a step's passes over its chunks: by chunk, or by layer.

`cache`: chunk by chunk, the whole model at once.

    pass 1   chunk -> embedding, no graph; the state of the random generators is kept
    (loss)   gradient of the loss by every embedding
    pass 2   generators restored, chunk -> the same embedding with graph -> backward of
             sum(embedding * gradient), whose gradient by the parameters is the loss's

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv 2101.06983), section 3. `embed` and `backward` are arguments: no engine is known here.

`sweep`: every chunk passes a layer before the next layer is gathered.

    forward    for each stage: gather it; for each chunk: keep the input, run without graph; release
    (loss)     gradient of the loss by every embedding
    backward   for each stage, last first: gather it; for each chunk: run again with graph from the
               kept input, backward, keep the input's gradient; release; reduce its gradients

ZeRO-3 therefore gathers every parameter twice per optimizer step, for any number of chunks, and
holds two stages at a time: the next one is gathered while this one computes. A rank has the whole
gradients of one stage, and its share of the others. The price is the inputs of all stages of all
chunks (the boundary store), which may be kept in host memory. It needs as many FLOPs as gradient
caching.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from pipeline.config import TrainConfig
from pipeline.training.engine import Agreement, Engine, TensorChunk

ChunkT = TypeVar("ChunkT")
Stage = Callable[[ChunkT, "torch.Tensor | None"], torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RandomState:
    """The generators a forward may draw from: the CPU's, and the current GPU's if it is in use."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        """Copy the current state of the generators."""
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if in_use else None)

    def restore(self) -> None:
        """Restore the generators."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CachedChunks:
    """Embeddings for the loss and state for pass 2, both left by pass 1; one entry per chunk."""

    embeddings: tuple[torch.Tensor, ...]  # (C, E) each, without graph
    random_states: tuple[RandomState, ...]
    graphs: tuple[torch.Tensor | None, ...]  # the same embeddings with graph, where it was kept


def embed_chunks(
    chunks: Sequence[ChunkT], embed: Callable[[ChunkT], torch.Tensor], *, keep_graphs: int = 0
) -> CachedChunks:
    """Pass 1: embed all chunks, in order.

    Args:
        chunks: the arguments of `embed`.
        embed: chunk -> (C, E) embeddings.
        keep_graphs: number of last chunks that keep their graph for pass 2, which then skips
            their second forward: of 4 units of work (2 forwards, a backward of 2), k of C chunks
            save k / C. With all of them this is no caching at all.
    """
    embeddings, states, graphs = [], [], []
    for number, chunk in enumerate(chunks):
        keep = number >= len(chunks) - keep_graphs
        # Before the forward: pass 2 must draw the same dropout masks.
        states.append(RandomState.capture())
        with torch.set_grad_enabled(keep):
            embedding = embed(chunk)
        embeddings.append(embedding.detach())
        graphs.append(embedding if keep else None)
    return CachedChunks(
        embeddings=tuple(embeddings), random_states=tuple(states), graphs=tuple(graphs)
    )


def replay_chunks(
    chunks: Sequence[ChunkT],
    cached: CachedChunks,
    gradients: Sequence[torch.Tensor],
    embed: Callable[[ChunkT], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
) -> None:
    """Pass 2: run one backward per chunk, so that parameters get the gradient of the loss.

    Args:
        chunks: as given to `embed_chunks`.
        cached: what `embed_chunks` returned for them.
        gradients: (C, E) gradient of the loss by each chunk's embeddings.
        embed: as given to `embed_chunks`.
        backward: takes the scalar; called once per chunk, also where the gradient is zero, so
            that ranks whose collectives run inside it stay together.
    """
    graphs, after = list(cached.graphs), RandomState.capture()
    # Last chunk first: kept graphs are used up before new ones are made.
    for number in reversed(range(len(chunks))):
        with torch.enable_grad():
            embedding, graphs[number] = graphs[number], None
            if embedding is None:
                cached.random_states[number].restore()
                embedding = embed(chunks[number])
            # Its gradient by the embedding is the given one: the chain rule's first factor.
            surrogate = (embedding * gradients[number]).sum()  # (C, E) -> ()
        backward(surrogate)
    # The next draw sees the generators as if there had been no second pass.
    after.restore()


class BoundaryStore:
    """Inputs of stages by (stage, chunk), on their device or in host memory.

    Copies have their own stream, so that they overlap the computing of other chunks:

        put      copy stream: waits for the input, device -> host
        fetch    copy stream: host -> device, a chunk ahead
        take     compute stream: waits for the copy

    Args:
        on_host: keep them in pinned host memory while they are not needed.
    """

    def __init__(self, *, on_host: bool) -> None:
        self._on_host = on_host
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        # On the device again, and when their copy is complete.
        self._fetched: dict[tuple[int, int], tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._device = torch.device("cpu")
        self._copies: torch.cuda.Stream | None = None

    def put(self, stage: int, chunk: int, hidden: torch.Tensor) -> None:
        """Keep the input of a stage for a chunk."""
        if self._on_host and hidden.is_cuda:
            self._device = hidden.device
            if self._copies is None:
                self._copies = torch.cuda.Stream(hidden.device)  # type: ignore[no-untyped-call]
            # A copy to pageable memory would make the host wait.
            pinned = torch.empty_like(hidden, device="cpu", pin_memory=True)
            self._copy(hidden, pinned, on_device=hidden)
            hidden = pinned
        self._kept[stage, chunk] = hidden

    def fetch(self, stage: int, chunk: int) -> None:
        """Start to copy an input to the device, if it is kept elsewhere."""
        key = stage, chunk
        if self._copies is None or key not in self._kept:
            return
        pinned = self._kept.pop(key)
        hidden = torch.empty_like(pinned, device=self._device, pin_memory=False)
        self._copy(pinned, hidden, on_device=hidden)
        self._fetched[key] = hidden, self._copies.record_event()

    def take(self, stage: int, chunk: int) -> torch.Tensor:
        """Return an input, once."""
        self.fetch(stage, chunk)
        if (stage, chunk) in self._kept:
            return self._kept.pop((stage, chunk))
        hidden, copied = self._fetched.pop((stage, chunk))
        torch.cuda.current_stream().wait_event(copied)
        return hidden

    def clear(self) -> None:
        """Drop all inputs."""
        self._kept.clear()
        self._fetched.clear()

    def _copy(self, source: torch.Tensor, target: torch.Tensor, *, on_device: torch.Tensor) -> None:
        """Copy on the stream of copies, after all that was given to the compute stream so far."""
        assert self._copies is not None
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        # The allocator may give its memory to other tensors only after the copy.
        on_device.record_stream(self._copies)


class LayerSweep(Generic[ChunkT]):
    """One optimizer step's two sweeps over the same chunks.

    Args:
        stages: each maps (chunk, hidden) to hidden; the first gets no hidden, the last returns the
            embeddings. Between stages hidden states are the only thing passed on.
        hold: context in which a stage's parameters are gathered, by its number; the second number
            is that of the stage that comes next, if any.
        reduce: called when the gradients of a stage's own parameters are complete.
        seed: sets the random generators for a chunk, by its number, so that dropout masks do not
            depend on the schedule.
        agreement: of the step. A rank that runs out of memory gathers and reduces on with the
            others, which do not know of it, until both sweeps' ends.
        on_host: keep boundaries in host memory.
    """

    def __init__(
        self,
        stages: Sequence[Stage[ChunkT]],
        *,
        hold: Callable[[int, int | None], AbstractContextManager[None]],
        reduce: Callable[[int], None],
        seed: Callable[[int], None],
        agreement: Agreement,
        on_host: bool = False,
    ) -> None:
        self._stages = stages
        self._hold, self._reduce, self._agreement = hold, reduce, agreement
        self._seed = seed
        self.store = BoundaryStore(on_host=on_host)
        self._states: dict[tuple[int, int], RandomState] = {}

    @torch.no_grad()
    def forward(self, chunks: Sequence[ChunkT]) -> list[torch.Tensor]:
        """Embed all chunks: a list of (C, E) without graph.

        Raises:
            ChunkOutOfMemoryError: on all ranks.
        """
        hiddens: list[torch.Tensor | None] = [None] * len(chunks)
        streams: list[RandomState] = []
        for number in range(len(chunks)):
            self._seed(number)
            streams.append(RandomState.capture())
        # Each chunk has its own stream of random numbers, continued from stage to stage, as it
        # would be if the chunk passed all stages at once.
        for index, stage in enumerate(self._stages):
            following = index + 1 if index + 1 < len(self._stages) else None
            # Gathered once for all chunks: the point of this schedule.
            with self._hold(index, following):
                work = partial(self._forward_stage, index, stage, chunks, hiddens, streams)
                self._attempt(work, hiddens)
        self._agreement.settle()
        return [hidden for hidden in hiddens if hidden is not None]

    def _forward_stage(
        self,
        index: int,
        stage: Stage[ChunkT],
        chunks: Sequence[ChunkT],
        hiddens: list[torch.Tensor | None],
        streams: list[RandomState],
    ) -> None:
        """Run one stage of all chunks, and keep its inputs."""
        for number, chunk in enumerate(chunks):
            hidden = hiddens[number]
            if hidden is not None:
                self.store.put(index, number, hidden)
            self._states[index, number] = streams[number]
            streams[number].restore()
            hiddens[number] = stage(chunk, hidden)
            streams[number] = RandomState.capture()

    def _attempt(self, work: Callable[[], None], hiddens: list[torch.Tensor | None]) -> None:
        """Do a stage's work; where it does not fit, release what the sweep keeps."""
        self._agreement.attempt(work)
        if self._agreement.has_failed:
            self.store.clear()
            hiddens[:] = [None] * len(hiddens)

    def backward(
        self,
        chunks: Sequence[ChunkT],
        gradients: Sequence[torch.Tensor],
        backward: Callable[[torch.Tensor], None],
    ) -> None:
        """Accumulate parameter gradients.

        Args:
            chunks: as given to `forward`.
            gradients: (C, E) gradient by each chunk's embeddings.
            backward: takes a scalar and accumulates its gradients.

        Raises:
            ChunkOutOfMemoryError: on all ranks.
        """
        # By the output of the stage that comes next.
        upper: list[torch.Tensor | None] = list(gradients)
        for index in reversed(range(len(self._stages))):
            with self._hold(index, index - 1 if index else None):
                self._attempt(partial(self._backward_stage, index, chunks, upper, backward), upper)
            # On a GPU this overlaps the next stage's backward.
            self._reduce(index)
        self._agreement.settle()

    def _backward_stage(
        self,
        index: int,
        chunks: Sequence[ChunkT],
        upper: list[torch.Tensor | None],
        backward: Callable[[torch.Tensor], None],
    ) -> None:
        """Run one stage of all chunks again and backward."""
        for number, chunk in enumerate(chunks):
            last, gradient = number + 1 == len(chunks), upper[number]
            assert gradient is not None
            # By this stage's input, hence by the output of the stage below.
            upper[number] = self._backward_one(
                index,
                number,
                chunk,
                gradient,
                backward,
                following=(index - 1, 0) if last else (index, number + 1),
            )

    def _backward_one(
        self,
        index: int,
        number: int,
        chunk: ChunkT,
        gradient: torch.Tensor,
        backward: Callable[[torch.Tensor], None],
        following: tuple[int, int],
    ) -> torch.Tensor:
        """Run one stage of one chunk again; return the gradient by its input.

        Args:
            following: stage and chunk that come next.
        """
        hidden = None
        if index > 0:
            # A leaf, so that the backward ends at this stage instead of at the token table.
            hidden = self.store.take(index, number).detach().requires_grad_()
            self.store.fetch(*following)
        # The dropout masks of the forward.
        self._states.pop((index, number)).restore()
        with torch.enable_grad():
            out = self._stages[index](chunk, hidden)
            # Not at the first stage of a frozen token table.
            if out.requires_grad:
                backward((out * gradient).sum())
        # Below the first stage it is not read; where all below is frozen, any value does.
        if hidden is None or hidden.grad is None:
            return gradient
        return hidden.grad


def make_sweep(
    engine: Engine,
    stages: list[Callable[[Any, Any], torch.Tensor]],
    config: TrainConfig,
    seed: Callable[[int], None],
    agreement: Agreement,
) -> LayerSweep[Any]:
    """Prepare the two sweeps of a step over its chunks.

    Args:
        engine: gathers and reduces each stage's layer; `outside_of_layers` is held throughout.
        stages: embedding, each layer, and the last one after them.
        config: keeps the inputs of the layers on the device or the host.
        seed: seeds torch for a chunk.
        agreement: checked at each stage.
    """
    # The first and the last stage use parameters that are held throughout, and that are reduced
    # after the sweep: the token table may also be the head.
    owned = [[], *([*layer.parameters()] for layer in engine.encoder.layers), []]
    # A parameter of several layers is complete after the lowest, which comes last.
    seen: set[int] = set()
    complete = []
    for parameters in owned:
        complete.append([p for p in parameters if id(p) not in seen])
        seen.update(map(id, parameters))

    @contextmanager
    def hold(stage: int, following: int | None) -> Iterator[None]:
        with engine.hold(owned[stage]):
            # Here no gather is under way that the ranks' agreement could meet.
            agreement.check()
            if following is not None:
                engine.prefetch(owned[following])
            yield

    def reduce(stage: int) -> None:
        if agreement.has_failed:
            # The other ranks reduce these gradients and do not know that this rank has none.
            engine.fill_gradients(complete[stage])
        engine.reduce(complete[stage])

    return LayerSweep(
        stages,
        hold=hold,
        reduce=reduce,
        seed=seed,
        agreement=agreement,
        on_host=config.chunks.boundaries == "host",
    )


def encoder_stages(encoder: Any) -> list[Callable[[TensorChunk, Any], torch.Tensor]]:
    """Cut an encoder into the stages of a sweep: embedding, each layer, pooling."""

    def embed(chunk: TensorChunk, _: None) -> torch.Tensor:
        hidden, chunk.packed = encoder.embed(
            chunk.input_ids, chunk.lengths, chunk.instruction_tokens
        )
        return hidden  # type: ignore[no-any-return]

    def layer(index: int) -> Callable[[TensorChunk, torch.Tensor], torch.Tensor]:
        return lambda chunk, hidden: encoder.run_layer(index, hidden, chunk.packed)

    def finish(chunk: TensorChunk, hidden: torch.Tensor) -> torch.Tensor:
        return encoder.finish(hidden, chunk.packed)  # type: ignore[no-any-return]

    return [embed, *(layer(index) for index in range(len(encoder.layers))), finish]


def outside_of_layers(encoder: Any) -> list[torch.nn.Parameter]:
    """Return the parameters of token embedding, final norm, and a head if there is one."""
    inside = {id(parameter) for parameter in encoder.layers.parameters()}
    return [parameter for parameter in encoder.parameters() if id(parameter) not in inside]


def untied_head(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters of a head that predicts tokens, unless they are the token table's."""
    table = {id(parameter) for parameter in model.model.get_input_embeddings().parameters()}
    return [parameter for parameter in model.lm_head.parameters() if id(parameter) not in table]
