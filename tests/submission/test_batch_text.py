"""Batch scripts as strings: their flags in order, the site's file, the job's environment."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.submission.jobs import (
    Flag,
    Job,
    RequestedGpus,
    array_ranges,
    batch_text,
    expand_log,
    last_value,
    parse_flags,
    read_site,
    requested_gpus,
    split_flags,
)
from pipeline.submission.slurm import submission_environment
from tests.fake_slurm import put_command

ROOT = Path(__file__).resolve().parents[2]
BODY = "#!/usr/bin/env bash\n# Says.\n#SBATCH --time=1\nset -e\nprintf '%s|' \"$@\" $SITE\n"


def job(**changes: object) -> Job:
    values = {"name": "say", "script": "say.sbatch", "flags": "SAY_FLAGS", "folder": Path("out")}
    return Job(**{"arguments": (), **values, **changes})


def flags(text: str) -> list[str]:
    """The directives that sbatch reads: the ones above the first command."""
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            found += shlex.split(line.removeprefix("#SBATCH "))
    return found


def given(*words: str) -> tuple[Flag, ...]:
    return parse_flags(words, "--sbatch")


def test_flags_of_the_submission_win_over_the_site_and_those_over_the_script() -> None:
    text = batch_text(job(), BODY, site_flags=given("--time=2"), own_flags=given("--time=3"))

    # Slurm takes the last of several equal flags.
    assert [flag for flag in flags(text) if flag.startswith("--time")] == [
        *("--time=1", "--time=2", "--time=3")
    ]


def test_arguments_and_variables_reach_the_script_whatever_they_hold() -> None:
    arguments = ("a b", "it's", "$HOME", '{"name": "x"}', "*")
    text = batch_text(job(arguments=arguments), BODY, site_flags=[], environment={"SITE": "a$b"})

    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"{word}|" for word in (*arguments, "a$b"))


def test_a_job_that_waits_is_cancelled_when_its_turn_can_never_come() -> None:
    waiting = flags(batch_text(job(), BODY, site_flags=[], after=("7", "8")))

    assert {"--dependency=afterok:7:8", "--kill-on-invalid-dep=yes"} <= set(waiting)
    assert not any("dependency" in flag for flag in flags(batch_text(job(), BODY, site_flags=[])))
    reporting = flags(batch_text(job(reports_failure=True), BODY, site_flags=[], after=("7",)))
    assert "--dependency=afterany:7" in reporting


@pytest.mark.parametrize(
    ("indices", "written"), [((0,), "0"), ((0, 1, 2), "0-2"), ((1, 3, 4, 9), "1,3-4,9")]
)
def test_an_array_holds_only_the_elements_that_are_left(
    indices: tuple[int, ...], written: str
) -> None:
    text = batch_text(job(array=indices), BODY, site_flags=[], array_limit=5)

    assert f"--array={written}%5" in flags(text)
    spelled = [
        number
        for part in array_ranges(indices).split(",")
        for number in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ]
    assert tuple(spelled) == indices


def test_a_job_submitted_from_inside_another_does_not_take_itself_for_one_of_its_ranks() -> None:
    inside = {
        **{"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "4", "SLURM_CONF": "/conf"},
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "node1"},
        **{"PATH": "/bin", "SBATCH_ACCOUNT": "nlp", "HF_HOME": "/cache"},
    }
    own = {"SLURM_CONF": "/conf", "PATH": "/bin", "SBATCH_ACCOUNT": "nlp", "HF_HOME": "/cache"}

    assert submission_environment(inside) == own
    # A launcher's rank on a machine that can submit, too.
    del inside["SLURM_JOB_ID"]
    assert submission_environment(inside) == own
    # On a login node, variables of these names are the user's own.
    assert submission_environment({"RANK": "0"}) == {"RANK": "0"}
    # To Slurm, these win over the lines of a script.
    assert submission_environment({"SBATCH_OUTPUT": "/dev/null", "SBATCH_QOS": "q"}) == {
        "SBATCH_QOS": "q"
    }


def test_the_site_file_is_read_as_bash_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "cluster.env"
    site.write_text(
        f'source {ROOT}/slurm/cluster.env\nSITE_FLAGS=(--comment="two words" --qos=q)\n'
        "TRAIN_FLAGS+=(--nodes=4)\nARRAY_LIMIT=9\n"
    )
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(site))

    read = read_site()

    words = [word for flag in read.flags_of("TRAIN_FLAGS") for word in flag.words]
    assert words[:2] == ["--comment=two words", "--qos=q"]
    assert words[-1] == "--nodes=4"
    assert read.array_limit == 9
    text = batch_text(job(), BODY, site_flags=read.flags_of("CPU_FLAGS"))
    assert "--comment=two words" in flags(text)


@pytest.mark.parametrize(
    "content",
    [
        *("SITE_FLAGS=()", "exit 3", "ARRAY_LIMIT=many", "SITE_FLAGS=("),
        *("CPU_FLAGS=(nodes=1) # LIMIT", "CPU_FLAGS=(--chdir=/) # LIMIT"),
    ],
    ids=str,
)
def test_a_site_file_that_lacks_something_is_refused_by_name(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.env"
    shipped = f"source {ROOT}/slurm/cluster.env\n" if "LIMIT" in content else ""
    site.write_text(f"{shipped}{content}\n")
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(site))

    with pytest.raises(UserError, match=r"site\.env"):
        read_site()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Not flags of another kind of job.
        ('SITE_FLAGS=""\n', "SITE_FLAGS: an empty text .*SITE_FLAGS=()"),
        ('TRAIN_FLAGS=(--nodes=2 "${NOPE:-}" --time=1)\n', "TRAIN_FLAGS: an empty text"),
        ("exit 0\n", "bash ends before the end of the file .*remove `exit`"),
        ("SITE_FLAGS=()\r\n", r"Windows line ends .*sed -i 's/\\r\$//'"),
        ("[[ -n ${NOPE:-} ]] && X=1\n", ".* exit code 1 and no message .*bash -eux .*site.env"),
        ("echo hello >&2\nfalse\n", "hello .*bash -eux"),
        ("read -r answer\n", ".* exit code 1 and no message"),
        ("sleep 9\n", "bash has not read it within 1 s .* fix: remove commands that wait"),
    ],
    ids=[
        "empty",
        "empty among others",
        "exit",
        "CR LF",
        "a test that fails",
        "a command that fails",
        "a question",
        "waiting",
    ],
)
def test_a_site_file_that_bash_cannot_finish_is_refused_with_its_cure(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.env"
    site.write_bytes(f"source {ROOT}/slurm/cluster.env\n{content}".encode())
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(site))
    if "sleep" in content:
        monkeypatch.setattr("pipeline.submission.jobs._SITE_SECONDS", 1)

    with pytest.raises(UserError, match=f"site.env: {message}"):
        read_site()


@pytest.mark.parametrize("script", sorted(ROOT.glob("slurm/*.sbatch")), ids=lambda path: path.stem)
def test_modules_and_conda_may_read_variables_that_are_not_set(
    script: Path, tmp_path: Path
) -> None:
    for name in ("python", "diffembed", "mpirun", "srun"):
        put_command(tmp_path / "bin" / name, f"echo {name} >>{tmp_path}/ran")
    site = tmp_path / "cluster.env"
    activate = "activate() { export SAVED_LAYER=$NOT_SET; }"
    site.write_text(f"source {ROOT}/slurm/cluster.env\n{activate}\n")
    job = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CPUS_ON_NODE", "SLURM_JOB_NUM_NODES")
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "DIFFEMBED_CLUSTER_ENV": str(site)}
    environment |= dict.fromkeys((*job, "SLURM_JOB_NODELIST"), "1")

    done = subprocess.run(
        ["bash", str(script), "run", "config.yaml"], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").is_file()


def test_a_percent_sign_in_a_folder_is_not_slurms_to_expand() -> None:
    own = job(folder=Path("lr1%j/50%"), name="train")

    assert "--output=lr1%%j/50%%/diffembed-train-%j.out" in flags(
        batch_text(own, BODY, site_flags=[])
    )
    assert expand_log(str(own.log), job="7", name="x") == "lr1%j/50%/diffembed-train-7.out"


@pytest.mark.parametrize(
    ("text", "log"),
    [
        ("", "out/diffembed-say-7.out"),
        # By this name `watch` finds it, whatever the job is called.
        ("--job-name='my job'", "out/diffembed-say-7.out"),
        ("-o %x-%j.out --job-name='my job'", "'my job-7.out'"),
        ("-o %x-%j.out --job-name 'my job'", "'my job-7.out'"),
        ("-o %x-%j.out -J own", "own-7.out"),
        ("-o %x-%j.out -Jown --exclusive", "own-7.out"),
        ("-o %x-%j.out --job=own", "own-7.out"),
        ("-J own -o /logs/%x.%j.%A_%4a", "/logs/own.7.7_*"),
        ("-o '/my logs/%N $1/%j'", "'/my logs/'*' $1/7'"),
        ("--output=first --output=/logs/%N", "/logs/*"),
    ],
)
def test_the_log_is_found_whatever_flags_name_it(text: str, log: str) -> None:
    own = given(*split_flags(text))

    pattern = last_value(own, "--output", str(job().log))
    name = last_value(own, "--job-name", "diffembed-say")
    assert expand_log(pattern, job="7", name=name) == log


def test_a_flag_and_its_value_stay_on_one_line() -> None:
    text = batch_text(job(), BODY, site_flags=given("-A", "nlp", "--exclusive"))

    assert "#SBATCH -A nlp\n#SBATCH --exclusive\n" in text


@pytest.mark.parametrize(
    "text",
    [
        *("--array=0-3", "-a 0-3", "--chdir=/tmp", "-D /tmp", "--chd=/tmp", "--wait", "-W"),
        *("--wrap=true", "-M other", "--test-only", "nodes=4", "--comment='open"),
        "--comment='a\nb'",
        # Not to the batch script, or another signal than it waits for.
        *("--signal=USR1@300", "--signal=B:TERM@300", "--sig USR2", "--signal=10"),
    ],
)
def test_flags_that_would_break_a_submission_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--sbatch"):
        parse_flags(split_flags(text), "--sbatch")


def test_a_training_may_get_more_time_to_save() -> None:
    own = given(*split_flags("--signal=B:USR1@600"))

    assert flags(batch_text(job(), BODY, site_flags=[], own_flags=own))[-1] == own[0].words[0]


def test_a_dependency_of_the_user_joins_that_of_the_chain() -> None:
    own = given("--dependency=singleton", "--nodes=1")

    waiting = flags(batch_text(job(), BODY, site_flags=given("-d", "after:3"), after=("7",)))
    assert waiting[-2] == "--dependency=afterok:7,after:3"
    both = flags(batch_text(job(), BODY, site_flags=[], own_flags=own, after=("7",)))
    assert [flag for flag in both if "dependency" in flag] == ["--dependency=afterok:7,singleton"]
    # A job that waits for no other of its chain keeps the flag as it is.
    alone = flags(batch_text(job(), BODY, site_flags=[], own_flags=own))
    assert "--dependency=singleton" in alone


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "kind"),
    [
        ("--nodes=1 --gpus-per-node=8", 1, 8, ""),
        ("--nodes=4 --gpus-per-node=h100:8", 4, 8, "h100"),
        ("-N 2 --gres=gpu:nvidia_a100-sxm4-80gb:4", 2, 4, "nvidia_a100-sxm4-80gb"),
        ("-N2 -G 16", 2, 8, ""),
        # The last one counts, whichever form it has.
        ("--nodes=1 -N 4 --gpus=2 -G 16", 4, 4, ""),
        ("-N 4 --nodes=1 --gpus-per-node=8", 1, 8, ""),
        ("--nodes 2-4 --gpus l40s:6", 2, 3, "l40s"),
        ("--gres=shard:2,gpu:2(S:0-1)", 1, 2, ""),
        ("--gres=gpu:h200", 1, 1, "h200"),
        ("--gres=gpu", 1, 1, ""),
        ("--gpus-per-node=4 --gpus-per-node=2", 1, 2, ""),
        ("--time=1:00:00", 1, 0, ""),
    ],
)
def test_flags_say_which_gpus_they_ask_for(text: str, nodes: int, per_node: int, kind: str) -> None:
    flags = parse_flags(split_flags(text), "--sbatch")

    assert requested_gpus(flags) == RequestedGpus(nodes=nodes, per_node=per_node, kind=kind)
