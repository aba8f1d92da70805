"""Batch scripts as strings: what Slurm reads first, what wins, what a job finds."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.submission.job import Job, array_ranges, batch_text
from pipeline.submission.scheduler import submission_environment
from pipeline.submission.site import read_site

ROOT = Path(__file__).resolve().parents[2]
BODY = "#!/usr/bin/env bash\n# Says.\n#SBATCH --time=1\nset -e\nprintf '%s|' \"$@\" $SITE\n"


def job(**changes: object) -> Job:
    values = {"name": "say", "script": "say.sbatch", "flags": "SAY_FLAGS", "folder": Path("out")}
    return Job(**{"arguments": (), **values, **changes})


def flags(text: str) -> list[str]:
    """What sbatch reads: the directives above the first command."""
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            found += shlex.split(line.removeprefix("#SBATCH "))
    return found


def test_flags_of_the_submission_win_over_the_site_and_those_over_the_script() -> None:
    text = batch_text(job(), BODY, site_flags=["--time=2"], own_flags=["--time=3"])

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
    told = flags(batch_text(job(tells_of_failure=True), BODY, site_flags=[], after=("7",)))
    assert "--dependency=afterany:7" in told


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

    assert read.flags_of("TRAIN_FLAGS")[:2] == ("--comment=two words", "--qos=q")
    assert read.flags_of("TRAIN_FLAGS")[-1] == "--nodes=4"
    assert read.array_limit == 9
    text = batch_text(job(), BODY, site_flags=read.flags_of("CPU_FLAGS"))
    assert "--comment=two words" in flags(text)


@pytest.mark.parametrize(
    "content", ["SITE_FLAGS=()", "exit 3", "ARRAY_LIMIT=many", "SITE_FLAGS=("], ids=str
)
def test_a_site_file_that_lacks_something_is_refused_by_name(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.env"
    shipped = f"source {ROOT}/slurm/cluster.env\n" if "LIMIT" in content else ""
    site.write_text(f"{shipped}{content}\n")
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(site))

    with pytest.raises(UserError, match="site.env"):
        read_site()
