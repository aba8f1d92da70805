"""The report: right numbers in every form, and nothing hidden."""

from __future__ import annotations

import dataclasses
import json

import benchmark_replicas
import pytest

from pipeline.config import EvaluateConfig, EvaluatedModel, OwnTask, RopeScaling
from pipeline.errors import UserError
from pipeline.evaluation import tables
from pipeline.evaluation.datasets import REVISION_FILE, get_task
from pipeline.evaluation.report import compare_ends, write_report
from pipeline.evaluation.run import run_all, run_element


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


def test_intervals_of_few_queries_are_named_and_one_query_proves_nothing(config, load, tmp_path):
    folder = tmp_path / "mine"
    (folder / "qrels").mkdir(parents=True)
    documents = ["zebra crossing", "quick brown fox", "chess openings"]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(documents))
    )
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "a fast dog-like animal"}\n')
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    own = OwnTask(name="mine", path=folder)
    config = dataclasses.replace(config, tasks=("LEMBPasskeyRetrieval", own))
    run_all(config, load=load)
    page = (report := write_report(config)).joinpath("report.md").read_text()
    assert "Too few queries for these intervals: mine (1)." in page
    _, task = json.loads((report / "report.json").read_text())["tasks"]
    assert task["ci_low"] == task["ci_high"] == task["difference"] > 0
    assert not task["significant"]


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


def test_the_ends_of_a_run_are_compared_over_batches_of_one_kind() -> None:
    """Kind a falls from 9 to 5, kind b from 2 to 1; the first batch is of kind a, the last of b."""
    losses = {"a": [9.0, 9.0, 8.0, 7.0, 6.0, 6.0, 5.0, 5.0], "b": [2.0, 1.0]}
    order = "aaaabaaaab"
    queues = {kind: iter(values) for kind, values in losses.items()}
    curve = [{"step": n, "kind": kind, "loss": next(queues[kind])} for n, kind in enumerate(order)]
    found = compare_ends(curve)
    assert found == {"kind": "a", "averaged": 2, "first_loss": 9.0, "last_loss": 5.0}


def test_scores_of_checkpoints_are_drawn_against_their_step(config, load, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    weak, strong = config.models
    steps = dataclasses.replace(
        config,
        output_dir=run / "evaluations",
        models=(
            dataclasses.replace(strong, name="step-000020"),
            dataclasses.replace(weak, name="step-000003"),
        ),
        tasks=("BrightAopsRetrieval", "LEMBQMSumRetrieval"),
        lengths={"LongEmbed": (16, 64)},
        training_run=run,
    )
    results = run_all(steps, load=load)
    # Still to be scored.
    next((run / "evaluations/results/step-000020").glob("LEMB*/16/result.json")).unlink()
    last = dataclasses.replace(
        steps, models=steps.models[:1], tasks=("BrightAopsRetrieval",), lengths={}
    )
    folder = write_report(last)
    curves = json.loads((folder / "report.json").read_text())["by_step"]
    assert {name: [p["step"] for p in points] for name, points in curves.items()} == {
        "BrightAopsRetrieval": [3, 20],
        "LEMBQMSumRetrieval@16": [3],
        "LEMBQMSumRetrieval@64": [3, 20],
    }
    by_model = {r["model"]: r["score"] for r in results if r["task"] == "BrightAopsRetrieval"}
    early, late = curves["BrightAopsRetrieval"]
    assert (early["score"], late["score"]) == (by_model["step-000003"], by_model["step-000020"])
    assert early["ci_low"] <= early["score"] <= early["ci_high"]
    text = (folder / "report.md").read_text()
    row = f"| BrightAopsRetrieval | ndcg_at_10 | {early['score']:.4f} | {late['score']:.4f} |"
    assert row in text
    assert "| LEMBQMSumRetrieval@16 | ndcg_at_10 |" in text
    assert (folder / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert "](steps.png)" in text
    # The report tells how the number was made.
    made = next(r for r in results if r["model"] == "step-000020" and "Aops" in r["task"])
    templates = "`Instruct: {instruction}\\nQuery: {text}` | `{text}`"
    origin = f"{made['revision']} | 64 | float32 | {templates} | {made['instruction']} | local |"
    assert f"| BrightAopsRetrieval | step-000020 | {origin}" in text
