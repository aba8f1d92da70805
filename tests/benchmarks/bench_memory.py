"""Plans that the README states: memory of a 70B with all weights trained, on 64 GPUs of 80 GB."""

from __future__ import annotations

from bench_support import Figure

from tests.planning.plan_table import memory_rows


def memory(quick: bool) -> list[Figure]:
    """Return the peak of each run of docs/planning.md, and whether it fits."""
    title, *rows = memory_rows()
    return [
        Figure(
            name=f"{row[0]}, {row[1]} trained, {row[2]} GPUs x {row[4]} tokens, {row[6]}"
            f"{'' if row[5] == '-' else f' ({row[5]})'}: peak",
            asked="fits 80 GB",
            measured=f"{row[title.index('peak')]} GiB, {row[title.index('free')]} GiB free",
            ok=float(row[title.index("free")]) >= 0,
        )
        for row in rows
    ]
