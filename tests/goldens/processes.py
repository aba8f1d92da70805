"""Run commands as a user would, from one process that has imported the slow libraries already."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import forks
from tests.forks import ROOT
from tests.support import rank_environments

# Nothing that a result could depend on is left to the machine.
ENVIRONMENT = {
    **forks.ENVIRONMENT,
    **{"TOKENIZERS_PARALLELISM": "false", "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"},
    **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LC_ALL": "C.UTF-8"},
    **{"HF_DATASETS_OFFLINE": "1"},
}
PROGRAMS = {
    "diffembed": ("-m", "pipeline.cli"),
    "ReasonAug": ("-m", "ReasonAug"),
    "train": (str(ROOT / "pipeline" / "train.py"),),
}


def import_libraries() -> None:
    """Set the environment, for children too, and import what they would, wherever it lies."""
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(ROOT))
    forks.import_libraries()


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The exit code of a command, and its output."""

    code: int
    stdout: str
    stderr: str


class Command:
    """A command that runs in a child, with `folder` as its working directory.

    Args:
        folder: the working directory.
        words: the name of one of `PROGRAMS`, then arguments.
        environment: variables in addition to this process's.
    """

    def __init__(
        self, folder: Path, words: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        number = len(list(folder.glob("output/*.out")))
        name = folder / "output" / f"{number:04d}"
        name.parent.mkdir(exist_ok=True)

        def work() -> None:
            os.environ.update(environment or {})
            forks.run_program([*PROGRAMS[words[0]], *words[1:]])

        self._child = forks.Child(
            work, folder=folder, stdout=name.with_suffix(".out"), stderr=name.with_suffix(".err")
        )

    @property
    def is_alive(self) -> bool:
        """True until it ends."""
        return self._child.poll() is None

    def kill(self) -> None:
        """End it as a node's failure would, with the processes that it started."""
        self._child.kill()

    def wait(self, seconds: float = 300) -> Outcome:
        """Wait for its end, and kill it if it takes longer."""
        code = self._child.wait(seconds)
        return Outcome(-9 if code is None else code, *self._child.read())


def begin_ranks(folder: Path, words: Sequence[str], world_size: int) -> list[Command]:
    """Start a command as the ranks of one job, as torchrun would."""
    return [Command(folder, words, environment) for environment in rank_environments(world_size)]
