"""One training example as every reader gives it, before anything is tokenised."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A query, what answers it, and what does not.

    `negatives` lists the `num_first_negatives` most valuable ones first. `concept` names what the
    example is about: examples of one source with the same concept are known false negatives of
    each other. `scores` are a teacher's, positives then negatives.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    num_first_negatives: int = 0
    instruction: str = ""
    document_instruction: str = ""
    concept: str = ""
    scores: tuple[float, ...] = ()


def stable_hash(*parts: str) -> int:
    """A 63-bit number that depends on the texts only: not on process, platform or order of work."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little") & (2**63 - 1)


def sample_texts(texts: Sequence[str], count: int, *, seed: str) -> tuple[str, ...]:
    """`count` texts chosen by hash, so the choice is the same wherever and whenever it is made."""
    if len(texts) <= count:
        return tuple(texts)
    ranked = sorted(range(len(texts)), key=lambda place: stable_hash(seed, str(place)))
    return tuple(texts[place] for place in sorted(ranked[:count]))
