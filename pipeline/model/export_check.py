"""Load an export in a process without this package, and compare its vectors with ours.

    ours    the trained encoder on a ragged batch, in float32
    theirs  the folder, loaded by sentence-transformers and by the code of its card

`outside_program.py` is the program of that process; each request and each answer is a JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

# Seconds for one library to load the folder and embed a few texts. A disk that takes longer proves
# nothing against the folder, so the export is then written unchecked.
_PATIENCE = 900
# Largest distance, relative to the length of a vector. Rounding stays below a hundredth of it; one
# token more or less in a short text moves the vector much further.
_TOLERANCE = 1e-3
# The start of a result for a check that did not run.
NOT_CHECKED = "not checked"
_PROGRAM = Path(__file__).with_name("outside_program.py")


def available_bytes() -> int:
    """Return the memory that this process and its children can still take, also in a container."""
    page = os.sysconf("SC_PAGE_SIZE")
    free = page * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    with contextlib.suppress(OSError, ValueError, IndexError):  # no limit, or cgroups version 1
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2]
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit = int((folder / "memory.max").read_text())
        free = min(free, limit - int((folder / "memory.current").read_text()))
    return free


class Unfinished(Exception):  # noqa: N818 -- an outcome, not a fault
    """A check without a result; the text gives the reason."""


class OutsideProcess:
    """A process that loads folders and embeds texts, and cannot import this package.

    Its imports take seconds, so it starts with the `with` block, and the caller works meanwhile.

    Attributes:
        patience: seconds to wait for an answer.
    """

    def __init__(self, *, patience: float = _PATIENCE) -> None:
        self.patience = patience

    def __enter__(self) -> OutsideProcess:
        self._folder = TemporaryDirectory()
        self._log = TemporaryFile("w+")
        self._process = subprocess.Popen(
            # -P keeps the program's folder off its path: our modules could hide others.
            [sys.executable, "-P", str(_PROGRAM)],
            cwd=self._folder.name,  # not the caller's, where this package could be importable
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,  # not a pipe, which the process would fill and wait for
            text=True,
        )
        self._has_sentence_transformers: bool | None = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # it may have died with a request unread
                pipe.close()
        self._log.close()
        self._folder.cleanup()

    @property
    def has_sentence_transformers(self) -> bool:
        """True if that process can import sentence-transformers."""
        if self._has_sentence_transformers is None:
            self._has_sentence_transformers = bool(self._answer())
        return self._has_sentence_transformers

    def embed(
        self,
        folder: Path,
        library: str,
        batches: Sequence[Mapping[str, Any]],
        *,
        dtype: str = "float32",
    ) -> list[NDArray[np.float32]]:
        """Embed batches of texts.

        Args:
            folder: the export.
            library: `sentence-transformers`, or `transformers` for the code of the card.
            batches: each with `texts`, optionally a `prompt`, or for sentence-transformers the
                `prompt_name` of a stored one.
            dtype: of the weights as they are loaded; the forward runs in float32.

        Returns:
            (N, D) vectors for each batch.

        Raises:
            UserError: the library cannot load the folder.
            Unfinished: no answer arrived.
        """
        request = {"folder": str(folder.resolve()), "library": library, "dtype": dtype}
        answer = self._ask({**request, "batches": [*map(dict, batches)]})
        if "error" in answer:
            raise UserError(
                f"{library} cannot load the export ({answer['error']})",
                fix="update that library, or export with --no-check",
            )
        return [np.array(rows, dtype=np.float32) for rows in answer["vectors"]]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        _ = self.has_sentence_transformers  # reads the first line, before any answer
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        answer: dict[str, Any] = self._answer()
        return answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        # `readline` has no timeout, but returns when the process ends.
        timer = threading.Timer(self.patience, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            expired = not timer.is_alive()  # it has killed the process
            timer.cancel()
        if not line:
            raise Unfinished(f"no answer in {self.patience:.0f} s") if expired else self._died()
        return json.loads(line)

    def _died(self) -> Unfinished:
        code = self._process.wait()
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-1:] or ["it printed nothing"]
        return Unfinished(f"the process ended with code {code} ({last[0]})")


def check_vectors(
    outside: OutsideProcess,
    folder: Path,
    *,
    libraries: Sequence[str],
    dtype: str,
    batches: Sequence[Mapping[str, Any]],
    wanted: Sequence[NDArray[np.float32]],
) -> dict[str, str]:
    """Compare vectors of other libraries with ours.

    Args:
        outside: the process that imports those libraries.
        folder: the export.
        libraries: to check, as for `OutsideProcess.embed`.
        dtype: of the stored weights.
        batches: texts, as for `OutsideProcess.embed`, each with its `role`.
        wanted: our (N, D) vectors of each batch.

    Returns:
        The result of each library, as a sentence for the card.

    Raises:
        UserError: vectors differ, or a library cannot load the folder.
    """
    found: dict[str, str] = {}
    for library in libraries:
        try:
            if library == "sentence-transformers" and not outside.has_sentence_transformers:
                found[library] = f"{NOT_CHECKED}: it is not installed"
                continue
            theirs = outside.embed(folder, library, batches, dtype=dtype)
        except Unfinished as reason:  # the process is gone, so the other libraries cannot answer
            left = [name for name in libraries if name not in found]
            return {**found, **dict.fromkeys(left, f"{NOT_CHECKED}: {reason}")}
        for batch, ours, vectors in zip(batches, wanted, theirs, strict=True):
            _compare(library, str(batch["role"]), ours, vectors)
        version = metadata.version(library)
        found[library] = f"version {version} gives the trained encoder's vectors"
    return found


def _compare(
    library: str, role: str, ours: NDArray[np.float32], theirs: NDArray[np.float32]
) -> None:
    if ours.shape != theirs.shape:
        raise UserError(
            f"{library} gives vectors of shape {theirs.shape} for this export, not {ours.shape}",
            fix="report it; --no-check writes the export anyway",
        )
    lengths = np.linalg.norm(ours, axis=1)
    distances = np.linalg.norm(ours - theirs, axis=1) / np.maximum(lengths, 1e-12)
    if not distances.max() <= _TOLERANCE:  # written so that NaN fails, too
        raise UserError(
            f"{library} gives other vectors for a {role} than the trained encoder "
            f"({distances.max():.2g} of their length apart)",
            fix="report it; --no-check writes the export anyway",
        )
