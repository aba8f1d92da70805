"""`diffembed submit` on a real Slurm: it refuses bad flags and submits nothing twice."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from tests.fake_slurm import put_command, put_first_on_path
from tests.slurm.cluster import Cluster
from tests.support import PATIENCE
from tests.tiny_models import prepare_tiny

pytestmark = pytest.mark.slurm

RECIPE = Path(__file__).resolve().parents[2] / "launch/recipes/quickstart"
Submit = Callable[..., dict[str, str]]


@pytest.fixture
def submit(
    cluster: Cluster, checkout: Path, capsys: pytest.CaptureFixture[str], held: None
) -> Submit:
    """Run the command in this process; returns the ids that it printed, by job."""
    from typer.testing import CliRunner

    from pipeline.cli import app

    def submit(*words: object) -> dict[str, str]:
        result = CliRunner().invoke(app, ["submit", *map(str, words)], catch_exceptions=True)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        print(result.output)
        return dict(re.findall(r"^([\w-]+) (\d+) ", result.output, re.MULTILINE))

    return submit


@pytest.fixture
def held(cluster: Cluster, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process talks to the test cluster; its jobs wait for ever."""
    site = tmp_path / "cluster.env"
    site.write_text(f"source {checkout}/slurm/cluster.env\nSITE_FLAGS=(--hold)\n")
    monkeypatch.chdir(checkout)
    for key in list(os.environ):
        if key.startswith(("SLURM", "SBATCH")):
            monkeypatch.delenv(key)
    for key in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(key, cluster.environment[key])
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(site))


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """An evaluation of two exports on two tasks; the exports hold a file in place of weights."""
    config = yaml.safe_load((RECIPE / "evaluate.yaml").read_text())
    config |= {"output_dir": f"{tmp_path}/scores", "tasks": config["tasks"][:2]}
    for model in config["models"]:
        model["path"] = f"{tmp_path}/{model['name']}"
        Path(model["path"]).mkdir()
        (Path(model["path"]) / "model.safetensors").touch()
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Overrides by which a training config finds shards and the model they were made for."""
    config = prepare_tiny(tmp_path_factory.mktemp("prepared"))
    return f"data.path={config.output_dir}", f"model.path={config.tokenizer}"


# Crashes the first time.
TRAINER = """\
import pathlib, sys
crashed = pathlib.Path("crashed").exists()
pathlib.Path("crashed").touch()
sys.exit(0 if crashed else 1)
"""


def names_in_queue(cluster: Cluster) -> list[str]:
    return sorted(cluster.command("squeue", "-h", "-o", "%j").split())


@pytest.mark.parametrize(
    "words",
    [
        ("synthesize", RECIPE.parent / "synthesis/synthesize.yaml"),
        ("prepare", RECIPE / "data.yaml"),
        ("train", RECIPE / "train.yaml"),
        ("export", RECIPE / "train.yaml"),
        ("evaluate", RECIPE / "evaluate.yaml", "--after", "1"),
        ("evaluate", RECIPE / "evaluate.yaml", "--after", "1", "--texts", "64"),
        ("report", RECIPE / "evaluate.yaml"),
    ],
    ids=lambda words: words[0],
)
def test_slurm_accepts_every_job_with_the_flags_of_the_shipped_cluster_file(
    words: tuple[object, ...],
    submit: Submit,
    cluster: Cluster,
    tmp_path: Path,
    prepared: tuple[str, str],
) -> None:
    data = prepared if words[0] == "train" else ()
    ids = submit(*words, *data, f"output_dir={tmp_path}/out")

    assert ids
    assert len(names_in_queue(cluster)) == len(ids)


def test_an_evaluation_is_an_array_as_long_as_its_list_and_a_report_behind_it(
    submit: Submit, cluster: Cluster, evaluation: Path
) -> None:
    ids = submit("evaluate", evaluation)

    array = ids["evaluate"]
    assert cluster.states(array) == {f"{array}_{i}": "PENDING" for i in range(4)}
    shown = cluster.command("scontrol", "show", "job", ids["report"])
    assert f"Dependency=afterany:{array}_*(unfulfilled)" in shown


def test_what_waits_or_runs_is_not_submitted_again(
    submit: Submit, cluster: Cluster, evaluation: Path
) -> None:
    first = submit("evaluate", evaluation)
    cluster.command("scancel", first["report"])
    cluster.poll(lambda: len(names_in_queue(cluster)) == 1)

    second = submit("evaluate", evaluation)
    other = submit("evaluate", evaluation, "max_length=64")

    assert second["evaluate"] == first["evaluate"]
    assert second["report"] != first["report"]
    # Other scores are other jobs, side by side with the first.
    assert other["evaluate"] != first["evaluate"]


def test_a_job_that_waits_with_other_flags_says_so(
    submit: Submit, evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = submit("evaluate", evaluation)
    capsys.readouterr()
    assert submit("evaluate", evaluation) == first
    assert "other flags" not in capsys.readouterr().out

    assert submit("evaluate", evaluation, "--sbatch", "--time=9") == first

    found = re.findall(r"^(\w+) \d+ .* already, with other flags", capsys.readouterr().out, re.M)
    assert found == ["evaluate"]


@pytest.mark.parametrize(
    "setting",
    [
        *("SQUEUE_PARTITION=urgent", "SQUEUE_NAMES=other", "SQUEUE_FORMAT2=jobid,state"),
        *("SQUEUE_STATES=RUNNING", "SQUEUE_FORMAT=%i", "SLURM_TIME_FORMAT=relative"),
    ],
)
def test_a_users_own_settings_of_squeue_hide_no_job(
    setting: str, submit: Submit, evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*setting.split("="))

    first = submit("evaluate", evaluation)

    assert submit("evaluate", evaluation) == first


def test_two_people_who_submit_at_once_submit_once(
    cluster: Cluster, evaluation: Path, checkout: Path, held: None
) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "submit", "evaluate", str(evaluation)]
    both = [
        subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in both]

    assert [process.returncode for process in both] == [0, 0]
    assert sum("submitted" in output for output in outputs) == 1
    assert names_in_queue(cluster) == ["diffembed-evaluate", "diffembed-report"]


def test_a_run_that_waits_or_trains_refuses_another_config(
    submit: Submit, tmp_path: Path, prepared: tuple[str, str]
) -> None:
    train = ("train", RECIPE / "train.yaml", f"output_dir={tmp_path}/run", *prepared)
    submit(*train)

    with pytest.raises(
        UserError, match=r"is pending \(jobhelduser\) there with another config \| fix: wait"
    ):
        submit(*train, "seed=7")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sbatch", "--partition=nowhere"), "invalid partition"),
        (("--sbatch", "--gpus-per-node=99"), "--sbatch"),
        (("--texts", "1002"), "up to 1000"),
    ],
    ids=["partition", "gpus", "array"],
)
def test_a_chain_that_slurm_refuses_leaves_nothing_in_the_queue(
    words: tuple[str, ...], said: str, submit: Submit, cluster: Cluster, evaluation: Path
) -> None:
    with pytest.raises(UserError, match=said):
        submit("evaluate", evaluation, *words)

    assert names_in_queue(cluster) == []


def test_nodes_that_are_drained_now_refuse_no_job_that_may_wait_for_them(
    submit: Submit, cluster: Cluster, evaluation: Path
) -> None:
    cluster.command("scontrol", "update", "NodeName=node1,node2", "State=DRAIN", "Reason=upgrade")
    try:
        ids = submit("evaluate", evaluation)
        # A job that no nodes could ever run is still refused.
        for impossible in ("--gpus-per-node=99", "--nodes=3"):
            with pytest.raises(UserError, match="Requested node configuration is not available"):
                submit("evaluate", evaluation, "max_length=7", "--sbatch", impossible)
    finally:
        cluster.command("scontrol", "update", "NodeName=node1,node2", "State=RESUME")

    assert names_in_queue(cluster) == ["diffembed-evaluate", "diffembed-report"]
    assert set(cluster.states(ids["evaluate"]).values()) == {"PENDING"}


def test_a_job_that_waits_does_not_see_later_edits_of_its_config(
    submit: Submit, cluster: Cluster, evaluation: Path
) -> None:
    job = submit("evaluate", evaluation, "max_length=77")["evaluate"]
    evaluation.unlink()

    script = cluster.command("scontrol", "write", "batch_script", job, "-")
    config = re.search(r"^set -- run (\S+)$", script, re.MULTILINE)
    assert config
    assert yaml.safe_load(Path(config.group(1)).read_text())["max_length"] == 77


def test_a_rank_of_a_running_job_submits_jobs_that_are_none_of_its_own(
    cluster: Cluster, checkout: Path, evaluation: Path, tmp_path: Path, held: None
) -> None:
    # A fake element of the array, which writes down its environment.
    put_command(tmp_path / "bin/diffembed", f"env >{tmp_path}/env.$SLURM_ARRAY_TASK_ID")
    flags = "EVALUATE_FLAGS=(--ntasks=1)\nCPU_FLAGS=(--ntasks=1)\n"
    (tmp_path / "cluster.env").write_text(f"source {checkout}/slurm/cluster.env\n{flags}")
    submit = f"{sys.executable} -m pipeline.cli submit evaluate {evaluation}"
    trainer = f"export RANK=0 WORLD_SIZE=8 MASTER_PORT=1; srun --ntasks=1 {submit}"

    log = tmp_path / "log"
    job = cluster.attempt(
        *("sbatch", "--parsable", "--cpus-per-task=3", f"--output={log}", "--wrap", trainer),
        cwd=checkout,
        environment={
            "DIFFEMBED_CLUSTER_ENV": str(tmp_path / "cluster.env"),
            "PATH": f"{tmp_path}/bin:{cluster.environment['PATH']}",
            "PYTHONPATH": str(checkout),
        },
        check=True,
    ).stdout.strip()
    assert cluster.wait(job) == {job: "COMPLETED"}, log.read_text()
    (array,) = re.findall(r"^evaluate (\d+) submitted", log.read_text(), re.MULTILINE)
    assert set(cluster.wait(array).values()) == {"COMPLETED"}

    found = dict(
        line.split("=", 1) for line in (tmp_path / "env.0").read_text().splitlines() if "=" in line
    )
    assert found["SLURM_ARRAY_JOB_ID"] == array
    assert "SLURM_STEP_ID" not in found
    assert "SLURM_CPUS_PER_TASK" not in found
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(found)


# Its second element always fails, as on a broken GPU; only the report is real.
FAILING = """\
#!/bin/sh
[ "$1" != report ] || exec {python} -m pipeline.cli "$@"
[ "$SLURM_ARRAY_TASK_ID" != 1 ]
"""


def test_behind_an_element_that_fails_the_report_says_what_is_missing(
    submit: Submit,
    cluster: Cluster,
    checkout: Path,
    evaluation: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_command(tmp_path / "bin/diffembed", FAILING.format(python=sys.executable))
    put_first_on_path(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    site = f"source {checkout}/slurm/cluster.env\nEVALUATE_FLAGS=()\nCPU_FLAGS=()\n"
    (tmp_path / "cluster.env").write_text(site)

    ids = submit("evaluate", evaluation)

    assert cluster.wait(ids["report"]) == {ids["report"]: "FAILED"}
    assert cluster.states(ids["evaluate"])[f"{ids['evaluate']}_1"] == "FAILED"
    log = tmp_path / f"scores/jobs/diffembed-report-{ids['report']}.out"
    assert re.search(r"4 of 4 evaluation elements .* submit .* again, .* 0,1,2,3", log.read_text())


def test_where_requeueing_is_forbidden_a_job_continues_as_another_one(
    submit: Submit,
    cluster: Cluster,
    checkout: Path,
    tmp_path: Path,
    prepared: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "slurm").symlink_to(checkout / "slurm")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/train.py").write_text(TRAINER)
    (tmp_path / "cluster.env").write_text(f"source {checkout}/slurm/cluster.env\nTRAIN_FLAGS=()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(checkout))

    first = submit(
        *("train", RECIPE / "train.yaml", f"output_dir={tmp_path}/run", "--sbatch", "--no-requeue"),
        *prepared,
        *("--deepspeed", checkout / "ds_configs/zero3.json"),
    )["train"]
    waiting = cluster.command(
        *("sbatch", "--parsable", "--output=/dev/null", "--kill-on-invalid-dep=yes"),
        *(f"--dependency=afterok:{first}", "--wrap", "true"),
    )

    assert cluster.wait(waiting) == {waiting: "COMPLETED"}
    assert cluster.states(first) == {first: "FAILED"}
    (entry,) = json.loads((tmp_path / "run/jobs/jobs.json").read_text()).values()
    assert cluster.states(entry["id"]) == {entry["id"]: "COMPLETED"}
    starts = json.loads((tmp_path / f"run/jobs/starts-{entry['id']}.json").read_text())
    assert [start["end"] for start in starts] == ["exit code 1", "exit code 0"]


def test_scores_of_a_checkpoint_wait_for_its_export_and_are_submitted_once(
    evaluation: Path, tmp_path: Path, cluster: Cluster, held: None
) -> None:
    from pipeline.submission.submit import main

    config = yaml.safe_load((RECIPE / "train.yaml").read_text())
    train = tmp_path / "train.yaml"
    train.write_text(yaml.safe_dump(config | {"output_dir": f"{tmp_path}/step-000100"}))
    for _ in range(2):
        main([str(train), "step-000100", str(evaluation)])
    lines = cluster.command("squeue", "-h", "-o", "%j %E").splitlines()
    names = [line.split()[0] for line in lines]
    waits = {line.split()[0]: line.split()[1] for line in lines}
    assert sorted(names) == [
        *("diffembed-evaluate", "diffembed-export-step-000100", "diffembed-report")
    ]
    assert waits["diffembed-export-step-000100"] == "(null)"
    assert waits["diffembed-evaluate"].startswith("afterok:")
    assert waits["diffembed-report"].startswith("afterany:")


def put_sbatch(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a site's own `sbatch` before Slurm's, which its text calls as `real`."""
    real = f'real() {{ {shutil.which("sbatch")} "$@"; }}'
    put_command(
        folder / "site/sbatch",
        f'#!/bin/bash\n{real}\n[[ $* == *--test-only* ]] && {{ real "$@"; exit; }}\n{body}\n',
    )
    put_first_on_path(folder / "site", monkeypatch)


def test_a_job_whose_answer_was_lost_is_found_instead_of_submitted_again(
    submit: Submit,
    cluster: Cluster,
    evaluation: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The controller takes the job and hangs before it answers.
    lost = 'real "$@" >/dev/null; echo "sbatch: error: Socket timed out on send/recv" >&2; exit 1'
    put_sbatch(tmp_path, lost, monkeypatch)

    first = submit("evaluate", evaluation)

    assert names_in_queue(cluster) == ["diffembed-evaluate", "diffembed-report"]
    # Not even `jobs.json` is needed to know them again: their scripts lie in this folder.
    for damage in ("", "{", "[]", '{"evaluate-1": {"id": 7}}'):
        (tmp_path / "scores/jobs/jobs.json").write_text(damage)
        assert submit("evaluate", evaluation) == first
    assert len(names_in_queue(cluster)) == 2


@pytest.mark.parametrize(
    "body",
    [
        'echo "  Welcome to 2 clusters"; echo 2026; echo -----; real "$@"; echo bye',
        'echo "Submitted batch job $(real "$@")"',
        'real "$@" >/dev/null',
        'cp "${@: -1}" "$(dirname "$0")/copy.$$.sbatch"; real "${@:1:$#-1}" "$_"',
    ],
    ids=["greets", "drops --parsable", "says nothing", "submits a copy"],
)
def test_a_site_whose_sbatch_says_or_does_more_gets_each_job_once(
    body: str,
    submit: Submit,
    cluster: Cluster,
    evaluation: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_sbatch(tmp_path, body, monkeypatch)

    first = submit("evaluate", evaluation)

    assert submit("evaluate", evaluation) == first
    shown = cluster.command("squeue", "-h", "-o", "%F %j").splitlines()
    assert sorted(shown) == sorted(f"{first[n]} diffembed-{n}" for n in ("evaluate", "report"))


def test_a_refusal_shows_every_line_of_the_sites_reason(
    submit: Submit, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sbatch(
        tmp_path,
        'printf "sbatch: *****\\nsbatch: You must give --account\\n'
        'sbatch: error: Batch job submission failed: Unspecified error\\nsbatch: see docs\\n" >&2\n'
        "exit 1",
        monkeypatch,
    )

    with pytest.raises(
        UserError,
        match="You must give --account; Batch job submission failed: Unspecified error; see docs",
    ):
        submit("evaluate", evaluation)


def test_a_limit_of_submitted_jobs_stops_a_chain_that_continues_when_submitted_again(
    submit: Submit,
    cluster: Cluster,
    evaluation: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "error: QOSMaxSubmitJobPerUserLimit\\nsbatch: error: Batch job submission failed: Job "
    limit = f"printf 'sbatch: {words}violates accounting/QOS policy\\n' >&2; exit 1"
    put_sbatch(tmp_path, f'[[ -z $(squeue -h) ]] || {{ {limit}; }}; real "$@"', monkeypatch)

    with pytest.raises(UserError, match=r"^report-.*MaxSubmitJob.*fix: submit again when some of"):
        submit("evaluate", evaluation)
    (tmp_path / "site/sbatch").unlink()
    submit("evaluate", evaluation)

    assert names_in_queue(cluster) == ["diffembed-evaluate", "diffembed-report"]


def test_a_number_in_jobs_json_that_is_another_job_is_not_ours(
    submit: Submit, cluster: Cluster, tmp_path: Path, prepared: tuple[str, str]
) -> None:
    def train(folder: str) -> str:
        words = ("train", RECIPE / "train.yaml", f"output_dir={tmp_path}/{folder}", *prepared)
        return submit(*words)["train"]

    # As after Slurm lost its state: the number belongs to another job now.
    other = cluster.command("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true")
    first = train("run")
    cluster.command("scancel", first)
    path = tmp_path / "run/jobs/jobs.json"
    path.write_text(path.read_text().replace(f'"{first}"', f'"{other}"'))
    second = train("run")
    assert second not in (first, other)
    assert train("run") == second

    # A copy of the folder, while the job of the original waits.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert train("copy") not in (first, second, other)
    assert train("run") == second


def test_a_report_that_waits_for_jobs_of_a_cancelled_chain_is_replaced(
    submit: Submit, cluster: Cluster, evaluation: Path
) -> None:
    first = submit("evaluate", evaluation)
    cluster.command("scancel", first["evaluate"])
    cluster.poll(lambda: cluster.states(first["report"]) == {first["report"]: "PENDING"})
    # Held: it would start now that the array has ended.

    second = submit("evaluate", evaluation)

    assert second["report"] != first["report"]
    shown = cluster.command("scontrol", "show", "job", second["report"])
    assert f"Dependency=afterany:{second['evaluate']}_*(unfulfilled)" in shown
    assert cluster.states(first["report"]) == {first["report"]: "CANCELLED"}
    assert submit("evaluate", evaluation) == second


def test_the_log_that_is_named_is_the_one_that_slurm_writes(
    cluster: Cluster,
    submit: Submit,
    tmp_path: Path,
    evaluation: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/diffembed").symlink_to("/bin/true")
    put_first_on_path(tmp_path / "bin", monkeypatch)
    site = tmp_path / "cluster.env"
    flags = "SITE_FLAGS=(--export=NONE)\nCPU_FLAGS=(--ntasks=1)\nactivate() { :; }\n"
    site.write_text(site.read_text() + flags)
    # Slurm's own variables would win over the lines of the script.
    monkeypatch.setenv("SBATCH_OUTPUT", "/dev/null")
    logs = {"": None, "-J 'my job'": None, f"--output={tmp_path}/%x.%j --job-name=own": None}
    for flags in logs:
        words = ("report", evaluation, f"output_dir={tmp_path}/50%j %x", "--sbatch", flags)
        job = submit(*words)["report"]
        assert cluster.wait(job)
        (logs[flags],) = re.findall(r"^log:   tail -F (.*)$", capsys.readouterr().out, re.MULTILINE)
    # Quoted, so that a shell takes the path for one word.
    paths = [Path(*shlex.split(log)) for log in logs.values() if log]
    written = [path.name for path in paths if path.is_file()]
    assert [re.sub(r"\d+", "N", name) for name in written] == [
        *("diffembed-report-N.out", "diffembed-report-N.out", "own.N")
    ]
