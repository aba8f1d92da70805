"""The report: right numbers in every form, and nothing hidden."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import benchmark_replicas
import numpy as np
import pytest

from pipeline.config import EvaluateConfig, EvaluatedModel, RopeScaling
from pipeline.errors import UserError
from pipeline.evaluation import tables
from pipeline.evaluation.datasets import REVISION_FILE, get_task
from pipeline.evaluation.report import compare_ends, write_report
from pipeline.evaluation.run import run_all, run_element
from pipeline.evaluation.tables import (
    aligned_table,
    by_kind,
    latex_table,
    markdown_table,
    plot_loss,
    published_table,
    read_published,
    running_mean,
)
from pipeline.evaluation.tasks import BENCHMARKS


@pytest.fixture
def reported(config, load, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": s, "loss": 3.0 - s / 2, "lr": 1e-4 * s} for s in range(4)]
    # A killed trainer may leave half a line.
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
    )
    tasks = ("Core17InstructionRetrieval", "LEMBPasskeyRetrieval", "BrightBiologyRetrieval")
    config = dataclasses.replace(config, training_run=run, tasks=tasks)
    results = run_all(config, load=load)
    return config, results, write_report(config)


def test_the_report_holds_every_score_in_every_form(reported, capsys):
    config, results, folder = reported
    report = json.loads((folder / "report.json").read_text())
    assert [task["name"] for task in report["tasks"]] == list(config.tasks)
    for task in report["tasks"]:
        for model in ("weak", "strong"):
            result = next(r for r in results if (r["task"], r["model"]) == (task["name"], model))
            assert task[model] == result["score"]
            assert task["metric"] == result["metric"]
            assert f"| {result['score']:.4f} |" in (folder / "report.md").read_text()
        assert task["difference"] == pytest.approx(task["strong"] - task["weak"], abs=4e-5)
        assert task["ci_low"] <= task["difference"] <= task["ci_high"]
    by_name = {task["name"]: task for task in report["tasks"]}
    assert by_name["BrightBiologyRetrieval"]["significant"]
    assert by_name["LEMBPasskeyRetrieval"]["chance"] == pytest.approx(1 / 6)
    assert by_name["Core17InstructionRetrieval"]["metric"] == "p-MRR"
    assert by_name["Core17InstructionRetrieval"]["chance"] == 0
    passkey = by_name["LEMBPasskeyRetrieval"]
    assert len(passkey["by_split"]["strong"]) == 8
    for split, found in passkey["split_differences"].items():
        scores = [passkey["by_split"][model][split] for model in ("weak", "strong")]
        assert found["difference"] == pytest.approx(scores[1] - scores[0], abs=4e-5)
        assert found["ci_low"] <= found["difference"] <= found["ci_high"]
        row = f"| LEMBPasskeyRetrieval | {split} | {scores[0]:.4f} | {scores[1]:.4f} | "
        assert f"{row}{found['difference']:+.4f} | [" in (folder / "report.md").read_text()
    assert len(passkey["split_differences"]) == 8
    assert report["training"] == {
        "num_steps": 4,
        "kind": "",
        "averaged": 1,
        "first_loss": 3.0,
        "last_loss": 1.5,
    }
    for name in ("scores.png", "splits.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in (folder / "report.md").read_text()


def test_the_card_of_an_export_gets_the_scores_of_its_report(config, load):
    config = dataclasses.replace(config, tasks=("BrightBiologyLongRetrieval",))
    card = config.models[0].path / "README.md"
    text = "# Embedder\n\n## Evaluation\n\nNot evaluated yet.\n\n## Licence\n\nFree.\n"
    card.write_text(text)
    (result, _) = run_all(config, load=load)
    write_report(config)
    assert card.read_text() == text  # no export of ours
    (card.parent / "diffembed.json").write_text("{}")
    for _ in range(2):
        run_all(config, load=load)
        write_report(config)
        low, high = tables.interval(result["per_query"])
        row = f"| BrightBiologyLongRetrieval | {result['metric']} | {result['score']:.4f} | "
        assert card.read_text().count(f"{row}[{low:.4f}, {high:.4f}] | 64 |") == 1
    assert "Not evaluated" not in card.read_text()
    assert card.read_text().endswith("\n\n## Licence\n\nFree.\n")


def test_the_report_prints_its_table_and_says_what_chance_would_score(config, load, capsys):
    config = dataclasses.replace(config, tasks=("BrightBiologyLongRetrieval",))
    run_all(config, load=load)
    capsys.readouterr()
    write_report(config)
    header, row, where = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["task", "metric", "weak", "strong", "chance"]
    assert row.split()[:2] == ["BrightBiologyLongRetrieval", "recall_at_1"]
    assert row.split()[4] == "0.1250"
    assert where.endswith("report.md")


def test_a_report_of_unfinished_elements_names_the_ones_to_run(config, load):
    config = dataclasses.replace(config, tasks=("BrightBiologyRetrieval", "BrightAopsRetrieval"))
    run_element(config, 1, load=load)
    with pytest.raises(UserError, match=r"3 of 4 .* or run elements 0,2,3"):
        write_report(config)


def test_published_scores_stand_only_beside_scores_on_fetched_data(config, load, tmp_path):
    hub = tmp_path / "hub"
    config = dataclasses.replace(
        config, snapshots=hub, tasks=("Core17InstructionRetrieval", "BrightAopsRetrieval")
    )
    benchmark_replicas.write_follow_ir(hub)
    benchmark_replicas.write_bright(hub, "mteb/BRIGHT")
    revision = get_task("BrightAopsRetrieval").metadata.dataset["revision"]
    (hub / "mteb/BRIGHT" / REVISION_FILE).write_text(revision)
    run_all(config, load=load)
    folder = write_report(config)
    replica, fetched = json.loads((folder / "report.json").read_text())["tasks"]
    assert replica["published"] == {}
    assert fetched["published"]["BrightAopsRetrieval"]["DiffEmbed (paper)"] == 15.4
    assert (replica["replica"], fetched["replica"]) == (True, False)
    assert "| DiffEmbed (paper) | 15.4 |" in (folder / "report.md").read_text()
    assert "| local |" in (folder / "report.md").read_text()


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


def test_the_worst_queries_are_shown_with_what_was_found_instead(config, load):
    config = dataclasses.replace(config, tasks=("BrightAopsRetrieval",))
    weak, strong = run_all(config, load=load)
    (examples,) = weak["worst_queries"].values()
    scores = [example["score"] for example in examples]
    assert scores == sorted(weak["per_query"]["default/standard"].values())
    for example in examples:
        ranks = [document["rank"] for document in example["documents"]]
        assert ranks[:3] == [1, 2, 3]
        assert any(document["relevant"] for document in example["documents"])
    text = (write_report(config) / "examples.md").read_text()
    (shown,) = strong["worst_queries"].values()
    assert shown[0]["text"] in text
    assert shown[0]["documents"][0]["id"] in text


def test_one_model_alone_is_reported_without_a_difference(config, load):
    config = dataclasses.replace(
        config, tasks=("BrightBiologyRetrieval",), models=config.models[1:]
    )
    run_all(config, load=load)
    report = json.loads((write_report(config) / "report.json").read_text())
    assert report["tasks"][0]["strong"] > 0.5
    assert "difference" not in report["tasks"][0]


def test_three_models_compare_the_last_with_the_first(config, load, tmp_path):
    middle = EvaluatedModel(name="middle", path=config.models[0].path)
    config = dataclasses.replace(
        config,
        tasks=("BrightBiologyRetrieval",),
        models=(config.models[0], middle, config.models[1]),
    )
    run_all(config, load=load)
    folder = write_report(config)
    (task,) = json.loads((folder / "report.json").read_text())["tasks"]
    assert task["middle"] == task["weak"]
    assert task["difference"] == pytest.approx(task["strong"] - task["weak"], abs=4e-5)
    found = [(pair["model"], pair["minus"], pair["significant"]) for pair in task["pairs"]]
    assert found == [
        ("middle", "weak", False), ("strong", "weak", True), ("strong", "middle", True)
    ]  # fmt: skip
    same, *others = task["pairs"]
    assert same["difference"] == same["ci_low"] == same["ci_high"] == 0
    assert {pair["difference"] for pair in others} == {task["difference"]}
    assert "| middle - weak | +0.0000 [+0.0000, +0.0000] ns |" in (folder / "report.md").read_text()


def test_rescaled_positions_stand_in_the_report_and_nowhere_without_them(config, load):
    config = dataclasses.replace(config, tasks=("BrightBiologyLongRetrieval",))
    run_all(config, load=load)
    assert "RoPE scaling" not in (write_report(config) / "report.md").read_text()
    plain, strong = config.models
    scaled = dataclasses.replace(strong, rope_scaling=RopeScaling(kind="yarn", factor=4.0))
    config = dataclasses.replace(config, models=(plain, scaled))
    run_all(config, load=load)
    lines = (write_report(config) / "report.md").read_text().splitlines()
    header = next(line for line in lines if line.endswith("| RoPE scaling |"))
    rows = lines[lines.index(header) + 2 :][:2]
    assert [row.split(" | ")[1:2] + row.split(" | ")[-1:] for row in rows] == [
        ["weak", "none |"], ["strong", "yarn x 4 |"]
    ]  # fmt: skip


def test_a_training_run_without_metrics_is_the_users_error(config, load, tmp_path):
    config = dataclasses.replace(config, tasks=("BrightBiologyRetrieval",), training_run=tmp_path)
    run_all(config, load=load)
    with pytest.raises(UserError, match="training_run"):
        write_report(config)


@pytest.mark.parametrize("name", ["", "a/b", "metric", "two words"])
def test_a_model_name_that_cannot_be_a_folder_or_a_key_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"models\.name"):
        EvaluatedModel(name=name, path=tmp_path)


def test_models_with_one_name_are_refused(tmp_path):
    twins = (EvaluatedModel(name="a", path=tmp_path), EvaluatedModel(name="a", path=tmp_path))
    with pytest.raises(UserError, match="names that differ"):
        EvaluateConfig(output_dir=tmp_path, models=twins, tasks=("FollowIR",))


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


def test_the_ends_of_a_run_are_compared_over_batches_of_one_kind() -> None:
    """Kind a falls from 9 to 5, kind b from 2 to 1; the run begins with a and ends with b."""
    losses = {"a": [9.0, 9.0, 8.0, 7.0, 6.0, 6.0, 5.0, 5.0], "b": [2.0, 1.0]}
    order = "aaaabaaaab"
    queues = {kind: iter(values) for kind, values in losses.items()}
    curve = [{"step": n, "kind": kind, "loss": next(queues[kind])} for n, kind in enumerate(order)]
    found = compare_ends(curve)
    assert found == {"kind": "a", "averaged": 2, "first_loss": 9.0, "last_loss": 5.0}


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
