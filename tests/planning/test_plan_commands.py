"""The commands that print a plan: for a named GPU, for what Slurm is asked for, in a second."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import train
from pipeline.cli import app
from pipeline.commands import plans
from pipeline.config import TrainConfig, load_config
from pipeline.errors import UserError
from pipeline.planning.speed import DEFAULT_NETWORK
from tests.support import output_of_code

ROOT = Path(__file__).resolve().parents[2]
ZERO = ("--deepspeed", str(ROOT / "ds_configs" / "zero3.json"))


def test_a_dry_run_plans_for_a_named_gpu_and_says_otherwise_what_it_assumed(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for gpu, text in (
        (("--gpu", "h200"), "125.7 GiB  0.9 of h200 (139.7 GiB)"),
        (("--gpu", "24"), "21.6 GiB  0.9 of 24 GiB"),
        ((), "this machine's RAM, shared by 64; --gpu NAME plans for GPUs"),
    ):
        train.run([str(recipe), *ZERO, "--dry-run", "--world-size", "64", *gpu])
        out = " ".join(capsys.readouterr().out.split())
        assert " ".join(text.split()) in out
        assert ("a projection for h200" in out) == ("h200" in gpu)
    with pytest.raises(UserError, match=r"--gpu h100 \| fix: add --dry-run"):
        train.run([str(recipe), *ZERO, "--gpu", "h100"])
    for wrong in (["--gpus-per-node", "8"], ["--dry-run", "--gpus-per-node", "0"]):
        with pytest.raises(UserError, match=r"--gpus-per-node . \| allowed: a number, with --dry"):
            train.run([str(recipe), *ZERO, *wrong])
    # Where nothing fits, the memory in the error is named too.
    with pytest.raises(UserError, match=r"GiB per rank, 0\.9 of 0\.001 GiB"):
        train.run([str(recipe), *ZERO, "--dry-run", "--gpu", "0.001"])


def test_the_default_bandwidth_is_that_of_the_plans_formulas() -> None:
    """It is written twice, because the formulas' import would slow down `--help`."""
    assert plans._NETWORK == DEFAULT_NETWORK


def test_a_plan_needs_no_torch(recipe: Path) -> None:
    code = (
        "import sys; from pipeline.cli import app; "
        f"app(['plan', 'run', {str(recipe)!r}, *{ZERO!r}, '--nodes', '2', '--gpus-per-node', '4', "
        "'--gpu', 'b200'], standalone_mode=False); sys.exit(int('torch' in sys.modules))"
    )
    printed = output_of_code(code)
    assert "ZeRO stage 3 on 8 ranks" in printed
    assert "0.9 of b200 (178.3 GiB)" in printed
    assert "a projection for b200, 400 Gb/s a host" in printed
    for line in ("compute", "largest batch", "4 steps"):
        assert line in printed


def test_a_dry_submission_plans_for_the_gpus_that_slurm_is_asked_for(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "cluster.env"
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(site))
    monkeypatch.chdir(ROOT)

    def dry(*words: str) -> list[str]:
        text = CliRunner().invoke(app, ["submit", *words, "--dry-run"]).stdout
        assert "#SBATCH" in text
        return [line for line in text.splitlines() if line.startswith("# plan: ")]

    one = ("train", str(recipe))
    flags = (ROOT / "slurm" / "cluster.env").read_text()
    site.write_text(flags)
    assert "--gpu NAME plans memory" in dry(*one)[0]
    assert dry(*one, "--gpu", "l40s")[0] == "# plan: 1 x 8 l40s"
    site.write_text(flags.replace("--gpus-per-node=8", "--gpus-per-node=h100:4"))
    lines = dry(*one, "--sbatch", "--nodes=2")
    assert lines[0] == "# plan: 2 x 4 h100"
    assert any("plain, chosen" in line for line in lines)
    assert any("0.9 of h100 (79.1 GiB)" in line for line in lines)
    chain = tmp_path / "chain.yaml"
    chain.write_text(f"train: {recipe}\n")
    assert dry("all", str(chain))[0] == "# plan: 1 x 4 h100"
    # An evaluation that Slurm's flags give one GPU to each element.
    evaluate = tmp_path / "evaluate.yaml"
    evaluate.write_text(
        f"output_dir: {tmp_path / 'scores'}\ntasks: [BrightPonyRetrieval, BrightAopsRetrieval]\n"
        f"models: [{{name: tiny, path: {load_config(TrainConfig, recipe).model.path}}}]\n"
    )
    array = ("evaluate", str(evaluate))
    assert "--gpu NAME plans GPU time" in dry(*array)[0]
    lines = dry(*array, "--gpu", "l40s")
    assert lines[0] == "# plan: 1 model x 2 tasks and lengths = 2 elements"
    assert any("on 2 GPUs at a time" in line and "BrightAopsRetrieval" in line for line in lines)
    # As many as the array has elements, and Slurm may run at a time.
    assert any("on 64 GPUs at a time" in line for line in dry(*array, "--gpu=l40s", "--texts=64"))
    site.write_text(f"{site.read_text()}ARRAY_LIMIT=1\n")
    assert any("on 1 GPU at a time" in line for line in dry(*array, "--gpu", "l40s"))
    assert "24: --gpu 24: its speed is not known" in dry(*array, "--gpu", "24")[0]
    later = f"data.path={tmp_path / 'later'}"
    assert "not prepared yet" in dry(*one, later, "--after", "77")[0]
    refused = CliRunner().invoke(app, ["submit", *one, "--gpu", "h100"])
    assert isinstance(refused.exception, UserError)


def test_scale_prints_every_number_of_gpus_with_its_range_and_price(
    recipe: Path, tmp_path: Path
) -> None:
    words = ["plan", "scale", str(recipe), *ZERO, "--gpus-per-node", "256", "--price", "2"]
    done = CliRunner().invoke(app, [*words, "--plot", str(tmp_path / "scale.svg")])

    assert done.exit_code == 0, done.output
    _, first, second, third, *rest = done.output.splitlines()
    assert [line.split()[0] for line in (first, second, third)] == ["256", "512", "1,024"]
    text = re.split(r"  +", first)
    step, (fewest, most) = float(text[3]), map(float, text[4].split(" to "))
    assert fewest < step < most
    assert text[6] == "100%"
    assert text[7].endswith(" s")  # not 0.00001 hours
    value, unit = text[8].split()
    assert (unit, float(value)) == ("GPU-seconds", pytest.approx(step * 4 * 256, rel=0.02))
    assert "not measured" in rest[0]
    assert "<svg" in (tmp_path / "scale.svg").read_text()


def test_scale_names_what_no_number_of_gpus_can_run(recipe: Path) -> None:
    words = ["plan", "scale", str(recipe), *ZERO, "--gpu", "l40s"]
    done = CliRunner().invoke(app, [*words, "schedule=plain", "data.global_batch_size=900"])
    assert isinstance(done.exception, UserError)
    assert "global_batch_size" in str(done.exception)
    done = CliRunner().invoke(app, [*words[:-1], "24"])
    assert "its speed is not known" in str(done.exception)


def test_a_plan_may_be_for_data_that_does_not_exist(recipe: Path) -> None:
    words = ["plan", "run", str(recipe), *ZERO, "data.path=nowhere"]
    described = ["--rows", "1000000", "--query-tokens", "10", "--document-tokens", "30"]
    done = CliRunner().invoke(app, [*words, *described, "data.global_batch_size=1024"])

    assert done.exit_code == 0, done.output
    assert "epochs of 1,000,000 examples" in done.output
    assert "learns them by heart" not in done.output
    # One hard negative each, but examples share none.
    (tokens,) = re.findall(r"^tokens +([\d,]+)", done.output, re.MULTILINE)
    assert int(tokens.replace(",", "")) == pytest.approx(1024 * (10 + 2 * 30), rel=0.05)
    done = CliRunner().invoke(app, [*words, *described[:4]])
    assert str(done.exception).startswith("plan: only some of --rows, --query-tokens and")
    for kind in ("run", "scale"):
        done = CliRunner().invoke(app, ["plan", kind, *words[2:]])
        assert str(done.exception).startswith(
            "data.path: nowhere is not prepared yet | fix: describe"
        )
