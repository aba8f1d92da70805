"""Scores of a run's checkpoints against their step, and what stays of those checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil

from pipeline.config import dump_config
from pipeline.evaluation.report import write_report
from pipeline.evaluation.results import delete_scored_exports, read_curves
from pipeline.evaluation.run import run_all, run_element
from pipeline.evaluation.tasks import list_elements


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
    # How the number was made stands beside it.
    made = next(r for r in results if r["model"] == "step-000020" and "Aops" in r["task"])
    templates = "`Instruct: {instruction}\\nQuery: {text}` | `{text}`"
    origin = f"{made['revision']} | 64 | float32 | {templates} | {made['instruction']} | local |"
    assert f"| BrightAopsRetrieval | step-000020 | {origin}" in text


def test_scores_of_checkpoints_that_the_run_was_taken_back_from_are_not_drawn(config, load):
    run = config.output_dir
    evaluations = run / "evaluations"
    digests = {2: "aaaa", 4: "bbbb", 6: "cccc"}
    models, weak = [], config.models[0]
    for step, digest in digests.items():
        folder = evaluations / f"step-{step:06d}"
        shutil.copytree(weak.path, folder / "export")
        (folder / "export/diffembed.json").write_text(json.dumps({"checkpoint": digest}))
        (folder / "checkpoint.digest").write_text(digest)
        models.append(dataclasses.replace(weak, name=folder.name, path=folder / "export"))
    config = dataclasses.replace(
        config, output_dir=evaluations, models=tuple(models), tasks=("BrightAopsRetrieval",)
    )
    run_all(config, load=load)

    def drawn() -> list[int]:
        ((_, points),) = read_curves(run).items()
        return [point["step"] for point in points]

    assert drawn() == [2, 4, 6]
    (evaluations / "step-000006/checkpoint.digest").unlink()  # not reached again
    assert drawn() == [2, 4]
    (evaluations / "step-000004/checkpoint.digest").write_text("dddd")  # not scored again yet
    assert drawn() == [2]
    (evaluations / "step-000004/export/diffembed.json").write_text('{"checkpoint": "dddd"}')
    run_element(config, 1, load=load)
    assert drawn() == [2, 4]


def scored_step(config, number: int, scores: dict[str, float]) -> None:
    """The folder of a step as training leaves it, after its export, vectors and some scores."""
    name = f"step-{number:06d}"
    folder = config.output_dir / name
    model = dataclasses.replace(config.models[0], name=name, path=folder / "export")
    config = dataclasses.replace(config, models=(model,), tasks=tuple(scores))
    for made in ("export", "checkpoints"):
        (folder / made).mkdir(parents=True)
    (config.output_dir / f"store/{name}-abc").mkdir(parents=True)
    (folder / "evaluate.yaml").write_text(dump_config(config))
    for element in list_elements(config):
        if scores[element.task]:
            element.folder.mkdir(parents=True)
            element.result_path.write_text(json.dumps({"score": scores[element.task]}))


def test_of_scored_checkpoints_the_newest_and_the_best_keep_their_exports(config):
    first, second = "BrightAopsRetrieval", "BrightPonyRetrieval"
    means = {3: 0.9, 20: 0.2, 100: 0.6, 4000: 0.4}
    for number, mean in means.items():
        scored_step(config, number, {first: mean + 0.1, second: mean - 0.1})
    scored_step(config, 2, {first: 0.95})  # of another list of tasks
    scored_step(config, 4004, {first: 1.0, second: 0})  # on its way
    scored_step(config, 5000, {first: 0.5, second: 0.5})  # of a checkpoint that is replaced
    (config.output_dir / "step-005000/checkpoint.digest").write_text("another")
    for _ in range(2):
        delete_scored_exports(config.output_dir)
        kept = ["step-000003", "step-004000", "step-004004", "step-005000"]
        assert sorted(path.parts[-2] for path in config.output_dir.glob("step-*/export")) == kept
        assert sorted(p.name for p in config.output_dir.glob("store/*")) == [
            f"{name}-abc" for name in kept
        ]
        # What was to be exported is gone wherever it has been.
        waiting = sorted(config.output_dir.glob("step-*/checkpoints"))
        assert [path.parts[-2] for path in waiting] == ["step-004004", "step-005000"]
    assert not list(config.output_dir.glob("**/.*deleted"))
