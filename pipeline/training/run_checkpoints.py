"""When a run saves, stops and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import checkpoint_folder, comm
from pipeline.checkpoint_folder import LATEST, Keeper, checkpoint_name, remove_leftovers
from pipeline.config import CheckpointConfig
from pipeline.errors import UserError, say_warning
from pipeline.run_folder import RunDir
from pipeline.training import checkpoints
from pipeline.training.checkpoints import Saver
from pipeline.training.engine import Objective
from pipeline.training.evaluations import Evaluations
from pipeline.training.zero import ZeroEngine


def take_over(run: RunDir, mirror: Path | None) -> None:
    """Take the run's folder over from whoever worked in it before; rank 0 only.

    Raises:
        UserError: another process works in it, or the mirror cannot be written to.
    """
    run.claim()
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
    """The run's own, or where its folder holds none the one on slower storage."""
    newest = checkpoint_folder.latest(run.checkpoints)
    newest = newest or (checkpoint_folder.latest(mirror) if mirror else None)
    if newest is None and comm.rank() == 0 and (there := checkpoint_folder.names(run.checkpoints)):
        say_warning(
            f"{run.checkpoints}/{LATEST} is missing: the run begins at step 0, beside "
            f"{', '.join(there)} (`diffembed rewind {run.root} {there[-1]}` continues from there)"
        )
    return newest


class RunCheckpoints:
    """Saves and restores an engine and its objective; all ranks call every method alike.

    Args:
        run: the run's folder.
        config: how many checkpoints stay, and where copies go.
        engine: whose weights and moments are saved.
        objective: whose state goes beside them.
        identity: what a resuming run must have in common (see `checkpoint.load`).
        evaluations: what scores whole checkpoints, if anything does.
    """

    def __init__(
        self,
        run: RunDir,
        config: CheckpointConfig,
        *,
        engine: ZeroEngine,
        objective: Objective,
        identity: dict[str, Any],
        evaluations: Evaluations | None,
    ) -> None:
        self._folder = run.checkpoints
        self._engine, self._objective, self._identity = engine, objective, identity
        self._evaluations = evaluations
        self._saver = Saver(run.checkpoints)
        self._keeper = Keeper(run.checkpoints, config)
        self._newest_step = 0  # of the newest checkpoint, whole or on its way

    @property
    def is_writing(self) -> bool:
        """Whether this rank has still something to write; differs between ranks."""
        return self._saver.is_writing

    def resume(self, path: Path) -> int:
        """Load a checkpoint; returns the next step."""
        step, extra = checkpoints.load(path, self._engine, self._identity)
        self._objective.load_state_dict(extra)
        self._newest_step = step
        if comm.rank() == 0 and path.parent == self._folder:
            self._follow_up(path, step)  # what follows may be what was interrupted
        return step

    def begin(self, step: int) -> None:
        """Start a checkpoint after `step` finished steps; training goes on while it is written."""
        self.finish()  # one at a time, or host memory would hold several
        self._saver.begin(
            self._engine, step=step, identity=self._identity, extra=self._objective.state_dict()
        )
        self._newest_step = step

    def finish(self) -> None:
        """Let the checkpoint on its way appear, if there is one, and see to what follows."""
        if not self._saver.is_pending:
            return
        path = self._saver.finish()
        if comm.rank() == 0:
            self._follow_up(path, self._newest_step)

    def save(self, step: int) -> Path:
        """Make sure that the state after `step` steps is on disk, the mirror's included."""
        if self._newest_step != step:
            self.begin(step)
        self.finish()
        if comm.rank() == 0:
            self._keeper.wait()
        return self._folder / checkpoint_name(step)

    def complete(self, step: int) -> Path:
        """As `save`, for the last step: also wait until its evaluation is begun."""
        path = self.save(step)
        if comm.rank() == 0 and self._evaluations:
            self._evaluations.finish()
        return path

    def _follow_up(self, path: Path, step: int) -> None:
        """What follows once a checkpoint is whole and `latest` names it; rank 0 only.

        Training waits for it: long work belongs in the background. Those who need the files of
        `path` for longer come first and keep links to them, because the keeper deletes.
        """
        if self._evaluations:
            self._evaluations.start(path, step)
        self._keeper.keep(path, step)
