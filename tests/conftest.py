"""What all tests share: the marker `fast`, and a temporary folder that is gone after them."""

from __future__ import annotations

import fnmatch
import multiprocessing.process
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forks

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
    *("test_forks.py", "test_workers.py"),
    *("test_interruption.py", "test_prepare.py", "test_restart.py"),
    *("test_export.py", "test_export_check.py", "outside"),
    "test_bad_rows_are_dropped_counted_and_listed_the_same_by_any_number_of_workers",
    "test_a_hub_dataset_is_read_from_its_cache_when_offline",
    "test_a_site_file_that_bash_cannot_finish_is_refused_with_its_cure",
    "test_a_site_file_that_lacks_something_is_refused_by_name",
    "test_arguments_and_variables_reach_the_script_whatever_they_hold",
    "test_the_site_file_is_read_as_bash_reads_it",
    "test_a_rendezvous_that_is_missing_or_wrong_is_named",
    "test_faults_of_a_config_come_before_heavy_packages",
    "test_importing_stays_free_of_torch",
    "test_shell_scripts_parse",
    "test_the_top_level_holds_only_the_agreed_names",
}
_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
_running_fast = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark fast tests: all of their files, except those known to start processes."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        names = (item.path.name, item.name.partition("[")[0], *getattr(item, "fixturenames", ()))
        if _START_PROCESSES.isdisjoint(names) and any(
            fnmatch.fnmatchcase(path, pattern) for pattern in _FAST
        ):
            item.add_marker("fast")


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if _running_fast and event in _STARTS:
        pytest.fail(
            f"a fast test starts a process ({event} {arguments[:2]}): "
            "name it in _START_PROCESSES of tests/conftest.py"
        )


sys.addaudithook(_refuse_processes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hold fast tests to what their marker says."""
    global _running_fast
    _running_fast = item.get_closest_marker("fast") is not None
    try:
        return (yield)
    finally:
        _running_fast = False


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
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="t-") as folder:
        for name in ("TMPDIR", "TMP", "TEMP"):
            patch.setenv(name, folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
        forks.stop_server()
