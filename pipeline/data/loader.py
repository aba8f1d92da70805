"""Load one global batch at a time, the same on every cluster; each rank reads only its own tokens.

step -> example ids -> documents and masks -> chunks of every rank -> tokens of this rank
        order.Order    batch.find_relevance   batch.plan_chunks       shards.Dataset
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.batch import (
    ATTENTION_LENGTH,
    Chunk,
    GlobalBatch,
    IntArray,
    Ragged,
    Relevance,
    find_relevance,
    num_negatives,
    plan_chunks,
)
from pipeline.data.order import (
    Group,
    Order,
    choose,
    choose_by_band,
    make_key,
    source_shares,
)
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.workers import read_ahead

_STATE_VERSION = 1
DUMMY = Chunk(
    input_ids=np.zeros(1, dtype=np.int64),
    lengths=np.ones(1, dtype=np.int64),
    texts=np.full(1, -1, dtype=np.int64),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """Examples, documents and lengths of a step's batch; no text has been read yet."""

    ids: IntArray  # (N,)
    listed: dict[str, Ragged]  # all documents of the examples
    chosen: dict[str, IntArray]  # positions of the documents that the step takes
    relevance: Relevance
    lengths: IntArray  # (S,) tokens of each text: queries, then documents


class Loader:
    """Global batches by step.

    Args:
        dataset: an opened dataset folder.
        config: size and mixture of a batch, documents per query.
        rank: this process among `world_size`; decides only which chunks are read.
        max_chunk_tokens: token budget of a chunk; a longer text gets its own chunk.
        max_chunk_cost: cost budget of a chunk, as `batch.text_cost` counts it.
        min_chunks: at least this many chunks per rank.
        seed: decides the order and the choice of documents.
        attention_length: length at which attention costs as much as the linear layers.
        groups: populations that the order draws from; by default the dataset's groups of examples.
        teacher_vectors: read a teacher's stored vectors with the texts.

    Raises:
        UserError: the batch cannot be formed from this dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        max_chunk_tokens: int,
        max_chunk_cost: float | None = None,
        min_chunks: int = 1,
        seed: int = 0,
        attention_length: float = ATTENTION_LENGTH,
        groups: Sequence[Group] | None = None,
        teacher_vectors: bool = False,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        manifest = dataset.manifest
        groups = manifest.groups if groups is None else groups
        self.dataset, self.config = dataset, config
        self._rank, self._world_size, self._seed = rank, world_size, seed
        # May be lowered later, for batches planned from then on: on all ranks by the same number,
        # or their chunk counts differ.
        self.max_chunk_tokens = max_chunk_tokens
        self._max_cost, self._min_chunks = max_chunk_cost, min_chunks
        self._attention_length = attention_length
        self.order = Order(
            groups,
            global_batch_size=config.global_batch_size,
            homogeneous=config.homogeneous,
            seed=seed,
            shares=source_shares(
                groups,
                # The run's own weights override those that the dataset was prepared with.
                weights={**manifest.weights, **config.weights},
                temperature=config.mixture_temperature,
                cap=config.mixture_cap,
            ),
        )
        self._quotas = _band_quotas(dataset, config)
        # Where the data hold none, the loss is refused by `LossConfig.require_fit`.
        teacher = manifest.teacher if teacher_vectors else None
        self._reads_teacher = teacher is not None
        self._dummy = DUMMY
        if teacher is not None:
            # The loss finds a vector by the row of its embedding, and dummies have a row, too.
            zeros = np.zeros((1, teacher.width), dtype=np.float32)
            self._dummy = dataclasses.replace(DUMMY, teacher=zeros)
        self._step = 0

    def batch(self, step: int) -> GlobalBatch:
        """Return the batch of a step; depends on nothing that happened before."""
        # Every rank draws the whole batch: it needs the relevance of all queries, for which only
        # ids and lengths are read. Tokens are read for its own chunks.
        drawn = self._draw(step)
        ids, relevance = drawn.ids, drawn.relevance
        scores = self._scores(ids, drawn.listed, drawn.chosen)
        return GlobalBatch(
            step=step,
            num_queries=len(ids),
            num_documents=len(relevance.document_ids),
            chunks=tuple(
                self._read_chunk(texts, drawn.lengths, ids, relevance.document_ids)
                for texts in self._plan(drawn.lengths)[self._rank]
            ),
            positives=relevance.positives,
            negatives=relevance.negatives,
            masked=relevance.masked,
            example_ids=ids,
            tokens=int(drawn.lengths.sum()),
            kind=self.order.kind(step),
            positive_scores=scores[0],
            negative_scores=scores[1],
        )

    def num_negatives(self, step: int, *, own: bool) -> IntArray:
        """(N,) listed negatives of each query of a step, or all in its batch; reads no text."""
        found = self._draw(step).relevance
        return num_negatives(
            positives=found.positives,
            negatives=found.negatives,
            masked=found.masked,
            num_documents=len(found.document_ids),
            own=own,
        )

    def num_different(self, step: int) -> tuple[int, int]:
        """Return how many different queries and documents a step holds."""
        drawn = self._draw(step)
        keys = self.dataset.examples.scalars("query_key", drawn.ids)
        return len(np.unique(keys)), len(drawn.relevance.document_ids)

    def chunk_tokens(self, step: int) -> list[list[int]]:
        """Return the tokens of every rank's chunks of a step, with dummies; reads no text."""
        lengths = self._lengths(step)
        return [
            [int(lengths[texts].sum()) if len(texts) else len(DUMMY.input_ids) for texts in chunks]
            for chunks in self._plan(lengths)
        ]

    def _lengths(self, step: int) -> IntArray:
        """(S,) tokens of each text of a step."""
        return self._draw(step).lengths

    def _draw(self, step: int) -> _Drawn:
        examples, documents = self.dataset.examples, self.dataset.documents
        ids = self.order.batch(step)
        # Candidates take the place of the negatives that an example lists.
        source = "negatives" if self._quotas is None else "candidates"
        listed = {
            "positives": examples.ragged("positives", ids),
            "negatives": examples.ragged(source, ids),
        }
        # Before anything is indexed by these numbers: numpy would wrap negative ones silently.
        self._check(listed)
        chosen = self._choose(step, ids, listed)
        positives, negatives = (
            _select(listed[name], chosen[name]) for name in ("positives", "negatives")
        )
        relevance = find_relevance(
            positives=positives,
            negatives=negatives,
            all_positives=listed["positives"],
            concept=examples.scalars("concept", ids),
            query_key=examples.scalars("query_key", ids),
        )
        lengths = np.concatenate(
            [
                examples.lengths("query", ids),
                documents.lengths("tokens", relevance.document_ids),
            ]
        )
        return _Drawn(ids=ids, listed=listed, chosen=chosen, relevance=relevance, lengths=lengths)

    def _plan(self, lengths: IntArray) -> list[list[IntArray]]:
        """Return every rank's chunks of texts of (S,) lengths, as arrays of text indices."""
        return plan_chunks(
            lengths,
            world_size=self._world_size,
            max_tokens=self.max_chunk_tokens,
            max_cost=self._max_cost,
            min_chunks=self._min_chunks,
            attention_length=self._attention_length,
        )

    def _check(self, listed: dict[str, Ragged]) -> None:
        """Refuse an example without positives, and document ids outside the store."""
        found = np.concatenate([lists.values for lists in listed.values()])
        num_documents = len(self.dataset.documents)
        if listed["positives"].lengths.min() < 1 or found.min() < 0 or found.max() >= num_documents:
            raise self.dataset.damaged(
                f"an example refers to documents outside 0..{num_documents - 1}"
            )

    def _choose(self, step: int, ids: IntArray, listed: dict[str, Ragged]) -> dict[str, IntArray]:
        """Return positions of the documents taken this step; another epoch takes others."""
        # The step is part of the keys: in another epoch the same example shows other documents.
        # Positives have a key of their own: with one key for both, lists of equal length would
        # always give their k-th documents together.
        key, positive_key = make_key(self._seed, 3, step), make_key(self._seed, 3, step, 1)
        positives = choose(
            listed["positives"], self.config.num_positives, num_first=None, key=positive_key
        )
        if self._quotas is not None:
            negatives = self._draw_candidates(step, ids, listed["negatives"], self._quotas)
        else:
            first = self.dataset.examples.scalars("num_first_negatives", ids)
            negatives = choose(
                listed["negatives"], self.config.num_hard_negatives, num_first=first, key=key
            )
        return {"positives": positives, "negatives": negatives}

    def _draw_candidates(
        self, step: int, ids: IntArray, candidates: Ragged, quotas: IntArray
    ) -> IntArray:
        """Return positions of the candidates taken; a function of seed, epoch and example."""
        bands = np.zeros(len(candidates.values), dtype=np.int64)
        if self.config.candidates is not None and self.config.candidates.bands:
            stored = self.dataset.examples.ragged("candidate_bands", ids)
            bands = stored.values.astype(np.int64)
            whole = np.array_equal(stored.offsets, candidates.offsets)
            if not whole or not ((bands >= 0) & (bands < len(quotas))).all():
                raise self.dataset.damaged("candidates without a band of the manifest")
        return choose_by_band(
            candidates,
            bands,
            quotas,
            # By epoch, not by step: an example's draw does not depend on the size of its batch.
            draw=(self.order.epochs(step), ids),
            key=make_key(self._seed, 4),
        )

    def _scores(
        self, ids: IntArray, listed: dict[str, Ragged], chosen: dict[str, IntArray]
    ) -> tuple[Ragged | None, Ragged | None]:
        """Return teacher scores of the chosen documents; examples without a teacher get NaN."""
        if not self.dataset.manifest.has_scores:
            return None, None
        examples = self.dataset.examples
        # Scores are stored for all listed documents; a step takes some of these.
        num_positives = examples.lengths("positives", ids)
        num_negatives = examples.lengths("negatives", ids)
        by_list: dict[str, list[Any]] = {"positives": [], "negatives": []}
        for row, view in enumerate(examples.views("scores", ids)):
            split, total = int(num_positives[row]), int(num_positives[row] + num_negatives[row])
            full = self._full_scores(view, total, example=int(ids[row]))
            by_list["positives"].append(full[:split])
            by_list["negatives"].append(full[split:])
        if self._quotas is not None:
            by_list["negatives"] = [
                self._full_scores(view, int(count), example=int(example))
                for view, count, example in zip(
                    examples.views("candidate_scores", ids),
                    listed["negatives"].lengths,
                    ids,
                    strict=True,
                )
            ]
        positives, negatives = (
            _select(
                Ragged(
                    offsets=listed[name].offsets,
                    values=np.concatenate(by_list[name]).astype(np.float32),
                ),
                chosen[name],
            )
            for name in ("positives", "negatives")
        )
        return positives, negatives

    def _full_scores(self, view: Any, total: int, *, example: int) -> Any:
        """Return an example's scores of `total` texts; NaN where it has no teacher."""
        full = view if len(view) else np.full(total, np.nan, dtype=np.float32)
        if len(full) != total:
            raise self.dataset.damaged(
                f"example {example} has {len(full)} scores for {total} texts"
            )
        if len(view) and not np.isfinite(view).all():
            raise UserError(
                f"{self.dataset.folder}: a teacher score of example {example} is "
                f"{view[~np.isfinite(view)][0]}",
                allowed="finite numbers",
                fix="correct the scores in the source and prepare the dataset again",
            )
        return full

    def _read_chunk(
        self, texts: IntArray, lengths: IntArray, ids: IntArray, document_ids: IntArray
    ) -> Chunk:
        if not len(texts):
            return self._dummy
        # Text indices ascend within a chunk and queries come first, so each side is one read.
        num_queries = int(np.searchsorted(texts, len(ids)))
        queries, documents = ids[texts[:num_queries]], document_ids[texts[num_queries:] - len(ids)]
        views = self.dataset.examples.views("query", queries)
        views += self.dataset.documents.views("tokens", documents)
        input_ids = self._join(views)
        skipped = np.concatenate(
            [
                self.dataset.examples.scalars("instruction_tokens", queries),
                self.dataset.documents.scalars("instruction_tokens", documents),
            ]
        )
        # A text of nothing but its instruction would be pooled over no token at all.
        if skipped.min() < 0 or (skipped >= lengths[texts]).any():
            raise self.dataset.damaged("an instruction longer than its text")
        teacher = None
        if self._reads_teacher:
            vectors = self.dataset.teacher_vectors(queries=queries, documents=documents)
            teacher = np.concatenate(vectors)
        return Chunk(
            input_ids=input_ids,
            lengths=lengths[texts],
            texts=texts,
            instruction_tokens=skipped if skipped.any() else None,
            teacher=teacher,
        )

    def _join(self, views: list[IntArray]) -> IntArray:
        """Join the tokens of some texts to (T,)."""
        input_ids: IntArray = np.concatenate(views).astype(np.int64)
        # On a GPU such an id would end in an illegal memory access that names no shard.
        vocab_size = self.dataset.tokenizer.vocab_size
        if input_ids.min() < 0 or input_ids.max() >= vocab_size:
            raise self.dataset.damaged(f"a token id outside the vocabulary of {vocab_size}")
        return input_ids

    def __iter__(self) -> Iterator[GlobalBatch]:
        """Yield batches from the current step on, forever; a thread prepares the next one."""
        if not self.config.prefetch:
            while True:
                batch = self.batch(self._step)
                self._step += 1
                yield batch
        batches = map(self.batch, itertools.count(self._step))
        for batch in read_ahead(batches, thread_name="loader"):
            # Counted when it is handed out, not when it is prepared: a resumed run must not skip
            # the batch that the thread holds ready.
            self._step = batch.step + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the next step, and numbers that must not have changed when it resumes."""
        return {
            "version": _STATE_VERSION,
            "step": self._step,
            "seed": self._seed,
            "global_batch_size": self.config.global_batch_size,
            "num_examples": self.dataset.num_examples,
            # 60 bits of the fingerprint, because the state holds only numbers.
            "dataset": int(self.dataset.fingerprint[:15], 16),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch that was handed out.

        Raises:
            UserError: the state is of another dataset, seed, or batch size: the order would differ.
        """
        own = self.state_dict()
        for name in ("version", "seed", "global_batch_size", "num_examples", "dataset"):
            if state.get(name) != own[name]:
                raise UserError(
                    f"the checkpoint's data order has {name} {state.get(name)}",
                    allowed=f"{own[name]}, as this run has",
                    fix="resume with the same data, seed and batch size, or start a new run "
                    "from the checkpoint's weights",
                )
        self._step = int(state["step"])


def _select(lists: Ragged, positions: IntArray) -> Ragged:
    """Return the values at ascending positions, in their rows."""
    lengths = np.bincount(lists.rows[positions], minlength=len(lists)).astype(np.int64)
    return Ragged.from_lengths(lengths, lists.values[positions])


def _band_quotas(dataset: Dataset, config: DataConfig) -> IntArray | None:
    """Return the candidates to draw from each band; None where listed negatives are used.

    Raises:
        UserError: the dataset has no candidates, or not these bands.
    """
    if config.candidates is None:
        return None
    if not dataset.manifest.has_candidates:
        raise UserError(
            f"data.candidates is set but {dataset.folder} stores no candidates",
            fix="run `diffembed mine` and set data.path to its folder, or remove data.candidates",
        )
    wanted = config.candidates.bands
    if not wanted:
        return np.array([config.num_hard_negatives])
    mining = dataset.manifest.mining
    names = mining.bands if mining is not None else ()
    for name in wanted:
        if name not in names:
            raise UserError(
                f"data.candidates.bands: no band {name!r} in {dataset.folder}",
                allowed=", ".join(names) or "none: its candidates have no bands",
                fix="" if names else "remove data.candidates.bands",
            )
    return np.array([wanted.get(name, 0) for name in names])
