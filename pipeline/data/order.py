"""Which examples meet at a step: a pure function of seed, step, dataset and global batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import IntArray
from pipeline.data.keyed import make_key, permute
from pipeline.errors import UserError

Homogeneous = Literal["none", "source", "instruction"]

# A cycle fixes each unit's share exactly; its length bounds the work of starting at any step.
_MAX_CYCLE = 2**16
# Steps over which a mixed batch's fractional quotas even out.
_QUOTA_STEPS = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A run of examples on disk that share source and instruction: ids start..start+count-1."""

    source: str
    instruction: str
    start: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Endless epochs over `size` elements; no `window` in a row ever holds one element twice.

    With size >= 3 * window every epoch is a permutation of all elements. Elements seen in the last
    window of an epoch wait until after the first window of the next one. A smaller stream's epoch
    has as many whole windows as fit, and leaves a different remainder out each time.
    """

    size: int
    window: int
    key: int

    @property
    def is_small(self) -> bool:
        """Whether epochs are cut to whole windows."""
        return self.size < 3 * self.window

    def take(self, *, ordinal: int, start: int, count: int) -> IntArray:
        """Elements of one window.

        Args:
            ordinal: how many windows were taken before; used by small streams.
            start: how many elements were taken before; used by the others.
            count: elements wanted, at most `window`.
        """
        if self.is_small:
            epoch, place = divmod(ordinal, self.size // self.window)
            first = place * self.window
            return self._epoch(epoch, np.arange(first, first + count))
        epoch, first = divmod(start, self.size)
        inside = min(count, self.size - first)
        parts = [self._epoch(epoch, np.arange(first, first + inside))]
        if inside < count:
            parts.append(self._epoch(epoch + 1, np.arange(count - inside)))
        return np.concatenate(parts)

    def _epoch(self, epoch: int, places: IntArray) -> IntArray:
        key = make_key(self.key, epoch)
        elements = permute(places, self.size, key)
        head = 2 * self.window
        if epoch == 0 or self.is_small or not len(places) or places[0] >= head:
            return elements
        first = permute(np.arange(head), self.size, key)
        last = permute(
            np.arange(self.size - self.window, self.size),
            self.size,
            make_key(self.key, epoch - 1),
        )
        seen = np.isin(first, last)
        adjusted = np.concatenate([first[~seen], first[seen]])
        early = places < head
        elements[early] = adjusted[places[early]]
        return elements


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Groups that are drawn as one population, and the share of the batches they get."""

    groups: tuple[Group, ...]
    share: float

    @property
    def size(self) -> int:
        """Number of examples."""
        return sum(group.count for group in self.groups)

    def example_ids(self, elements: IntArray) -> IntArray:
        """Example ids of elements 0..size-1."""
        counts = np.array([group.count for group in self.groups], dtype=np.int64)
        starts = np.array([group.start for group in self.groups], dtype=np.int64)
        ends = np.cumsum(counts)
        shifts: IntArray = starts - (ends - counts)
        return elements + shifts[np.searchsorted(ends, elements, side="right")]


def source_shares(
    groups: Sequence[Group],
    *,
    weights: Mapping[str, float],
    temperature: float,
    cap: int | None,
) -> dict[str, float]:
    """Share of each source: weight * min(count, cap) ** (1 / temperature), normalised.

    Temperature 1 is proportional to size, larger is flatter (Raffel et al., arXiv 1910.10683,
    section 3.5.2, who also cap the size that counts).
    """
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.source] = counts.get(group.source, 0) + group.count
    unknown = sorted(set(weights) - set(counts))
    if unknown:
        raise UserError(f"data.weights: no source {unknown[0]!r}", allowed=", ".join(counts))
    raw = {
        source: weights.get(source, 1.0) * min(count, cap or count) ** (1.0 / temperature)
        for source, count in counts.items()
    }
    total = sum(raw.values())
    if not total > 0:
        raise UserError("data.weights: every source has weight 0", allowed="one above 0")
    return {source: value / total for source, value in raw.items() if value > 0}


def make_units(
    groups: Sequence[Group], *, shares: Mapping[str, float], homogeneous: Homogeneous, batch: int
) -> list[Unit]:
    """Gather groups into the populations that batches are drawn from.

    With `instruction`, a source's groups smaller than a batch are joined into one unit of mixed
    instructions, so that no batch repeats an example; if even that is too small it joins the
    source's smallest other unit.

    Raises:
        UserError: a source has fewer examples than one homogeneous batch needs.
    """
    units = []
    for source, share in shares.items():
        own = [group for group in groups if group.source == source]
        total = sum(group.count for group in own)
        if homogeneous != "none" and total < batch:
            raise UserError(
                f"data.homogeneous: {homogeneous} needs a full batch from each source, and "
                f"{source!r} has {total} examples for data.global_batch_size {batch}",
                fix=f"lower global_batch_size to {total}, set data.homogeneous to none, "
                f"or set data.weights.{source} to 0",
            )
        parts = _merge_small(own, batch) if homogeneous == "instruction" else [own]
        for part in parts:
            size = sum(group.count for group in part)
            units.append(Unit(groups=tuple(part), share=share * size / total))
    return units


def _merge_small(groups: list[Group], batch: int) -> list[list[Group]]:
    parts = [[group] for group in groups if group.count >= batch]
    small = [group for group in groups if group.count < batch]
    if small and sum(group.count for group in small) < batch and parts:
        smallest = min(range(len(parts)), key=lambda place: parts[place][0].count)
        small = parts.pop(smallest) + small
    return [*parts, small] if small else parts


class Order:
    """The example ids of every step, O(1) to reach and the same for any number of ranks."""

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        global_batch_size: int,
        homogeneous: Homogeneous,
        seed: int,
        shares: Mapping[str, float],
    ) -> None:
        self.global_batch_size = global_batch_size
        self.homogeneous = homogeneous
        self.seed = seed
        self.units = make_units(
            groups, shares=shares, homogeneous=homogeneous, batch=global_batch_size
        )
        share = np.array([unit.share for unit in self.units])
        if homogeneous == "none":
            self._counts = _apportion(share, global_batch_size * _QUOTA_STEPS)
            self._first_slot = np.cumsum(self._counts) - self._counts
            windows = -(-self._counts // _QUOTA_STEPS)
            self._refuse_small(windows)
        else:
            passes = sum(unit.size for unit in self.units) / global_batch_size
            cycle = int(min(max(passes, 16 / share.min(), 1), _MAX_CYCLE))
            self._counts = _apportion(share, cycle)
            windows = np.full(len(self.units), global_batch_size)
        self._streams = [
            Stream(size=unit.size, window=int(window), key=make_key(seed, 1, number))
            for number, (unit, window) in enumerate(zip(self.units, windows, strict=True))
        ]
        self._cycle_cache: tuple[int, IntArray, IntArray] | None = None

    @property
    def kinds(self) -> dict[str, Unit]:
        """The populations of homogeneous batches by a short name, the same in every run.

        A source's name, with a number where it has several; empty where batches are mixtures.
        """
        if self.homogeneous == "none":
            return {}
        sources = [unit.groups[0].source for unit in self.units]
        names = [
            f"{source}#{sources[: number + 1].count(source)}"
            if sources.count(source) > 1
            else source
            for number, source in enumerate(sources)
        ]
        return dict(zip(names, self.units, strict=True))

    def kind(self, step: int) -> str:
        """Name of the population of a step's examples; empty for a mixture."""
        if self.homogeneous == "none":
            return ""
        return [*self.kinds][self._draw_unit(step)[0]]

    def batch(self, step: int) -> IntArray:
        """(global_batch_size,) example ids of a step, all different."""
        if self.homogeneous == "none":
            return self._mixed(step)
        unit, ordinal = self._draw_unit(step)
        size = self.global_batch_size
        elements = self._streams[unit].take(ordinal=ordinal, start=ordinal * size, count=size)
        return self.units[unit].example_ids(elements)

    def _mixed(self, step: int) -> IntArray:
        """Slots of a cycle lie sorted by unit; a step takes every `_QUOTA_STEPS`-th of them."""
        cycle, place = divmod(step, _QUOTA_STEPS)
        first, last = self._first_slot, self._first_slot + self._counts
        before = _count_residues(last, place) - _count_residues(first, place)
        until = _count_residues(last, place + 1) - _count_residues(first, place + 1)
        parts = []
        for number, unit in enumerate(self.units):
            elements = self._streams[number].take(
                ordinal=step,
                start=int(cycle * self._counts[number] + before[number]),
                count=int(until[number] - before[number]),
            )
            parts.append(unit.example_ids(elements))
        return np.concatenate(parts)

    def _draw_unit(self, step: int) -> tuple[int, int]:
        """The unit of a homogeneous step, and how many batches it has given before."""
        length = int(self._counts.sum())
        cycle, place = divmod(step, length)
        cached = self._cycle_cache
        if cached is None or cached[0] != cycle:
            slots = permute(np.arange(length), length, make_key(self.seed, 2, cycle))
            units = np.searchsorted(np.cumsum(self._counts), slots, side="right")
            by_unit = np.argsort(units, kind="stable")
            ordinals = np.empty(length, dtype=np.int64)
            first = np.cumsum(self._counts) - self._counts
            ordinals[by_unit] = np.arange(length) - np.repeat(first, self._counts)
            cached = self._cycle_cache = (cycle, units, ordinals)
        unit = int(cached[1][place])
        return unit, int(cycle * self._counts[unit] + cached[2][place])

    def _refuse_small(self, windows: IntArray) -> None:
        for unit, window in zip(self.units, windows, strict=True):
            if unit.size < window:
                raise UserError(
                    f"data.global_batch_size: {self.global_batch_size} takes {window} examples of "
                    f"{unit.groups[0].source!r} per batch, which has {unit.size}",
                    fix="lower global_batch_size or the weight of this source",
                )


def _apportion(share: NDArray[np.float64], total: int) -> IntArray:
    """Whole numbers that add up to `total`, near share * total, none of them 0."""
    exact = share / share.sum() * max(total, len(share))
    counts: IntArray = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = max(total, len(share)) - int(counts.sum())
    if missing > 0:
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    for _ in range(-missing):  # room made for units whose exact share is below one
        counts[np.argmax(counts)] -= 1
    return counts


def _count_residues(stop: IntArray, below: int) -> IntArray:
    """How many k in 0..stop-1 have k mod _QUOTA_STEPS < below."""
    count: IntArray = (stop // _QUOTA_STEPS) * below + np.minimum(stop % _QUOTA_STEPS, below)
    return count
