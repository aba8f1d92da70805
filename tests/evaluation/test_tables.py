"""Intervals against statistics, published scores against their sources, tables and plots."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.tables import (
    aligned_table,
    by_kind,
    interval,
    latex_table,
    markdown_table,
    paired_difference,
    plot_loss,
    published_table,
    read_published,
    running_mean,
)
from pipeline.evaluation.tasks import BENCHMARKS


def test_the_interval_covers_the_truth_as_often_as_it_claims():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        values = generator.normal(0.3, 0.2, size=60)
        low, high = interval({"s": {str(i): float(v) for i, v in enumerate(values)}})
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 100 <= 0.99


def test_pairing_removes_what_makes_a_query_hard_for_both():
    generator = np.random.default_rng(1)
    hardness = generator.normal(0, 1, size=80)
    gain = generator.normal(0.1, 0.05, size=80)
    before = {"s": {str(i): float(h) for i, h in enumerate(hardness)}}
    after = {"s": {str(i): float(total) for i, total in enumerate(hardness + gain)}}
    difference, low, high = paired_difference(after, before)
    assert difference == pytest.approx(gain.mean())
    # The standard error of the mean gain, not of the scores, sets the width.
    assert high - low == pytest.approx(2 * 1.96 * gain.std() / math.sqrt(80), rel=0.1)
    assert low > 0


def test_splits_weigh_the_same_whatever_their_number_of_queries():
    before = {"a": {"1": 0.0}, "b": {str(i): 0.0 for i in range(99)}}
    after = {"a": {"1": 1.0}, "b": {str(i): 0.0 for i in range(99)}}
    assert paired_difference(after, before) == (0.5, 0.5, 0.5)


def test_results_on_different_queries_are_not_compared():
    with pytest.raises(ValueError, match="different queries"):
        paired_difference({"s": {"1": 1.0}}, {"s": {"2": 1.0}})


def entry(task: str, **parts: object) -> dict[str, object]:
    return {"name": task, "task": task, "replica": False, "ours": 0.5, **parts}


def test_parts_of_a_task_stand_beside_the_papers_parts():
    lengths = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    by_split = {"ours": {f"test_{n}": 1.0 if n <= 4096 else 0.25 for n in lengths}}
    follow = {"ours": {"map_at_1000": 0.2, "ndcg_at_5": 0.3}}
    header, rows = published_table(
        ["ours"],
        [
            entry("LEMBPasskeyRetrieval", by_split=by_split),
            entry("Core17InstructionRetrieval", other_scores=follow),
            entry("LEMBNeedleRetrieval", by_split=by_split, replica=True),
        ],
    )
    table = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert table["ours"] == {
        "LEMBPasskeyRetrieval <= 4k": "100.0",
        "LEMBPasskeyRetrieval > 4k": "25.0",
        "Core17InstructionRetrieval map_at_1000": "20.0",
        "Core17InstructionRetrieval": "50.0",
    }
    assert list(table["DiffEmbed (paper)"].values()) == ["100.0", "29.3", "16.2", "6.0"]
    assert list(table["Qwen3-Embedding-4B (board)"].values()) == ["", "", "", "13.5"]
    assert "ReasonIR-8B (paper)" not in table


def test_a_whole_benchmark_stands_beside_published_means():
    tasks = [entry(t, other_scores={"ours": dict.fromkeys(("map_at_1000", "ndcg_at_5"), 0.1)})
             for t in BENCHMARKS["FollowIR"]]  # fmt: skip
    header, rows = published_table(["ours"], tasks)
    assert header[-1] == "FollowIR mean"
    means = {row[0]: row[-1] for row in rows}
    assert means["ours"] == "50.0"
    assert means["Qwen3-Embedding-4B (board)"] == "11.6"
    assert means["DiffEmbed (paper)"] == ""
    header, _ = published_table(["ours"], tasks[:2])
    assert "mean" not in " ".join(header)
    assert published_table(["ours"], [entry("NFCorpus")]) is None


def test_the_papers_rows_average_to_its_own_averages():
    long_average = {"DiffEmbed (paper)": 62.2, "Mistral+LLM2Vec (paper)": 58.6,
                    "E5-Mistral (paper)": 59.4, "Qwen2.5 (paper)": 52.8}  # fmt: skip
    bright_average = {"DiffEmbed (paper)": 33.2, "Qwen2.5 (paper)": 30.6,
                      "ReasonIR-8B (paper)": 27.2, "Llama3+SimCSE (paper)": 24.9}  # fmt: skip
    for prefix, averages in (("LEMB", long_average), ("Bright", bright_average)):
        for model, average in averages.items():
            found = read_published().scores[model].items()
            scores = [score for column, score in found if column.task.startswith(prefix)]
            assert sum(scores) / len(scores) == pytest.approx(average, abs=0.06)


def test_tables_keep_columns_apart():
    assert latex_table(["a_b", "n"], [["x & y", "1"]]).splitlines()[2:5] == [
        r"a\_b & n \\",
        r"\midrule",
        r"x \& y & 1 \\",
    ]
    assert markdown_table(["a", "b"], [["x|y", "1"]]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x\\|y | 1 |",
    ]
    assert aligned_table(["task", "n"], [["long name", "1"]]).splitlines() == [
        "task       n",
        "long name  1",
    ]


def test_kinds_of_batches_are_lines_of_their_own_and_smoothed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    curve = [
        {"step": n, "kind": "ab"[n % 2], "loss": 5.0 * (n % 2) + generator.normal(), "lr": 1e-4}
        for n in range(400)
    ]
    assert plot_loss(tmp_path / "loss.png", curve).stat().st_size > 0
    lines = by_kind(curve)
    assert [len(line) for line in lines.values()] == [200, 200]
    for kind, level in (("a", 0.0), ("b", 5.0)):
        smooth = running_mean(np.array([line["loss"] for line in lines[kind]]))
        assert smooth.shape == (200,)
        assert abs(smooth.mean() - level) < 0.3
        assert smooth.std() < 0.5


def test_a_running_mean_is_the_mean_around_each_value() -> None:
    values = np.arange(100.0) ** 2
    means = running_mean(values)
    for place in (0, 1, 50, 99):
        assert means[place] == pytest.approx(values[max(0, place - 2) : place + 3].mean())
