"""Decide when a run stops, saves, publishes and resumes, and what follows a complete checkpoint.

signal, stop file or end of the launcher --StopRequest--> the trainer saves and leaves

begin(step) --Saver, in the background--> finish() --> evaluations link its files, if due
                                                   --> keeper mirrors it, deletes older ones
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import comm, launch, run_folder
from pipeline.config import CheckpointConfig
from pipeline.errors import UserError, say_warning
from pipeline.run_folder import LATEST, Keeper, RunDir, checkpoint_name, remove_leftovers
from pipeline.training import checkpoints
from pipeline.training.checkpoints import Saver, Stateful
from pipeline.training.engine import Objective
from pipeline.training.evaluations import Evaluations

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first signal; a second one, `echo_seconds` later, ends the process at once.

    Args:
        file: a path whose existence is a request, as a signal is.
        launchers: ids of the launcher's processes (see `launch.launcher_processes`), whose end is
            a request as well: nothing else would end the ranks, and the next start of the run
            would find them in its folder. Empty for none.
        echo_seconds: launchers forward a signal that the ranks have also received directly; the
            two are one request.
    """

    def __init__(
        self, file: Path, *, launchers: tuple[int, ...], echo_seconds: float = 1.0
    ) -> None:
        self._file = file
        self._reason = ""
        self._launchers = launchers
        for number in _SIGNALS:
            signal.signal(number, self._remember)
        # Python runs a handler only once the main thread has returned from C++: from a collective
        # call that waits for a rank which hangs, never. A pipe receives the signal at once.
        receiving, sending = os.pipe()
        os.set_blocking(sending, False)  # as Python requires: a handler must never wait
        signal.set_wakeup_fd(sending)
        threading.Thread(
            target=_end_at_second_signal, args=(receiving, echo_seconds), daemon=True
        ).start()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def reason(self) -> str:
        """Return why this rank wants to stop, empty when it does not."""
        if not self._reason:
            if comm.rank() == 0 and self._file.exists():
                # Not remembered: a user may take the file away again.
                return f"{self._file.name} file"
            if self._launchers and launch.launcher_processes() != self._launchers:
                self._reason = "the launcher's end"
        return self._reason

    def is_pending(self) -> bool:
        """Return True for any request that this rank can see, the stop file included."""
        return bool(self.reason()) or self._file.exists()

    def agreed_reason(self) -> str:
        """Return the reason of the first rank that has one; a collective call."""
        return str(next(reason for reason in comm.all_gather_object(self.reason()) if reason))

    def clear(self) -> None:
        """Forget an earlier request by file, so that the next start does not stop again."""
        if comm.rank() == 0:
            self._file.unlink(missing_ok=True)


def _end_at_second_signal(receiving: int, echo_seconds: float) -> None:
    """Read signals, a byte each, and end this process at the second request."""
    first = None
    while True:
        number, now = os.read(receiving, 1)[0], time.monotonic()
        if number not in _SIGNALS:  # for another library
            continue
        if first is None:
            first = now
        elif now - first > echo_seconds:
            os._exit(128 + number)


def take_over(run: RunDir, mirror: Path | None) -> None:
    """Claim the run's folder and clean up after the process before; rank 0 only.

    Raises:
        UserError: another process works in it, or the mirror cannot be written to.
    """
    run.claim()  # first: another process may be writing what looks like leftovers
    remove_leftovers(run.checkpoints)
    if mirror is None:
        return
    try:
        mirror.mkdir(parents=True, exist_ok=True)
        remove_leftovers(mirror)
    except OSError as error:
        raise UserError(
            f"checkpoint.mirror: {error}", allowed="a folder that this machine can write to"
        ) from error


def newest_checkpoint(run: RunDir, mirror: Path | None) -> Path | None:
    """Return the newest checkpoint of the run's folder, or, if it has none, of the mirror.

    Rank 0 only: a network file system may show another host an older `latest`.
    """
    newest = run_folder.latest_checkpoint(run.checkpoints)
    newest = newest or (run_folder.latest_checkpoint(mirror) if mirror else None)
    # Silently starting over would cost the user the run.
    if newest is None and (others := run_folder.checkpoint_names(run.checkpoints)):
        say_warning(
            f"{run.checkpoints}/{LATEST} is missing: the run starts at step 0, although there are "
            f"{', '.join(others)} (`diffembed rewind {run.root} {others[-1]}` continues from there)"
        )
    return newest


class RunCheckpoints:
    """Saves and restores an engine and its objective; all ranks call every method together.

    Args:
        run: the run's folder.
        config: number of checkpoints to keep, and the mirror.
        engine: its weights and moments are saved.
        objective: its state is saved with them.
        identity: values that a resuming run must share (see `checkpoints.load`).
        evaluations: scores complete checkpoints, if configured.
        in_a_hurry: see `Saver`.
    """

    def __init__(
        self,
        run: RunDir,
        config: CheckpointConfig,
        *,
        engine: Stateful,
        objective: Objective,
        identity: dict[str, Any],
        evaluations: Evaluations | None,
        in_a_hurry: Callable[[], bool],
    ) -> None:
        self._folder = run.checkpoints
        self._engine, self._objective, self._identity = engine, objective, identity
        self._evaluations = evaluations
        self._saver = Saver(run.checkpoints, in_a_hurry=in_a_hurry)
        self._keeper = Keeper(run.checkpoints, config)
        self._newest_step = 0  # of the newest checkpoint, complete or on its way

    @property
    def is_writing(self) -> bool:
        """True while this rank is writing; differs between ranks."""
        return self._saver.is_writing

    def resume(self, path: Path) -> int:
        """Load a checkpoint; return the next step."""
        step, extra = checkpoints.load(path, self._engine, self._identity)
        self._objective.load_state_dict(extra)
        self._newest_step = step
        # A checkpoint in the mirror was followed up before it got there.
        if comm.rank() == 0 and path.parent == self._folder:
            self._follow_up(path, step)  # the follow-up itself may have been interrupted
        return step

    def begin(self, step: int) -> None:
        """Start a checkpoint after `step` finished steps; training continues meanwhile."""
        self.finish()  # one at a time, or host memory would hold several
        self._saver.begin(
            self._engine, step=step, identity=self._identity, extra=self._objective.state_dict()
        )
        self._newest_step = step

    def finish(self) -> None:
        """Publish the checkpoint on its way, if there is one, and run its follow-up."""
        if not self._saver.is_pending:
            return
        path = self._saver.finish()
        if comm.rank() == 0:
            self._follow_up(path, self._newest_step)

    def save(self, step: int) -> Path:
        """Make sure that the state after `step` steps is on disk, and in the mirror."""
        # Otherwise a checkpoint of this very step is on its way, or just appeared.
        if self._newest_step != step:
            self.begin(step)
        self.finish()
        # The process may end after this: its background copies must be done.
        if comm.rank() == 0:
            self._keeper.wait()
        return self._folder / checkpoint_name(step)

    def complete(self, step: int) -> Path:
        """Save after the last step, and wait until its evaluation has started."""
        path = self.save(step)
        if comm.rank() == 0 and self._evaluations:
            self._evaluations.finish()
        return path

    def _follow_up(self, path: Path, step: int) -> None:
        """Evaluate, mirror and prune after `latest` names a new checkpoint; rank 0 only.

        Training waits for it: long work belongs in the background. Evaluations come first and keep
        links to the files of `path`, because the keeper deletes.
        """
        if self._evaluations:
            self._evaluations.start(path, step)
        self._keeper.keep(path, step)
