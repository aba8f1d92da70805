"""Write small local replicas of the three benchmarks, from problems outside the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from pipeline.errors import UserError
from ReasonAug.files import make_folder, read_jsonl
from ReasonAug.problem import Problem
from ReasonAug.replicas import bright, followir, longembed
from ReasonAug.replicas.hub import write_dataset
from ReasonAug.splits import UNSEEN_CONCEPTS, UNSEEN_PROBLEMS, Entry

MIN_CAP = 256


def write_replicas(
    data: Path,
    hub: Path,
    *,
    seed: int,
    max_tokens: int,
    divide_lengths: int = 1,
    long_queries: int = 10,
) -> None:
    """Write all replicas below `hub`, from the evaluation splits in `data/problems.jsonl`.

    Args:
        data: Folder written by `templates`.
        hub: Folder that replaces the hub; data sets keep their names below it.
        seed: Same seed, same bytes.
        max_tokens: Cap of the LongEmbed documents.
        divide_lengths: Tokens of a LongEmbed split's name for one token of its documents.
        long_queries: Of each length in the LongEmbed replicas.

    Raises:
        UserError: An input is missing or malformed, or `hub` cannot be written.
    """
    if max_tokens < MIN_CAP:
        raise UserError(found=f"--max-tokens {max_tokens}", allowed=f">= {MIN_CAP}")
    if divide_lengths < 1:
        raise UserError(found=f"--divide-lengths {divide_lengths}", allowed=">= 1")
    if long_queries < 10:
        raise UserError(found=f"--long-queries {long_queries}", allowed=">= 10")
    size = longembed.Size(cap=max_tokens, divisor=divide_lengths, num_queries=long_queries)
    entries = read_entries(data / "problems.jsonl", (UNSEEN_PROBLEMS, UNSEEN_CONCEPTS))
    make_folder(hub)
    datasets = {
        "mteb/BRIGHT": (bright.bright_configs(entries), bright.ABOUT),
        "mteb/Core17InstructionRetrieval": (
            followir.followir_configs(entries, Random(f"{seed}/followir")),
            followir.ABOUT,
        ),
        "dwzhu/LongEmbed": (
            longembed.needle_configs(entries, Random(f"{seed}/needle"), size=size),
            size.about(),
        ),
        "mteb/LEMBPasskeyRetrieval": (
            longembed.passkey_configs(entries, Random(f"{seed}/passkey"), size=size),
            size.about(),
        ),
    }
    for name, (configs, about) in datasets.items():
        count = write_dataset(hub, name, configs, about=about)
        print(f"{name}: {count} rows")
    print(f"written: {hub}")


def read_entries(path: Path, splits: Sequence[str]) -> list[Entry]:
    """Return the entries of `problems.jsonl` that belong to `splits`.

    Raises:
        UserError: The file is missing, malformed, or lacks one of the splits.
    """
    fields = Problem.__dataclass_fields__
    entries = []
    for number, row in enumerate(
        read_jsonl(path, fix="run `python -m ReasonAug templates` first"), 1
    ):
        missing = {"id", "split", *fields} - set(row)
        if missing:
            raise UserError(
                found=f"{path}:{number} lacks {', '.join(sorted(missing))}",
                allowed="problems.jsonl as `python -m ReasonAug templates` writes it",
            )
        if row["split"] in splits:
            problem = Problem(**{name: row[name] for name in fields})
            entries.append(Entry(id=row["id"], split=row["split"], problem=problem))
    present = {entry.split for entry in entries}
    for split in splits:
        if split not in present:
            raise UserError(
                found=f"{path} has no row of split {split!r}",
                fix="write the folder again with `python -m ReasonAug templates`",
            )
    return entries
