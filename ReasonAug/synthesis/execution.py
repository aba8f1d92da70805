"""Run programs in the sandbox, each once: the outcome is recorded in the ledger."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Sequence

from ReasonAug.sandbox import Limits, require_sandbox, run_program
from ReasonAug.synthesis.calls import Halt, NotAskedError
from ReasonAug.synthesis.ledger import SANDBOX, Ledger, call_key
from ReasonAug.synthesis.solutions import STAGE, harness, outcome_record, read_outcome


class RecordedExecution:
    """Runs programs, as many at a time as there are cores, and remembers their outcomes.

    Args:
        ledger: where outcomes are recorded.
        halt: nothing more is started once it is set.
        limits: of one program.
        dry_run: run nothing.
    """

    def __init__(self, ledger: Ledger, halt: Halt, *, limits: Limits, dry_run: bool) -> None:
        self._ledger, self._halt, self._limits, self._dry_run = ledger, halt, limits, dry_run
        self._places = asyncio.Semaphore(len(os.sched_getaffinity(0)))
        # A program that met a limit is run again under another one.
        self._parameters = {} if limits == Limits() else dataclasses.asdict(limits)

    def require(self) -> None:
        """Check that programs can be run here.

        Raises:
            UserError: this machine has no sandbox.
        """
        require_sandbox()

    async def passed(self, item: str, program: str, tests: Sequence[str]) -> list[bool] | None:
        """Return which tests a program passes; None if it did not get as far as to say so."""
        if not program:
            return None
        source, mark = harness(program, tests)
        values = {"program": program, "tests": list(tests)}
        key = call_key(model=SANDBOX, version="1", parameters=self._parameters, values=values)
        found = self._ledger.stage(STAGE).find(key)
        if found is not None:
            outcome: list[bool] | None = json.loads(found.answer)
            return outcome
        if self._dry_run:
            raise NotAskedError
        async with self._places:
            self._halt.check()
            began = time.monotonic()
            ended = await asyncio.to_thread(run_program, source, limits=self._limits)
        outcome = read_outcome(ended.stdout, mark, len(tests))
        seconds = time.monotonic() - began
        self._ledger.stage(STAGE).append(outcome_record(item, key, outcome, seconds))
        return outcome
