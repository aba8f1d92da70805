"""What the steps of a build drop: the lines of dropped.jsonl, and their counts by reason."""

from __future__ import annotations

import collections
import json

from pipeline.data.building.plan import Build
from pipeline.run_dir import write_text


def count_dropped(entries: list[dict[str, str]]) -> dict[str, int]:
    """How many entries of dropped.jsonl have each reason."""
    counts = collections.Counter(f"{entry['dropped']}: {entry['reason']}" for entry in entries)
    return dict(sorted(counts.items()))


def write_dropped(build: Build, step: str, task: int, entries: list[dict[str, str]]) -> None:
    """One JSON line per dropped text."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    write_text(build.beside(step, task, "dropped"), "".join(lines))
