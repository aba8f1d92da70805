"""Choose the examples and documents of each step as a pure function of seed, step and dataset.

    groups (source, instruction)  --make_units-->  units, each with its share of the batches
    step  --Order-->  a unit, and its next window of elements  --permute-->  example ids
    example ids  --choose, choose_by_band-->  their documents

Every random number is a hash of seed, purpose and position: no step depends on an earlier one, nor
on the number of ranks.

Letters: N examples of a batch, R rows of a ragged array, nnz its values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import IntArray, Ragged
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
        # `_counts`: each unit's examples in a cycle of `_QUOTA_STEPS` mixed batches, or each unit's
        # batches in a cycle of homogeneous ones.
        if homogeneous == "none":
            self._counts = _apportion(share, global_batch_size * _QUOTA_STEPS)
            # A quota of 2.3 examples a batch is met over the cycle: whole numbers in each batch,
            # and the exact share in all of its steps together.
            self._first_slot = np.cumsum(self._counts) - self._counts
            # The most that one step takes of a unit, rounded up.
            windows = -(-self._counts // _QUOTA_STEPS)
            self._refuse_small(windows)
        else:
            # Long enough for one pass over the data and for 16 batches of the rarest unit.
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
        """Return the name of the population of a step's examples; empty for a mixture."""
        if self.homogeneous == "none":
            return ""
        return [*self.kinds][self._draw_unit(step)[0]]

    def batch(self, step: int) -> IntArray:
        """(global_batch_size,) example ids of a step, all different."""
        drawn = [
            self.units[unit].example_ids(self._streams[unit].take(**window))
            for unit, window in self._windows(step)
        ]
        return np.concatenate(drawn)

    def epochs(self, step: int) -> IntArray:
        """(global_batch_size,) how often each example of a step was drawn before.

        In a small unit, whose epochs leave a few examples out, the number of the epoch instead.
        """
        return np.concatenate(
            [self._streams[unit].epochs(**window) for unit, window in self._windows(step)]
        )

    def _windows(self, step: int) -> list[tuple[int, dict[str, int]]]:
        """Return the units that a step draws from, and the window that it takes of each."""
        if self.homogeneous == "none":
            return self._mixed(step)
        unit, ordinal = self._draw_unit(step)
        size = self.global_batch_size
        # Only batches of this unit advance its stream: another unit's data cannot change its order.
        return [(unit, {"ordinal": ordinal, "start": ordinal * size, "count": size})]

    def _mixed(self, step: int) -> list[tuple[int, dict[str, int]]]:
        """Return windows of all units, in shares that even out over a cycle.

        A cycle has one slot per example of `_QUOTA_STEPS` steps. Slots are sorted by unit, and step
        k of the cycle takes slots k, k + _QUOTA_STEPS, and so on.
        """
        cycle, residue = divmod(step, _QUOTA_STEPS)
        first, last = self._first_slot, self._first_slot + self._counts
        # Counted, not enumerated: the step may be the millionth of a resumed run.
        # Elements of each unit that the steps of the cycle before this one, and up to it, take.
        before = _count_residues(last, residue) - _count_residues(first, residue)
        until = _count_residues(last, residue + 1) - _count_residues(first, residue + 1)
        return [
            (
                unit,
                {
                    "ordinal": step,
                    "start": int(cycle * self._counts[unit] + before[unit]),
                    "count": int(until[unit] - before[unit]),
                },
            )
            for unit in range(len(self.units))
        ]

    def _draw_unit(self, step: int) -> tuple[int, int]:
        """Return the unit of a homogeneous step, and how many batches it has given before."""
        length = int(self._counts.sum())
        cycle, slot = divmod(step, length)
        cached = self._cycle_cache
        # Shuffled again in each cycle: otherwise the same units would follow one another forever.
        # Shuffling a cycle takes longer than a step should; consecutive steps share it.
        if cached is None or cached[0] != cycle:
            slots = permute(np.arange(length), length, make_key(self.seed, 2, cycle))
            units = np.searchsorted(np.cumsum(self._counts), slots, side="right")
            by_unit = np.argsort(units, kind="stable")
            ordinals = np.empty(length, dtype=np.int64)
            first = np.cumsum(self._counts) - self._counts
            # Number the slots of each unit 0, 1, 2, ... in the order of the shuffled cycle.
            ordinals[by_unit] = np.arange(length) - np.repeat(first, self._counts)
            cached = self._cycle_cache = (cycle, units, ordinals)
        unit = int(cached[1][slot])
        return unit, int(cycle * self._counts[unit] + cached[2][slot])

    def _refuse_small(self, windows: IntArray) -> None:
        for unit, window in zip(self.units, windows, strict=True):
            if unit.size < window:
                raise UserError(
                    f"data.global_batch_size: {self.global_batch_size} takes {window} examples of "
                    f"{unit.groups[0].source!r} per batch, which has {unit.size}",
                    fix="lower global_batch_size or the weight of this source",
                )


def _apportion(share: NDArray[np.float64], total: int) -> IntArray:
    """Round share * total to whole numbers that add up to `total`, none of them 0."""
    exact = share / share.sum() * max(total, len(share))
    # Round down, then give the missing ones to the largest remainders.
    counts: IntArray = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = max(total, len(share)) - int(counts.sum())
    if missing > 0:
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    for _ in range(-missing):  # make room for units whose exact share is below one
        counts[np.argmax(counts)] -= 1
    return counts


def _count_residues(stop: IntArray, below: int) -> IntArray:
    """Count the k in 0..stop-1 with k mod _QUOTA_STEPS < below."""
    count: IntArray = (stop // _QUOTA_STEPS) * below + np.minimum(stop % _QUOTA_STEPS, below)
    return count


def source_shares(
    groups: Sequence[Group],
    *,
    weights: Mapping[str, float],
    temperature: float,
    cap: int | None,
) -> dict[str, float]:
    """Return each source's share: weight * min(count, cap) ** (1 / temperature), normalised.

    Temperature 1 is proportional to size, larger is flatter (Raffel et al., arXiv 1910.10683,
    section 3.5.2, who also cap the size that counts).
    """
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.source] = counts.get(group.source, 0) + group.count
    unknown = sorted(set(weights) - set(counts))
    if unknown:
        raise UserError(f"data.weights: no source {unknown[0]!r}", allowed=", ".join(counts))
    # The weight multiplies the flattened share: weight 2 is twice as many batches at any
    # temperature.
    try:
        raw = {
            source: weights.get(source, 1.0) * min(count, cap or count) ** (1.0 / temperature)
            for source, count in counts.items()
        }
        total = sum(raw.values())
    except OverflowError:
        total = math.inf
    if not total > 0:
        raise UserError("data.weights: every source has weight 0", allowed="one above 0")
    if total == math.inf:
        raise UserError(
            f"data.mixture_temperature: {temperature:g} makes shares of {max(counts.values()):,} "
            "examples that no number can hold",
            fix="raise it, or lower data.weights; towards 0 the largest source takes every batch",
        )
    return {source: value / total for source, value in raw.items() if value > 0}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Groups that are drawn as one population, and the share of the batches they get."""

    groups: tuple[Group, ...]
    share: float

    @property
    def size(self) -> int:
        """Number of examples."""
        return sum(group.count for group in self.groups)

    def describe(self) -> dict[str, Any]:
        """Describe the examples of this kind of batch."""
        return {
            "source": self.groups[0].source,
            "instructions": [group.instruction for group in self.groups],
            "examples": self.size,
            "share": self.share,
        }

    def example_ids(self, elements: IntArray) -> IntArray:
        """Return the example ids of elements 0..size-1."""
        counts = np.array([group.count for group in self.groups], dtype=np.int64)
        starts = np.array([group.start for group in self.groups], dtype=np.int64)
        ends = np.cumsum(counts)
        shifts: IntArray = starts - (ends - counts)
        return elements + shifts[np.searchsorted(ends, elements, side="right")]


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
        # An example that is in a batch twice would be its own false negative.
        if homogeneous != "none" and total < batch:
            raise UserError(
                f"data.homogeneous: {homogeneous} needs a full batch from each source, and "
                f"{source!r} has {total} examples for data.global_batch_size {batch}",
                fix=f"lower global_batch_size to {total}, set data.homogeneous to none, "
                f"or set data.weights.{source} to 0",
                docs="trouble.md#small-source",
            )
        merged = _merge_small(own, batch) if homogeneous == "instruction" else [own]
        for members in merged:
            size = sum(group.count for group in members)
            # Within a source by size, so that each of its examples is drawn equally often.
            units.append(Unit(groups=tuple(members), share=share * size / total))
    return units


def _merge_small(groups: list[Group], batch: int) -> list[list[Group]]:
    """Join the groups that are smaller than a batch, if necessary with the smallest other one."""
    large = [[group] for group in groups if group.count >= batch]
    small = [group for group in groups if group.count < batch]
    if small and sum(group.count for group in small) < batch and large:
        # The smallest, because its batches lose the property of one instruction.
        smallest = min(range(len(large)), key=lambda index: large[index][0].count)
        small = large.pop(smallest) + small
    return [*large, small] if small else large


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Endless epochs over `size` elements; no `window` in a row ever holds one element twice.

    With size >= 3 * window every epoch is a permutation of all elements. Elements seen in the last
    window of an epoch wait until after the first window of the next one. A smaller stream's epoch
    has as many whole windows as fit, and leaves out a different remainder each time.
    """

    size: int
    window: int
    key: int

    @property
    def is_small(self) -> bool:
        """True where epochs are cut to whole windows."""
        # Three windows: `_epoch` reorders the first two of an epoch, and the next epoch takes the
        # last one from the plain permutation, so that one must not be reordered.
        return self.size < 3 * self.window

    def take(self, *, ordinal: int, start: int, count: int) -> IntArray:
        """Return the elements of one window.

        Args:
            ordinal: how many windows were taken before; used by small streams.
            start: how many elements were taken before; used by the others.
            count: elements wanted, at most `window`.
        """
        if self.is_small:
            # Whole windows only, so that no window spans two epochs and repeats an element.
            epoch, number = divmod(ordinal, self.size // self.window)
            first = number * self.window
            return self._epoch(epoch, np.arange(first, first + count))
        epoch, first = divmod(start, self.size)
        # A window may end in the next epoch, whose start avoids the end of this one.
        inside = min(count, self.size - first)
        elements = self._epoch(epoch, np.arange(first, first + inside))
        if inside == count:
            return elements
        return np.concatenate([elements, self._epoch(epoch + 1, np.arange(count - inside))])

    def epochs(self, *, ordinal: int, start: int, count: int) -> IntArray:
        """(count,) the epoch of each element of a window, from 0; same arguments as `take`."""
        if self.is_small:
            return np.full(count, ordinal // (self.size // self.window), dtype=np.int64)
        return np.arange(start, start + count, dtype=np.int64) // self.size

    def _epoch(self, epoch: int, positions: IntArray) -> IntArray:
        """Return the elements at ascending positions of an epoch."""
        key = make_key(self.key, epoch)
        elements = permute(positions, self.size, key)
        head = 2 * self.window
        if epoch == 0 or self.is_small or not len(positions) or positions[0] >= head:
            return elements
        # Elements of the last window before this epoch move behind its first window. Two
        # permutations tell which these are, so that no state is needed.
        first = permute(np.arange(head), self.size, key)
        last = permute(
            np.arange(self.size - self.window, self.size),
            self.size,
            make_key(self.key, epoch - 1),
        )
        # At most `window` of these 2 * window elements were seen, so the unseen fill a window.
        seen = np.isin(first, last)
        adjusted = np.concatenate([first[~seen], first[seen]])
        early = positions < head
        elements[early] = adjusted[positions[early]]
        return elements


def choose(lists: Ragged, count: int, *, num_first: IntArray | None, key: int) -> IntArray:
    """Choose up to `count` values of each row: the first `num_first`, then others at random.

    Args:
        lists: (R rows) the candidates.
        count: how many to take of a row that has as many.
        num_first: (R,) preferred values at the front of each row; None for none.
        key: decides the choice.

    Returns:
        (nnz,) positions in `lists.values`, ascending.
    """
    lengths = lists.lengths
    if not len(lengths) or lengths.max() <= count:
        return np.arange(len(lists.values), dtype=np.int64)
    rows, positions = lists.rows, np.arange(len(lists.values), dtype=np.int64)
    rank = mix(positions.astype(np.uint64) ^ np.uint64(make_key(key)))
    late = np.zeros(len(positions), dtype=bool)
    if num_first is not None:
        # The position within the row, compared with the number that comes first in that row.
        late = positions - lists.offsets[:-1][rows] >= num_first[rows]
    # By row, then preferred values before others, then at random.
    order = np.lexsort((rank, late, rows))
    # In `order` each row occupies the same places as in `lists`; the first `count` are taken.
    taken = positions < lists.offsets[:-1][rows] + count
    return np.sort(order[taken])


def choose_by_band(
    lists: Ragged, bands: IntArray, quotas: IntArray, *, draw: tuple[IntArray, IntArray], key: int
) -> IntArray:
    """Choose up to `quotas[b]` values of band b of each row at random.

    Args:
        lists: (R rows) the candidates.
        bands: (nnz,) band of each of them.
        quotas: values to take of each band; a row takes fewer where a band has fewer.
        draw: two (R,) numbers; rows of other numbers are drawn independently.
        key: decides the choice.

    Returns:
        (nnz,) positions in `lists.values`, ascending.
    """
    rows = lists.rows
    within = np.arange(len(rows)) - lists.offsets[:-1][rows]
    rank = uniform(key, draw[0][rows], draw[1][rows], within)
    group = rows * len(quotas) + bands
    # By row and band, then at random: the first values of each group are taken.
    order = np.lexsort((rank, group))
    ordered = group[order]
    # The place of each value within its group: its distance from the group's first.
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return np.sort(order[place < quotas[bands[order]]]).astype(np.int64)


# 2**64 divided by the golden ratio: SplitMix64's step from state to state.
GOLDEN_RATIO = 0x9E3779B97F4A7C15
_STEP = np.uint64(GOLDEN_RATIO)


def make_key(*parts: int) -> int:
    """Make one 64-bit key from several integers; each of them and their order matter.

    In the keys of a run the seed is followed by a purpose: 1 for streams and 2 for cycles (here), 3
    for documents and 4 for candidates (loader.py), 4 to 7 with a step for tokens (text_loader.py).
    """
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        # Multiplied before each part: (1, 2) and (2, 1) must give different keys.
        # The mask cuts longer seeds. Without the 1, a part of 0 would leave the key 0 as it is.
        key = mix(key * _STEP + np.uint64(part & 0xFFFFFFFFFFFFFFFF) + 1)
    return int(key[0])


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniform(key: int, *parts: IntArray) -> NDArray[np.float64]:
    """Return numbers in [0, 1), each a function of the key and of its integers in `parts`.

    Args:
        key: from `make_key`.
        parts: arrays of one shape (N,), values 0 and above.

    Returns:
        (N,) multiples of 2**-53.
    """
    # The same recurrence as `make_key`, for a whole array at once.
    word = np.full(parts[0].shape, key, dtype=np.uint64)
    for part in parts:
        word = mix(word * _STEP + part.astype(np.uint64) + np.uint64(1))
    # The 53 highest bits fill the mantissa of a double: no value is rounded up to 1.
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: IntArray, size: int, key: int) -> IntArray:
    """Map indices through a keyed bijection of 0..size-1 without storing it.

    A four-round Feistel network (Luby and Rackoff, 1988) on the smallest even number of bits that
    holds `size`, walked until it lands inside (Black and Rogaway, 2002).

    Args:
        index: any shape, values 0..size-1.
        size: number of elements permuted, at least 1.
        key: selects the permutation.
    """
    # Bits of each half of a word: together they hold size - 1.
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(make_key(key, number)) for number in range(4)]
    # Copied: the walk below overwrites it, and callers pass ranges and views.
    flat = np.asarray(index, dtype=np.uint64).ravel().copy()
    outside = np.arange(len(flat))
    while len(outside):
        left, right = flat[outside] >> half, flat[outside] & low
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & low)
        flat[outside] = (left << half) | right
        # Each round is a bijection, so two walks never meet. At least a quarter of all words are
        # inside, so a walk takes at most 4 rounds on average.
        outside = outside[flat[outside] >= size]
    return flat.astype(np.int64).reshape(np.shape(index))
