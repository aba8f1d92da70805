"""What all tests share: a temporary folder for what they start, gone with it after them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from tests import forks


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
