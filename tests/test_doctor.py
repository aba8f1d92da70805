"""Doctor: faults that are really there are found and named, and no check ends in a traceback."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from pipeline import doctor
from pipeline.cli import app
from pipeline.commands import checks
from pipeline.config import EvaluateConfig, EvaluatedModel, OwnTask, dump_config
from pipeline.doctor import Finding, guarded, machine, ranks
from tests.fake_slurm import FakeSlurm, put_command

ROOT = Path(__file__).resolve().parents[1]


def levels(findings: list[Finding]) -> dict[str, str]:
    """The worst level of each check."""
    order = ("ok", "warn", "fail")
    found: dict[str, str] = {}
    for finding in findings:
        worst = max(order.index(finding.level), order.index(found.get(finding.check, "ok")))
        found[finding.check] = order[worst]
    return found


def one(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- versions --------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the installed packages, for metadata of others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_tested_versions_are_right_and_are_named() -> None:
    finding = one(machine.check_packages(has_gpu=False))

    assert finding.level == "ok"
    assert "torch 2." in finding.found and "deepspeed 0.19" in finding.found


@pytest.mark.parametrize(
    ("name", "version", "level", "parts"),
    [
        ("torch", "2.14.1+cu130", "fail", ("<2.14", "attention kernels and gloo change")),
        ("transformers", "5.2.0", "fail", (">=5.17", "sees only earlier tokens")),
        ("deepspeed", "0.20.0", "fail", ("<0.20", "internals")),
        ("mteb", "2.27.0", "fail", ("<2.27", "tasks, prompts")),
        ("flash-attn", "2.5.8", "warn", (">=2.7", "variable-length kernel")),
    ],
)
def test_a_version_out_of_range_is_named_with_range_reason_and_fix(
    installed: Path, name: str, version: str, level: str, parts: tuple[str, ...]
) -> None:
    install(installed, name, version)

    finding = one(machine.check_packages(has_gpu=False))

    assert (finding.check, finding.level) == (name, level)
    assert finding.found.startswith(version)
    assert all(part in finding.found for part in parts)
    assert finding.fix.startswith(f"pip install '{name}") and parts[0] in finding.fix


def test_a_torch_without_a_fast_kernel_matters_only_on_a_gpu_without_flash_attn(
    installed: Path,
) -> None:
    install(installed, "torch", "2.8.0")

    assert one(machine.check_packages(has_gpu=False)).level == "ok"
    finding = one(machine.check_packages(has_gpu=True))
    assert (finding.check, finding.level) == ("torch", "warn")
    assert "one by one" in finding.found and "flash-attn" in finding.fix
    install(installed, "flash-attn", "2.8.1")
    assert one(machine.check_packages(has_gpu=True)).level == "ok"


def test_every_known_bad_version_is_of_a_package_that_this_project_declares() -> None:
    _, declared = machine.declared()

    for entry in machine.read_known_bad():
        assert entry.package in declared, entry
        assert entry.reason and entry.level in ("warn", "fail")
        if entry.level == "fail":  # outside of the declared range, whose breach it explains
            both = SpecifierSet(entry.versions) & declared[entry.package].specifier
            assert not any(both.contains(f"{n / 100:g}") for n in range(1, 1000))


def test_metadata_of_an_installed_package_gives_the_same_requirements(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Outside of a checkout there is no pyproject.toml."""
    python, in_checkout = machine.declared()
    monkeypatch.setattr(machine, "_PYPROJECT", tmp_path / "pyproject.toml")
    texts = [f"{r.name}{r.specifier}" + ("; extra == 'gpu'" if machine.is_optional(r) else "")
             for r in in_checkout.values()]  # fmt: skip
    monkeypatch.setattr(machine.metadata, "requires", lambda _: texts)
    monkeypatch.setattr(machine.metadata, "metadata", lambda _: {"Requires-Python": python})

    again_python, again = machine.declared()

    assert again_python == python
    assert {n: r.specifier for n, r in again.items()} == {
        n: r.specifier for n, r in in_checkout.items()
    }
    optional = {n for n, r in in_checkout.items() if machine.is_optional(r)}
    assert {n for n, r in again.items() if machine.is_optional(r)} == optional
    assert "flash-attn" in optional and "torch" not in optional


# --- this machine ----------------------------------------------------------------------------


def test_a_lock_of_a_killed_build_is_found_and_a_fresh_one_may_be_right(tmp_path: Path) -> None:
    assert one(machine.check_build_locks(tmp_path)).level == "ok"
    build = tmp_path / "py311_cu130" / "cpu_adam"
    build.mkdir(parents=True)
    (build / "lock").touch()
    assert one(machine.check_build_locks(tmp_path)).level == "warn"
    hour_ago = time.time() - 3600
    os.utime(build / "lock", (hour_ago, hour_ago))

    finding = one(machine.check_build_locks(tmp_path))

    assert (finding.level, finding.fix) == ("fail", f"rm {build / 'lock'}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_or_full_file_system_is_found_as_shared_memory_and_as_an_output(
    small_disk: Path, tmp_path: Path
) -> None:
    finding = one(machine.check_shared_memory(small_disk))
    assert (finding.level, "--shm-size" in finding.fix) == ("fail", True)
    assert one(machine.check_shared_memory(tmp_path / "missing")).level == "fail"
    with (small_disk / "filler").open("wb") as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 2**20)
            file.flush()

    finding = one(machine.check_folder(small_disk / "run", "output_dir"))

    assert finding.level == "fail" and str(small_disk) in finding.found
    # A cache that may be read-only is no reason to stop.
    assert one(machine.check_folder(small_disk, "HF_HOME", needed=False)).level == "warn"


def test_an_output_is_checked_above_itself_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert one(machine.check_folder(tmp_path / "a" / "b", "output_dir")).level == "ok"
    finding = one(machine.check_folder(tmp_path / "file" / "b", "output_dir"))
    assert (finding.level, "is a file" in finding.found) == ("fail", True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_low_limit_of_open_files_is_found() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = {}
    try:
        for limit in (200, 1024, 4096):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            found[limit] = one(machine.check_open_files())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert [finding.level for finding in found.values()] == ["fail", "warn", "ok"]
    assert found[200].fix == "run `ulimit -n 4096`"


def test_a_missing_compiler_is_a_warning_because_only_offload_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CUDA_HOME", raising=False)

    finding = one(machine.check_compilers(has_gpu=True))

    assert finding.level == "warn"
    assert all(name in finding.found for name in ("g++", "ninja", "nvcc", "offload"))


@pytest.mark.parametrize(
    ("body", "level", "part"),
    [
        (
            "for i in 1 2; do echo 'sum 3 Open MPI v5.0.1, package: x'; done",
            "ok",
            "Open MPI v5.0.1",
        ),
        ("for i in 1 2; do echo 'sum 1 MPICH'; done", "fail", "another MPI than this mpirun"),
        ("echo 'mpirun: error: no slots' >&2; echo ---- >&2; exit 1", "fail", "no slots"),
        ("exit 9", "fail", "exit code 9"),
    ],
)
def test_ranks_of_mpi_that_do_not_find_each_other_are_found(
    body: str, level: str, part: str, tmp_path: Path
) -> None:
    put_command(tmp_path / "mpirun", body)

    finding = machine.judge_mpi([str(tmp_path / "mpirun"), "-n", "2"])

    assert (finding.level, part in finding.found) == (level, True), finding


# --- torch and ranks -------------------------------------------------------------------------


def test_two_real_ranks_see_torch_attend_and_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    findings = list(ranks.check_ranks())

    assert levels(findings) == {"torch": "ok", "attention": "ok", "ranks": "ok"}, findings
    assert findings[-1].found == "2 ranks on one host sum by gloo"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("echo 'ImportError: libcudart.so.13: cannot open' >&2; exit 1", "libcudart.so.13"),
        ("kill -ILL $$", "ended by SIGILL"),
        ("exit 0", "exit code 0: no message"),
    ],
)
def test_a_launcher_or_torch_that_dies_is_one_line(body: str, part: str, tmp_path: Path) -> None:
    put_command(tmp_path / "launcher", body)

    finding = one(ranks.check_ranks([str(tmp_path / "launcher")]))

    assert (finding.check, finding.level) == ("torch", "fail")
    assert part in finding.found


def test_a_rank_that_dies_after_some_checks_is_told_from_what_is_missing(tmp_path: Path) -> None:
    line = 'doctor: {"check": "torch", "level": "ok", "found": "2.13", "fix": ""}'
    put_command(tmp_path / "srun", f"echo '0: {line}'; echo '1: NCCL error' >&2; kill -ABRT $$")

    findings = list(ranks.check_ranks([str(tmp_path / "srun"), "--label"]))

    assert [(f.check, f.level) for f in findings] == [("torch", "ok"), ("attention", "fail")]
    assert "ended by SIGABRT: 1: NCCL error" in findings[1].found


@pytest.mark.parametrize(
    ("kinds", "capability", "fits"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "compute_90"], (10, 0), True),
        (["sm_90", "sm_100"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
    ],
)
def test_a_gpu_that_torch_was_not_built_for_is_recognised(
    kinds: list[str], capability: tuple[int, int], fits: bool
) -> None:
    assert ranks._is_built_for(kinds, *capability) == fits


def test_an_attention_kernel_that_computes_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch.nn.functional

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert one(ranks.check_attention()).level == "ok"
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, k, v: right(q, k, v, scale=0.5),
    )
    assert one(ranks.check_attention()).level == "fail"


# --- Slurm -----------------------------------------------------------------------------------

_SETTINGS = "echo 'ClusterName = far'; echo 'MaxArraySize = 4'; echo 'JobRequeue = 0'"


def write_evaluation(folder: Path) -> Path:
    """Write the config of 6 elements over a user's own tasks, of which one folder is there."""
    (folder / "there").mkdir()
    config = EvaluateConfig(
        output_dir=folder / "scores",
        models=tuple(EvaluatedModel(name=name, path=folder / name) for name in ("old", "new")),
        tasks=tuple(OwnTask(name=name, path=folder / "there") for name in ("a", "b", "c")),
    )
    path = folder / "evaluate.yaml"
    path.write_text(dump_config(config))
    return path


def test_slurms_limits_and_its_answer_to_the_sites_flags_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path / "bin", monkeypatch)
    slurm.put("scontrol", _SETTINGS)
    slurm.put("sbatch", "if grep -q gpus; then echo 'sbatch: error: no such GRES' >&2; exit 1; fi")
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(ROOT / "slurm/cluster.env"))

    findings = list(machine.check_slurm(write_evaluation(tmp_path)))

    found = levels(findings)
    assert (found["slurm"], found["slurm requeue"], found["slurm arrays"]) == ("ok", "warn", "fail")
    assert found["cluster.env TRAIN_FLAGS"] == found["cluster.env EVALUATE_FLAGS"] == "warn"
    assert found["cluster.env PREPARE_FLAGS"] == found["cluster.env CPU_FLAGS"] == "ok"
    arrays = next(f for f in findings if f.check == "slurm arrays")
    assert "6 elements, MaxArraySize is 4" in arrays.found
    assert any("no such GRES" in finding.found for finding in findings)


def test_slurm_is_asked_about_a_flag_with_spaces_as_one_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path / "bin", monkeypatch)
    slurm.put("scontrol", _SETTINGS)
    unavailable = "allocation failure: Requested node configuration is not available"
    script = f"cat >{tmp_path}/asked; ! grep -q gpus {tmp_path}/asked"
    slurm.put("sbatch", f"{script} || {{ echo '{unavailable}' >&2; exit 1; }}")
    site = tmp_path / "cluster.env"
    shipped = f"source {ROOT}/slurm/cluster.env"
    site.write_text(f"{shipped}\nSITE_FLAGS=(--comment='two words' --qos=q)\n")
    monkeypatch.setenv("DIFFEMBED_CLUSTER_ENV", str(site))

    findings = list(machine.check_slurm())

    found = levels(findings)
    assert (found["cluster.env CPU_FLAGS"], found["cluster.env TRAIN_FLAGS"]) == ("ok", "warn")
    assert any("only down or drained now" in finding.fix for finding in findings)
    lines = (tmp_path / "asked").read_text().splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("#SBATCH ")]
    assert words[:2] == [["#SBATCH", "--comment=two words"], ["#SBATCH", "--qos=q"]]


def test_programs_of_slurm_without_a_cluster_fail_only_inside_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path / "bin", monkeypatch)
    slurm.put("scontrol", "echo 'fatal: no configuration' >&2; exit 1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert one(machine.check_slurm()).level == "warn"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    finding = one(machine.check_slurm())
    assert (finding.level, "no configuration" in finding.found) == ("fail", True)


# --- the command -----------------------------------------------------------------------------


def broken() -> Iterator[Finding]:
    yield Finding(check="half", level="ok", found="so far")
    raise KeyError("a bug\nof two lines")


def test_a_crash_inside_a_check_is_its_own_line_and_the_others_run() -> None:
    def full() -> Iterator[Finding]:
        raise OSError(28, "No space left on device", "/scratch")
        yield

    found = list(doctor.run_checks({"half": broken, "disk": full}))

    assert [(finding.check, finding.level) for finding in found] == [
        *(("half", "ok"), ("half", "fail"), ("disk", "fail"))
    ]
    assert found[1].found == "the check itself failed: KeyError: 'a bug\\nof two lines'"
    assert found[2].found == "/scratch: No space left on device" and "free some" in found[2].fix
    assert list(guarded("none", lambda: [])) == []


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_is_1_where_anything_fails(
    level: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding(check="disk", level=level, found="[16 GiB] free", fix="none")  # type: ignore[arg-type]
    monkeypatch.setattr(checks, "all_checks", lambda *_: {"disk": lambda: [finding]})

    shown = CliRunner().invoke(app, ["doctor"])
    as_json = CliRunner().invoke(app, ["doctor", "--json"])

    assert shown.exit_code == as_json.exit_code == code
    assert f"{level:4}  disk: [16 GiB] free | fix: none" in shown.output
    assert json.loads(as_json.output) == [
        {"check": "disk", "level": level, "found": "[16 GiB] free", "fix": "none"}
    ]


def test_a_launcher_that_is_not_there_is_the_users_error() -> None:
    shown = CliRunner().invoke(app, ["doctor", "--launcher", "no-such-launcher -n 2"])

    assert "no-such-launcher: not found" in str(shown.exception)


SCRIPTS = {
    "prepare": ["data.yaml"],
    "mine": ["mine.yaml"],
    "train": ["train.yaml", "--deepspeed", "zero3.json"],
    "export": ["train.yaml"],
    "evaluate": ["run", "evaluate.yaml"],
    "synthesize": ["synthesize.yaml"],
}


@pytest.mark.parametrize("wanted", ["0", "1"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_asks_the_doctor_first_where_the_site_wants_it_and_ends_if_a_check_fails(
    name: str, wanted: str, tmp_path: Path
) -> None:
    """The shipped script, with commands that only say how they were called."""
    for command in ("diffembed", "python", "mpirun", "srun"):
        put_command(tmp_path / "bin" / command, f'echo {command} "$@"; [ "$1" != doctor ]')
    slurm = {"NUM_NODES": "2", "NODELIST": "n[1-2]", "ID": "7"}
    environment = {
        **{f"SLURM_JOB_{key}": value for key, value in slurm.items()},
        **{"SLURM_CPUS_ON_NODE": "4", "SLURM_GPUS_ON_NODE": "2", "SLURM_ARRAY_TASK_ID": "3"},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        **{"VIRTUAL_ENV": "any", "DOCTOR": wanted},
    }

    done = subprocess.run(
        ["bash", f"slurm/{name}.sbatch", *SCRIPTS[name]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )

    lines = [line for line in done.stdout.splitlines() if line.startswith("diffembed doctor")]
    if wanted == "0":
        assert (done.returncode, lines) == (0, []), done.stderr
        return
    launcher = " --launcher srun --nodes=2 --ntasks-per-node=2 --ntasks=4 --cpus-per-task=2"
    config = next(word for word in SCRIPTS[name] if word.endswith(".yaml"))
    expected = f"diffembed doctor {config}" + (launcher if name == "train" else "")
    assert [line.strip() for line in lines] == [expected]
    assert done.returncode == 1
    # Nothing else has been started.
    assert done.stdout.splitlines()[-1] == lines[0]
