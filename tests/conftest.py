"""Shared by all tests: order, the marker `fast`, CPU seconds, and a temporary folder."""

from __future__ import annotations

import fnmatch
import functools
import gc
import multiprocessing.process
import multiprocessing.util
import os
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import forks

# Neither a slow example nor slow drawing of examples is a fault: the machine may be busy.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")
# What somebody has measured on this machine must not change a plan.
os.environ["DIFFEMBED_CALIBRATIONS"] = "/nonexistent"
# Before torch is imported. Threads of several workers would wait for one another's cores: twice the
# CPU time, and twelve times in the worst test. Processes that tests start have one thread as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Imports and the collection of tests leave nearly no garbage to look for.
gc.disable()

# Files whose tests are `fast`: below a second or two each, and in this process.
_FAST = (
    *("test_*.py", "data/*", "submission/*", "planning/*"),
    *("model/test_a[dt]*", "model/test_[bcls]*", "model/test_e[nx]*", "model/test_p*"),
    *("training/test_ds_config.py", "training/test_metrics.py", "training/test_optimizer.py"),
    *("training/test_grad_cache.py", "training/test_run_identity.py"),
)
# Files and tests among them that start processes, and fixtures that do; or take many seconds.
_START_PROCESSES = {
    *("test_damage.py", "test_chain.py", "test_merging.py"),
    *("test_doctor.py", "test_extend.py", "test_readiness.py"),
    *("test_forks.py", "test_ranks.py", "test_workers.py"),
    *("test_interruption.py", "test_prepare.py", "test_restart.py", "test_plan_commands.py"),
    *("test_calibration.py", "test_arrays_are_planned_without_torch"),
    *("test_export.py", "test_export_check.py", "outside", "test_serving.py"),
    "test_bad_rows_are_dropped_counted_and_listed_the_same_by_any_number_of_workers",
    "test_a_hub_dataset_is_read_from_its_cache_when_offline",
    "test_a_locale_without_utf8_is_refused",
    "test_a_run_has_one_training_at_a_time_and_is_free_after_a_kill",
    "test_a_site_file_that_bash_cannot_finish_is_refused_with_its_cure",
    "test_a_site_file_that_lacks_something_is_refused_by_name",
    "test_arguments_and_variables_reach_the_script_whatever_they_hold",
    "test_modules_and_conda_may_read_variables_that_are_not_set",
    "test_the_site_file_is_read_as_bash_reads_it",
    "test_a_rendezvous_that_is_missing_or_wrong_is_named",
    "test_faults_of_a_config_come_before_heavy_packages",
    "test_importing_stays_free_of_torch",
    "test_shell_scripts_parse",
    "test_the_top_level_holds_only_the_agreed_names",
}
# Files of minutes, which come first so that no worker is left with one at the end.
_LONG = (
    *("slurm/test_slurm_journey.py", "training/test_gradients.py", "training/test_failures.py"),
    *("slurm/test_scores_while_training.py", "training/test_kills.py", "slurm/*", "training/*"),
    *("damage/*", "launch/*", "evaluation/*"),
)
# Files that share a process which takes many seconds to start go to one worker.
_TOGETHER = ("model/test_export*", "evaluation/test_embed*")
_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
_running_fast = False
_cpu_before = 0.0
_cpu_of_test: Counter[str] = Counter()
_not_forked: Counter[str] = Counter()  # by variable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, and mark fast tests: files of them, except what starts processes."""
    gc.enable()
    gc.freeze()
    global _cpu_before
    items.sort(key=lambda item: _place(item.path)[0])
    for item in items:
        names = (item.path.name, item.name.partition("[")[0], *getattr(item, "fixturenames", ()))
        if _place(item.path)[1] and _START_PROCESSES.isdisjoint(names):
            item.add_marker("fast")
    _cpu_before = _cpu_seconds()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """Give out tests by file, and some files together."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            name = file.removeprefix("tests/")
            groups = (pattern for pattern in _TOGETHER if fnmatch.fnmatchcase(name, pattern))
            return next(groups, file)

    return Scheduling(config, log)


@functools.cache
def _place(file: Path) -> tuple[int, bool]:
    """Rank of a file among all, files of one rank staying in their order; whether it is fast."""
    name = file.relative_to(Path(__file__).parent).as_posix()
    matches = (fnmatch.fnmatchcase(name, pattern) for pattern in _LONG)
    rank = next((place for place, found in enumerate(matches) if found), len(_LONG))
    return rank, any(fnmatch.fnmatchcase(name, pattern) for pattern in _FAST)


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if _running_fast and event in _STARTS:
        pytest.fail(
            f"a fast test starts a process ({event} {arguments[:2]}): "
            "name it in _START_PROCESSES of tests/conftest.py"
        )


sys.addaudithook(_refuse_processes)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail fast tests, and fixtures they set up, that start a process."""
    global _running_fast
    _running_fast = item.get_closest_marker("fast") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Let fixtures of other tests, such as a session's cluster, end after a fast one."""
    global _running_fast
    _running_fast = False


def _cpu_seconds() -> float:
    """CPU of this process, of children that it has waited for, and of its forked processes."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return forks.cpu_seconds + sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[pytest.TestReport]:
    """Note the CPU seconds since the last report, that is of a setup, a call or a teardown."""
    global _cpu_before
    report: pytest.TestReport = yield
    before, _cpu_before = _cpu_before, _cpu_seconds()
    report.user_properties.append(("cpu_seconds", _cpu_before - before))
    report.user_properties.append(("not_forked", forks.differing[:]))
    forks.differing.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the seconds of each test; with pytest-xdist, where the summary is printed."""
    properties = dict(report.user_properties)
    _cpu_of_test[report.nodeid] += properties.get("cpu_seconds", 0.0)
    _not_forked.update(properties.get("not_forked", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the most expensive tests, where at least one takes a second."""
    if _cpu_of_test.total() > 1:
        total = f"{_cpu_of_test.total():.0f} s of CPU, daemons and launched ranks not counted"
        terminalreporter.section(total)
        for name, seconds in _cpu_of_test.most_common(10):
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")
        for name, count in _not_forked.items():
            terminalreporter.write_line(f"{count} processes were started because of {name}")


@pytest.fixture(autouse=True)
def _no_workers_in_fast_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """`multiprocessing` spawns its processes past the audit hook."""
    if _running_fast:

        def start(self: object) -> None:
            _refuse_processes("os.fork", (self,))

        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Launchers that are killed leave folders behind.

    Not below pytest's own folder: a Unix socket's path holds about 100 characters.
    """
    tmp_path_factory.getbasetemp()  # stays where it is
    multiprocessing.util.get_temp_dir()  # so does this one, which ends with the process
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="t-") as folder:
        for name in ("TMPDIR", "TMP", "TEMP"):
            patch.setenv(name, folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
        forks.stop_server()
