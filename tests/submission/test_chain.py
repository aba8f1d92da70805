"""The jobs of a config once parts of the work are done."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.commands.plans import submit
from pipeline.config import (
    EvaluateConfig,
    ExportStep,
    MineConfig,
    PrepareConfig,
    TrainConfig,
    as_tree,
    dump_config,
    load_config,
)
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.results import inputs_of, results_digest
from pipeline.evaluation.tasks import list_elements
from pipeline.mining import mine
from pipeline.model.weights import model_digests_here
from pipeline.run_folder import (
    checkpoint_digest,
    latest_name,
    partial_folder,
    publish_checkpoint,
)
from pipeline.submission.chain import (
    Chain,
    export_chain,
    mine_chain,
    prepare_chain,
    train_chain,
    whole_chain,
)
from pipeline.submission.submit import Submission, batch_scripts
from pipeline.training.run_identity import run_identity
from tests.tiny_models import prepare_tiny, tiny_starter

ROOT = Path(__file__).resolve().parents[2]
ZERO3 = ROOT / "ds_configs/zero3.json"
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


CHECKPOINTS = Path("runs/quickstart/run/checkpoints")


def train_to(step: int, identity: dict[str, Any] | None = None) -> None:
    """Write a checkpoint without tensors; without an identity it is damaged, which stops no job."""
    path = CHECKPOINTS / f"step-{step:06d}"
    partial_folder(path).mkdir(parents=True)
    state = {"step": step, "optimizer_steps": step, "world_size": 1, "parameters": [], "extra": {}}
    publish_checkpoint(path, {**state, "identity": identity}, {})


def export(*folders: str) -> None:
    """Exports of the newest checkpoint, or of the untrained model, as far as they are looked at."""
    config = load_config(TrainConfig, RECIPE / "train.yaml")
    for folder in map(Path("runs/quickstart").joinpath, folders):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        newest = CHECKPOINTS / (latest_name(CHECKPOINTS) or "")
        digest = None if "untrained" in folder.name else checkpoint_digest(newest)
        made = {"checkpoint": digest, "model": as_tree(config.model)}
        (folder / "diffembed.json").write_text(json.dumps(made))


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


def test_a_job_that_another_one_may_outdate_is_submitted_behind_it(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    train_to(NUM_STEPS)
    export("run/export")
    shards = prepare_tiny(tmp_path)
    data = tmp_path / "data.yaml"
    data.write_text(dump_config(shards))
    for what, config in (("export", RECIPE / "train.yaml"), ("prepare", data)):
        submit(what, config, dry_run=True)
        assert "#SBATCH" not in capsys.readouterr().out
        # A training writes other checkpoints, a synthesis other rows.
        submit(what, config, after=["7"], dry_run=True)
        assert "#SBATCH --dependency=afterok:7" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("what", "option", "message"),
    [
        ("all", {"texts": 8}, "--texts with all .*set text_elements in the chain's config"),
        ("all", {"deepspeed": Path("other.json")}, "--deepspeed with all .*set deepspeed"),
        ("all", {"checkpoint": "init"}, "--checkpoint with all .*set exports"),
        ("evaluate", {"output": Path("x")}, "--output with evaluate .*allowed: with export"),
        ("train", {"texts": 8}, "--texts with train .*allowed: with evaluate"),
    ],
)
def test_an_option_of_another_job_is_refused_and_not_ignored(
    what: Any, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        submit(what, RECIPE / "chain.yaml", dry_run=True, **option)


def test_a_finished_chain_is_nothing_to_submit(chain: Path) -> None:
    train_to(NUM_STEPS)
    export("export-untrained", "run/export")
    score(load_config(EvaluateConfig, RECIPE / "evaluate.yaml"), range(10))
    assert names(whole_chain(chain)) == {"report": ()}

    config = load_config(EvaluateConfig, RECIPE / "evaluate.yaml")
    report = Path("runs/quickstart/report/report.json")
    report.parent.mkdir()
    report.write_text(json.dumps({"results_digest": results_digest(config)}))

    assert whole_chain(chain).jobs == ()
    assert [line.split(":")[0] for line in whole_chain(chain).finished] == [
        *("train", "export-init", "export-latest", "evaluate")
    ]


def test_a_report_of_other_scores_is_written_again_whatever_the_clocks_say(chain: Path) -> None:
    train_to(NUM_STEPS)
    export("export-untrained", "run/export")
    config = load_config(EvaluateConfig, RECIPE / "evaluate.yaml")
    score(config, range(10))
    report = Path("runs/quickstart/report/report.json")
    report.parent.mkdir()
    report.write_text(json.dumps({"results_digest": results_digest(config)}))
    result = list_elements(config)[3].result_path
    result.write_text(json.dumps({**json.loads(result.read_text()), "score": 1}))
    # A node whose clock is ten minutes behind.
    os.utime(result, (1, 1))

    assert names(whole_chain(chain)) == {"report": ()}


def test_an_export_of_another_checkpoint_is_made_again_whatever_the_clocks_say(chain: Path) -> None:
    def jobs(*overrides: str) -> list[str]:
        made = export_chain(RECIPE / "train.yaml", overrides, (ExportStep(),))
        return [job.name for job in made.jobs]

    train_to(50)
    export("run/export")
    weights = Path("runs/quickstart/run/export/model.safetensors")
    os.utime(weights, (1, 1))
    assert jobs() == []
    assert jobs("model.pooling=last_token") == ["export-latest"]

    train_to(NUM_STEPS)
    later = time.time() + 600
    os.utime(weights, (later, later))
    assert jobs() == ["export-latest"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PrepareConfig:
    """Shards and the model whose tokenizer made them."""
    return prepare_tiny(tmp_path_factory.mktemp("prepared"))


Train = Callable[..., Chain]


@pytest.fixture
def train(prepared: PrepareConfig, chain: Path) -> Train:
    """The training stage alone, on shards that are there."""

    def train(*overrides: str) -> Chain:
        keys = [override.partition("=")[0] for override in overrides]
        own = [word for word in own_data(prepared) if word.partition("=")[0] not in keys]
        return train_chain(RECIPE / "train.yaml", (*own, *overrides), ZERO3)

    return train


def own_data(prepared: PrepareConfig) -> tuple[str, str]:
    return f"data.path={prepared.output_dir}", f"model.path={prepared.tokenizer}"


def test_shards_that_are_missing_or_of_another_tokenizer_are_refused_before_the_queue(
    train: Train, tmp_path: Path
) -> None:
    assert names(train()) == {"train": ()}

    with pytest.raises(UserError, match="no prepared dataset"):
        train("data.path=nowhere")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("other words make another tokenizer\n" * 20)
    other = tiny_starter(tmp_path / "other", corpus, num_layers=1)
    with pytest.raises(UserError, match=r"prepared with .* differs from the tokenizer of"):
        train(f"model.path={other}")


def test_a_folder_that_cannot_be_written_is_refused_before_slurm_is_asked(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="file/run/jobs: cannot be written"):
        batch_scripts(train(f"output_dir={tmp_path}/file/run"), Submission())


def test_a_finished_run_whose_config_was_edited_is_refused_by_key(
    train: Train, prepared: PrepareConfig
) -> None:
    config = load_config(TrainConfig, RECIPE / "train.yaml", own_data(prepared))
    train_to(NUM_STEPS, run_identity(config, Dataset.open(prepared.output_dir, verify=False)))

    assert train().finished
    assert train("log_every=3").finished
    for key, value in (("optimizer.lr", "0.5"), ("model.attention", "causal"), ("seed", "7")):
        with pytest.raises(UserError, match=rf"^{key}\b.*{value}.* started .*set .*back"):
            train(f"{key}={value}")


@pytest.mark.parametrize("step", [3, NUM_STEPS])
def test_a_run_whose_base_model_changed_is_refused_as_training_would(
    train: Train, prepared: PrepareConfig, tmp_path: Path, step: int
) -> None:
    moved = Path(shutil.copytree(prepared.tokenizer, tmp_path / "moved"))
    config = load_config(TrainConfig, RECIPE / "train.yaml", own_data(prepared))
    dataset = Dataset.open(prepared.output_dir, verify=False)
    identity = run_identity(config, dataset, model_digests_here(config.model))
    train_to(step, identity)
    assert bool(train(f"model.path={moved}").finished) == (step == NUM_STEPS)

    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for gone in ((), (f"data.path={tmp_path}/gone",)):
        with pytest.raises(UserError, match=r"^model.path: model.safetensors changed since"):
            train(f"model.path={moved}", *gone)


def test_shards_made_from_another_config_are_refused_and_never_called_whole(
    prepared: PrepareConfig, tmp_path: Path
) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(dump_config(prepared))
    assert prepare_chain(path).finished == (f"prepare: {prepared.output_dir} is whole",)

    for _ in range(2):
        with pytest.raises(UserError, match="another config"):
            prepare_chain(path, ("max_query_length=5",))
    assert names(prepare_chain(path, (f"output_dir={tmp_path}/new",))) == {"prepare": ()}


def test_mining_stands_between_the_shards_and_the_training(
    prepared: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until its output is whole; a mining whose shards are there is identified by its files."""
    path = tmp_path / "mine.yaml"
    retrievers = "[{name: words, path: bm25}]"
    path.write_text(
        f"{{data: {prepared.output_dir}, output: {tmp_path}/mined, retrievers: {retrievers}}}\n"
    )
    shards = tmp_path / "data.yaml"
    shards.write_text(dump_config(dataclasses.replace(prepared, output_dir=tmp_path / "new")))
    chain = tmp_path / "chain.yaml"
    chain.write_text(f"{{prepare: {shards}, mine: {path}, train: {RECIPE / 'train.yaml'}}}\n")

    jobs = names(whole_chain(chain))
    assert jobs["mine"] == ("prepare",) and jobs["train"] == ("mine",)
    assert names(mine_chain(path)) == {"mine": ()}
    submit("mine", path, dry_run=True)
    printed = capsys.readouterr().out
    assert "srun" in printed and "# plan: step" in printed and " scores of pairs" in printed
    submit("mine", path, [f"data={tmp_path}/new"], dry_run=True)
    assert f"# plan: {tmp_path}/new is not prepared yet" in capsys.readouterr().out
    mine(load_config(MineConfig, path), num_workers=1)
    assert mine_chain(path).finished == (f"mine: {tmp_path}/mined is whole",)
    with pytest.raises(UserError, match=r"mined with other settings \(negatives\)"):
        mine_chain(path, ("negatives=3",))
