"""Which jobs a config stands for once parts of the work are done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from pipeline.config import EvaluateConfig, ExportStep, load_config
from pipeline.errors import UserError
from pipeline.evaluation.score.results import inputs_of
from pipeline.evaluation.tasks.elements import list_elements
from pipeline.submission.chain import Chain, evaluate_chain, export_chain, whole_chain
from pipeline.submission.job import Job

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch/recipes/quickstart"
NUM_STEPS = yaml.safe_load((RECIPE / "train.yaml").read_text())["num_steps"]


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quickstart's chain with all results below the test's folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    return Path("launch/recipes/quickstart/chain.yaml")


def names(chain: Chain) -> dict[str, tuple[str, ...]]:
    """Each job and those it waits for."""
    return {job.name: job.after for job in chain.jobs}


def train_to(step: int) -> None:
    folder = Path("runs/quickstart/run/checkpoints")
    (folder / f"step-{step:06d}").mkdir(parents=True)
    (folder / f"step-{step:06d}/state.json").touch()
    (folder / "latest").write_text(f"step-{step:06d}\n")


def export(*folders: str) -> None:
    for folder in folders:
        (Path("runs/quickstart") / folder).mkdir(parents=True)
        (Path("runs/quickstart") / folder / "model.safetensors").touch()


def score(config: EvaluateConfig, numbers: range) -> None:
    for element in [list_elements(config)[number] for number in numbers]:
        element.folder.mkdir(parents=True)
        element.result_path.write_text(json.dumps({"inputs": inputs_of(config, element, None)}))


def test_a_fresh_chain_runs_each_stage_behind_the_one_before(chain: Path) -> None:
    exports = ("export-init", "export-latest")

    assert names(whole_chain(chain)) == {
        "prepare": (),
        "train": ("prepare",),
        **dict.fromkeys(exports, ("train",)),
        "evaluate": exports,
        "report": ("evaluate",),
    }


def test_texts_are_planned_embedded_and_scored_in_this_order(chain: Path) -> None:
    jobs = whole_chain(chain, ("text_elements=7",)).jobs[-4:]

    assert [(job.name, len(job.array), job.after) for job in jobs[1:]] == [
        ("evaluate-embed", 7, ("evaluate-plan",)),
        ("evaluate-score", 0, ("evaluate-embed",)),
        ("report", 0, ("evaluate-score",)),
    ]


def test_what_is_finished_is_left_out_and_the_rest_does_not_wait_for_it(chain: Path) -> None:
    train_to(NUM_STEPS)
    export("export-untrained")

    assert names(whole_chain(chain)) == {
        "export-latest": (),
        "evaluate": ("export-latest",),
        "report": ("evaluate",),
    }


def test_only_elements_without_scores_of_these_exports_are_left(chain: Path) -> None:
    train_to(NUM_STEPS)
    export("export-untrained", "run/export")
    config = load_config(EvaluateConfig, RECIPE / "evaluate.yaml")
    score(config, range(2, 7))
    stale = list_elements(config)[3].result_path
    stale.write_text('{"inputs": {"export": "an earlier one"}}')

    evaluate, report = whole_chain(chain).jobs

    assert evaluate.array == (0, 1, 3, 7, 8, 9)
    assert report.after == ("evaluate",)


def test_a_finished_chain_is_nothing_to_submit(chain: Path) -> None:
    train_to(NUM_STEPS)
    export("export-untrained", "run/export")
    score(load_config(EvaluateConfig, RECIPE / "evaluate.yaml"), range(10))
    assert names(whole_chain(chain)) == {"report": ()}

    Path("runs/quickstart/report").mkdir()
    Path("runs/quickstart/report/report.json").touch()

    assert whole_chain(chain).jobs == ()
    assert [line.split(":")[0] for line in whole_chain(chain).finished] == [
        *("train", "export-init", "export-latest", "evaluate")
    ]


def test_an_export_older_than_the_newest_checkpoint_is_made_again(chain: Path) -> None:
    export("run/export")
    train_to(NUM_STEPS)
    old = Path("runs/quickstart/run/export/model.safetensors")
    os.utime(old, (1, 1))

    (job,) = export_chain(RECIPE / "train.yaml", (), (ExportStep(),)).jobs

    assert job.name == "export-latest"


def test_an_evaluation_without_its_export_is_refused_before_it_is_in_the_queue(
    chain: Path,
) -> None:
    with pytest.raises(UserError, match="no export there"):
        evaluate_chain(RECIPE / "evaluate.yaml")


def test_jobs_are_the_same_exactly_when_their_configs_are(chain: Path) -> None:
    def array(*overrides: str) -> Job:
        return evaluate_chain(RECIPE / "evaluate.yaml", overrides, ready=False).jobs[0]

    assert array().key == array("max_length=512").key
    assert array().key != array("max_length=511").key
