"""The mteb library, imported so that it works on any machine."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# The folder that mteb makes when it is imported; nothing is kept there by this package.
_CACHE = "MTEB_CACHE"


@functools.lru_cache(maxsize=1)
def load_mteb() -> Any:
    """Import mteb, also where the home folder is missing or read-only, as on many compute nodes."""
    if _CACHE not in os.environ:
        try:
            Path.home().joinpath(".cache", "mteb").mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            folder = tempfile.mkdtemp(prefix="diffembed-mteb-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ[_CACHE] = folder
    import mteb

    return mteb
