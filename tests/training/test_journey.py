"""The trainer as its users start it: exit codes, stop and resume."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline import train
from pipeline.errors import UserError
from pipeline.watch.runs import Metrics, describe_run
from tests.training.trainer_command import ROOT, metrics, run_trainer

WORKER = Path(__file__).with_name("failure_worker.py")


def steps_in_tensorboard(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("loss")
    return [event.step for event in events]


def test_a_stopped_and_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [recipe, "--deepspeed", "ds_configs/zero3.json"]
    whole = run_trainer(*arguments, f"output_dir={tmp_path / 'whole'}", num_ranks=2)
    assert whole.returncode == 0, whole.stderr
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "stop").touch()  # as `diffembed stop` does; it ends the run after its first step
    first = run_trainer(*arguments, f"output_dir={parts}", num_ranks=2)
    assert first.returncode == 75, first.stderr
    assert "run the same command to resume" in first.stderr
    assert not (parts / "stop").exists()
    assert [line["step"] for line in metrics(parts)] == [0]
    # A signal to one rank in the middle of the fourth step.
    monkeypatch.setenv("FAULT", "asked to stop")
    # Neither changes a bit: a run out of memory continues with them.
    other = ("schedule=cache", "model.gradient_checkpointing=true")
    second = run_trainer(*arguments, f"output_dir={parts}", *other, num_ranks=2, script=WORKER)
    assert second.returncode == 75, second.stderr
    assert "SIGUSR1 after step 3 of 6" in second.stderr
    assert [line["step"] for line in metrics(parts)] == [0, 1, 2]
    third = run_trainer(*arguments, f"output_dir={parts}", num_ranks=2)
    assert third.returncode == 0, third.stderr
    assert "at step 3 of 6" in third.stdout
    wanted = metrics(tmp_path / "whole")
    assert [line["step"] for line in wanted] == list(range(6))
    # Two steps of warm-up; zero would follow the last one.
    rates = [0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert [line["lr"] for line in wanted] == pytest.approx(rates)
    # Learned as a logarithm, 0.1 need not come back as 0.1 even where nothing was learned.
    assert wanted[-1]["temperature"] != pytest.approx(0.1, rel=1e-4)
    assert metrics(parts) == wanted
    names = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert names == ["latest", "step-000004", "step-000006"]
    for name in ("config.yaml", "ds_config.json", "environment.json"):
        assert (parts / name).is_file()
    # A request that comes in the last step is met, and stops no run that continues from here.
    (tmp_path / "short").mkdir()
    (tmp_path / "short/stop").touch()
    short = ("num_steps=1", "optimizer.warmup_steps=0", f"output_dir={tmp_path / 'short'}")
    assert run_trainer(*arguments, *short).returncode == 0
    assert not (tmp_path / "short/stop").exists()
    view = describe_run(parts, Metrics(parts / "metrics.jsonl"))
    assert (view.state, view.fact("step")) == ("finished", "6 of 6 (100%)")
    assert view.fact("checkpoint").startswith("step-000006, 0 steps behind")
    assert not view.fact("repeated")


def test_running_a_finished_run_again_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    arguments = [recipe, "--deepspeed", "ds_configs/zero2.json", f"output_dir={tmp_path / 'run'}"]
    trackers = "trackers=[tensorboard]" if find_spec("tensorboard") else "trackers=[]"
    first = run_trainer(*arguments, "num_steps=3", "log_every=2", trackers)
    assert first.returncode == 0, first.stderr
    before = metrics(tmp_path / "run")
    # Every second step, and the last one.
    assert [line["step"] for line in before] == [1, 2]
    if find_spec("tensorboard"):
        assert steps_in_tensorboard(tmp_path / "run") == [1, 2]
    again = run_trainer(*arguments, "num_steps=3")
    assert again.returncode == 0, again.stderr
    assert "finished" in again.stdout
    assert metrics(tmp_path / "run") == before
    for changed, message in (
        (
            ("num_steps=3", "optimizer.lr=0.5"),
            "optimizer.lr is 0.5 | allowed: 0.001, which",
        ),
        (("num_steps=6",), "num_steps: the learning rate would decay until step 6, but the run"),
        (("num_steps=3", "model.lora={rank: 2}"), "model.lora.rank is 2 (also different: model."),
    ):
        other = run_trainer(*arguments, *changed)
        assert other.returncode == 2
        assert message in other.stderr


def test_dry_run_prints_the_batch_arithmetic_and_trains_nothing(recipe: Path) -> None:
    zero = ("--deepspeed", "ds_configs/zero3.json")
    result = run_trainer(recipe, *zero, "--dry-run", "--world-size", "4")
    assert result.returncode == 0, result.stderr
    assert "8 queries, 16 distinct documents" in result.stdout
    assert "x 4 ranks" in result.stdout
    assert "6 x 8 = 48 queries = 2.00 epochs of 24 examples" in result.stdout
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.matryoshka_dims=[8, 32]", r"matryoshka_dims: 32 \| allowed: .*\(32\)"),
        ("model.dimensions=33", r"model\.dimensions: 33 \| allowed: 1 to 32"),
        ("loss.distillation={weight: 0.5}", "no teacher scores"),
    ],
)
def test_a_loss_that_model_or_data_cannot_have_is_refused_before_the_run(
    recipe: Path, change: str, message: str
) -> None:
    zero = str(ROOT / "ds_configs/zero3.json")
    with pytest.raises(UserError, match=message):
        # A dry run, which makes the same plan and joins no process group in this process.
        train.run([str(recipe), "--deepspeed", zero, "--dry-run", change])
    assert not (recipe.parent / "run").exists()


def test_a_dry_run_refuses_shards_of_another_tokenizer(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(recipe.parent / "model", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    zero = str(ROOT / "ds_configs/zero3.json")
    with pytest.raises(UserError, match="prepared with the tokenizer"):
        train.run([str(recipe), "--deepspeed", zero, "--dry-run", f"model.path={other}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=nowhere"], "nowhere: no prepared dataset"),
        (["model.poolin=mean"], "unknown key 'model.poolin'"),
        (["num_steps=0"], "num_steps: 0"),
        (["output_dir={tmp}/file/run"], "output_dir: {tmp}/file/run: Not a directory"),
        (["output_dir={tmp}/mine"], "output_dir: {tmp}/mine/config.yaml was not written by a run"),
    ],
)
def test_what_is_wrong_with_config_or_folders_is_said_before_anything_large_is_imported(
    recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("# lr found by sweep 12\n")
    words = [argument.format(tmp=tmp_path) for argument in arguments]
    code = (
        "import sys; from pipeline import train; from pipeline.errors import UserError\n"
        "try:\n train.run(sys.argv[1:])\n"
        "except UserError as error:\n print(error)\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    zero = str(ROOT / "ds_configs/zero3.json")
    command = [sys.executable, "-c", code, str(recipe), "--deepspeed", zero, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said, imported = done.stdout.splitlines()
    assert message.format(tmp=tmp_path) in said
    assert imported == "[]"
    assert (tmp_path / "mine/config.yaml").read_text() == "# lr found by sweep 12\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.poolin=mean"], "unknown key 'model.poolin'"),
        (["data.path=nowhere"], "nowhere"),
        (["data.global_batch_size=1000"], "1000"),
        (["chunks.max_tokens=0"], "chunks.max_tokens: 0"),
        (["model.path=nowhere"], "nowhere"),
        (["--deepspeed", "nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    recipe: Path, arguments: list[str], message: str
) -> None:
    zero = ("--deepspeed", "ds_configs/zero3.json")
    result = run_trainer(recipe, *zero, *arguments, "--dry-run")
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("UserError")]
    assert message in line
    assert "Traceback" not in result.stderr
