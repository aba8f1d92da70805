"""A result counts only for its inputs; results are merged for mteb, and drawn by step."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mteb
import pytest
from evaluation_support import BagOfLetters, wrap
from mteb.models import ModelMeta
from mteb.results import TaskResult
from mteb.results.task_result import _expand_run_settings_entry

from pipeline.config import EvaluateConfig, Template, dump_config
from pipeline.errors import UserError
from pipeline.evaluation.report import write_report
from pipeline.evaluation.results import (
    RESULT_VERSION,
    delete_scored_exports,
    merge_results,
    read_curves,
)
from pipeline.evaluation.run import run_all, run_element
from pipeline.evaluation.tasks import list_elements
from pipeline.files import fingerprint_files
from pipeline.model.export_folder import export_fingerprint

AOPS = "BrightAopsRetrieval"


@pytest.fixture
def own(config: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    """One element whose data and export a test may change."""
    hub = tmp_path / "hub"
    shutil.copytree(config.snapshots, hub)
    return dataclasses.replace(config, models=config.models[:1], tasks=(AOPS,), snapshots=hub)


@pytest.fixture
def written(minilm) -> Callable:
    """Whatever model the export's file names, as an export does by its weights."""

    def load(config, element):
        name = (element.model.path / "model.safetensors").read_text()
        return wrap({"weak": BagOfLetters(), "good": minilm}[name])

    return load


def refuse(*_: object) -> None:
    raise AssertionError("loaded a model for a finished element")


def replace_in_silence(path: Path, old: str, new: str) -> None:
    """Other bytes, but as many and with the same time, as a copy or an archive may leave them."""
    before = path.stat()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def other_export(config: EvaluateConfig) -> None:
    replace_in_silence(config.models[0].path / "model.safetensors", "weak", "good")


def other_data(config: EvaluateConfig) -> None:
    path = config.snapshots / "mteb/BRIGHT/documents/aops.jsonl"
    replace_in_silence(path, "On the history", "zzzzzzzzzzzzzz")


@pytest.mark.parametrize(("change", "named"), [(other_export, "export"), (other_data, "data")])
def test_what_is_replaced_at_its_place_is_scored_again_and_nothing_else_is(
    change, named, own, written, tmp_path, capsys
):
    first = run_element(own, 0, load=written)
    assert run_element(own, 0, load=refuse) == first
    change(own)
    with pytest.raises(UserError, match=f"weak {AOPS}, changed since it was scored: {named} "):
        write_report(own)
    capsys.readouterr()
    second = run_element(own, 0, load=written)
    (why,) = [line for line in capsys.readouterr().out.splitlines() if "again" in line]
    assert why == f"element 1/1 weak {AOPS}: scored again, changed since: {named}"
    fresh = run_element(dataclasses.replace(own, output_dir=tmp_path / "fresh"), 0, load=written)
    assert second["score"] == fresh["score"] != first["score"]
    assert run_element(own, 0, load=refuse) == second
    write_report(own)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"template": Template(query="Q: {text}")}, "template"),
        ({"precision": "bfloat16"}, "precision"),
        ({"instructions": {AOPS: "Find it"}}, "instruction"),
    ],
)
def test_a_setting_of_the_config_that_changes_is_named(change, named, own, written, capsys):
    run_element(own, 0, load=written)
    changed = dataclasses.replace(own, models=(dataclasses.replace(own.models[0], **change),))
    run_element(changed, 0, load=written)
    assert f"scored again, changed since: {named}\n" in capsys.readouterr().out
    assert run_element(changed, 0, load=refuse)


def test_snapshots_that_move_or_are_gone_and_a_new_model_card_are_no_reason_to_score_again(
    own, written, tmp_path
):
    first = run_element(own, 0, load=written)
    (own.models[0].path / "README.md").write_text("a card")
    own.snapshots.rename(tmp_path / "moved")
    moved = dataclasses.replace(own, snapshots=tmp_path / "moved")
    assert run_element(moved, 0, load=refuse) == run_element(own, 0, load=refuse) == first


def test_a_result_that_does_not_say_what_it_was_computed_from_is_made_again(own, written):
    first = run_element(own, 0, load=written)
    (element,) = list_elements(own)
    element.result_path.write_text(json.dumps({"score": 1.0}))
    assert run_element(own, 0, load=written)["inputs"] == first["inputs"]


def test_a_result_without_a_version_counts_and_one_of_a_newer_version_is_refused(own, written):
    first = run_element(own, 0, load=written)
    assert first["version"] == RESULT_VERSION
    (element,) = list_elements(own)
    tree = {key: value for key, value in first.items() if key != "version"}
    element.result_path.write_text(json.dumps(tree))
    assert run_element(own, 0, load=refuse) == {**first, "version": 1}
    element.result_path.write_text(json.dumps({**tree, "version": 99}))
    with pytest.raises(UserError, match=f"version 99 .* allowed: up to {RESULT_VERSION} "):
        run_element(own, 0, load=refuse)


def test_an_export_that_is_replaced_by_a_pass_of_training_is_told_from_it(tmp_path):
    """A file larger than the parts that are hashed, changed a little in every part."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3_000_001))
    before, at = fingerprint_files(tmp_path, [path]), path.stat()
    for start in (0, 1_500_000, 3_000_000):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\1" * 60_000 if start < 3_000_000 else b"\1")
        os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
        after = fingerprint_files(tmp_path, [path])
        assert after != before
        before = after


def test_an_adapter_on_another_base_model_is_told_from_it(tmp_path):
    base, merged, adapter = (tmp_path / name for name in ("base", "merged", "adapter"))
    for folder in (base, merged, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_text("old weights")
    (adapter / "adapter_config.json").write_text("{}")
    settings = {"model": {"path": str(base), "adapter": str(merged)}}
    (adapter / "diffembed.json").write_text(json.dumps(settings))
    seen = [export_fingerprint(adapter)]
    for folder in (base, merged, adapter):
        replace_in_silence(folder / "model.safetensors", "old", "new")
        seen.append(export_fingerprint(adapter))
    (base / "README.md").write_text("a card")
    assert len(set(seen)) == 4
    assert export_fingerprint(adapter) == seen[-1]


def test_one_export_under_two_names_has_one_fingerprint(tmp_path):
    export = tmp_path / "one"
    export.mkdir()
    (export / "model.safetensors").write_text("weights")
    shutil.copytree(export, tmp_path / "two")  # keeps the times
    assert export_fingerprint(export) == export_fingerprint(tmp_path / "two")


def test_merging_keeps_every_line_and_mteb_reads_the_result(config, load):
    config = dataclasses.replace(config, tasks=("BrightBiologyRetrieval", "LEMBNeedleRetrieval"))
    run_all(config, load=load)
    merged = merge_results(config)
    merge_results(config)  # again: nothing doubles
    loaded = mteb.ResultCache(merged).load_results(include_remote=False)
    scores = {
        (result.model_name, task.task_name): task.get_score()
        for result in loaded.model_results
        for task in result.task_results
    }
    assert scores == pytest.approx(
        {
            (f"diffembed/{e.model.name}", e.task): json.loads(e.result_path.read_text())["score"]
            for e in list_elements(config)
        }
    )
    # The leaderboard needs rows of a table, and a whole description.
    table = loaded.to_dataframe(aggregation_level="split")
    assert len(table) == 1 + 8
    for path in merged.rglob("model_meta.json"):
        meta = ModelMeta.model_validate(json.loads(path.read_text()))
        assert path.parent.name == meta.revision
        assert meta.max_tokens == config.max_length
    settings = list(merged.rglob("run_settings.jsonl"))
    lines = [json.loads(line) for path in settings for line in path.read_text().splitlines()]
    assert len(settings) == 2
    assert sorted((line["task"], len(line["splits"])) for line in lines) == [
        ("BrightBiologyRetrieval", 1),
        ("BrightBiologyRetrieval", 1),
        ("LEMBNeedleRetrieval", 8),
        ("LEMBNeedleRetrieval", 8),
    ]


RESULTS = "https://github.com/embeddings-benchmark/results"


def git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without results at the address of the results repository."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a user")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "user@example.org")
    folder = tmp_path / "repository"
    (folder / "results").mkdir(parents=True)
    (folder / "results/paths.json").write_text("{}\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=No results")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{folder}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", RESULTS)
    return folder


def test_mteb_accepts_and_commits_our_results_for_the_leaderboard(
    config: EvaluateConfig, load: object, repository: Path
) -> None:
    tasks = ("BrightBiologyRetrieval", "LEMBNeedleRetrieval", "Core17InstructionRetrieval")
    config = dataclasses.replace(config, tasks=tasks, models=config.models[:1])
    run_all(config, load=load)  # type: ignore[arg-type]
    cache = mteb.ResultCache(merge_results(config))

    # Splits and subsets are the same as in the tasks; nothing is filtered out.
    checked = cache.load_results(
        tasks=mteb.get_tasks(list(tasks)), validate_and_filter=True, include_remote=False
    )
    scores = {
        result.task_name: (result.get_score(), len(result.scores))
        for model in checked.model_results
        for result in model.task_results
    }
    assert scores == {
        element.task: (pytest.approx(result["score"], abs=1e-6), len(result["by_split"]))
        for element in list_elements(config)
        for result in [json.loads(element.result_path.read_text())]
    }

    answer = cache.submit_results(create_pr=False)
    assert (answer["status"], answer["result_count"]) == ("ready_for_submission", len(tasks))
    clone = Path(answer["path"])
    committed = git(clone, "diff", "--name-only", "origin/HEAD", "HEAD").splitlines()
    ((name, revision),) = answer["models_submitted"]
    files = [*(f"{task}.json" for task in tasks), "model_meta.json", "run_settings.jsonl"]
    assert sorted(committed) == sorted(
        f"results/{name.replace('/', '__')}/{revision}/{file}" for file in files
    )
    for path in committed:
        assert (clone / path).read_bytes() == (cache.cache_path / path).read_bytes()
    # The rules by which the repository tests submissions, in addition to the names above.
    settings = (
        clone / f"results/{name.replace('/', '__')}/{revision}/run_settings.jsonl"
    ).read_text()
    covered = {
        key
        for line in settings.splitlines()
        for key, *_ in _expand_run_settings_entry(json.loads(line))
    }
    for path in (clone / each for each in committed if Path(each).stem in tasks):
        result = TaskResult.from_disk(path)
        assert result.task_name == path.stem
        assert int(str(result.mteb_version).partition(".")[0]) >= 2
        for split, blocks in result.scores.items():
            assert {(path.stem, split, block["hf_subset"]) for block in blocks} <= covered
    (described,) = (clone / path for path in committed if path.endswith("model_meta.json"))
    assert ModelMeta.model_validate_json(described.read_text()).revision == revision


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
        # Links to checkpoints are deleted once their step is exported and scored.
        waiting = sorted(config.output_dir.glob("step-*/checkpoints"))
        assert [path.parts[-2] for path in waiting] == ["step-004004", "step-005000"]
    assert not list(config.output_dir.glob("**/.*deleted"))
