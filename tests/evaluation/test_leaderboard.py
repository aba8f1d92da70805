"""Results as the leaderboard takes them: by mteb's own submission and the rules of its repository.

Not here: that the model is one of those that mteb implements, which a new model cannot be.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import mteb
import pytest
from mteb.models import ModelMeta
from mteb.results import TaskResult
from mteb.results.task_result import _expand_run_settings_entry

from pipeline.config import EvaluateConfig
from pipeline.evaluation.results import merge_results
from pipeline.evaluation.run import run_all
from pipeline.evaluation.tasks import list_elements

RESULTS = "https://github.com/embeddings-benchmark/results"


def git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What git finds at the address of the results repository: one without results."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
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

    # Splits and subsets are those of the tasks; nothing is filtered out.
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
    # The rules by which the repository tests what is handed in, beside those of names above.
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
