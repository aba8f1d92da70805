"""Record every call once: append-only JSON lines, safe against a kill at any moment.

An answer is appended with one `write` as soon as it is complete, so a killed process loses only
the requests that were in flight. Lines are synced to the disk every second and at the end of each
stage, so a power failure costs at most the answers of a second. A killed writer may leave half a
last line, which is cut off when the ledger is opened again. Of two records with one key the later
counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError, say_warning
from pipeline.files import check_kind, parse_json, sign_lock, try_lock

_SYNC_SECONDS = 1.0
SANDBOX = "sandbox"  # the model of a record that holds the outcome of a program
PROGRAM = "run"  # its prompt
CUT_OFF = "cut off at model.max_tokens"  # the reason of a record whose answer ends there
BATCHES = "batches"  # batches handed to a server; no records
_DAMAGED = "restore the file, or delete the line: its call is asked again"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One call and its outcome.

    Args:
        key: hash of model, prompt version, parameters and input.
        item: id of the item that asked.
        prompt: name and version, as NAME@VERSION.
        answer: text, as the model wrote it; empty for a failure.
        reason: of a failure; or that an answer is cut off.
        attempts: requests that it took.
        seconds: from the first request to the answer.
    """

    key: str
    item: str
    status: Literal["ok", "failed"]
    model: str
    prompt: str
    parameters: dict[str, Any]
    answer: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1
    seconds: float = 0.0
    origin: Literal["live", "batch", "import"] = "live"

    @property
    def is_cut(self) -> bool:
        """True if the answer ends at the token limit."""
        return self.reason == CUT_OFF

    def asked_with(self) -> tuple[str, str, str]:
        """Return what an answer depends on in addition to its input."""
        return self.model, self.prompt, json.dumps(self.parameters, sort_keys=True)


def call_key(
    *, model: str, version: str, parameters: Mapping[str, Any], values: Mapping[str, Any]
) -> str:
    """Return the key of a call: the same for the same question to the same model."""
    text = json.dumps([model, version, parameters, values], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of one stage's file, in order; half a last line is left out.

    Raises:
        UserError: a line is damaged; the message names it.
    """
    for _, _, record in _read_lines(path):
        yield record


def _read_lines(path: Path) -> Iterator[tuple[int, int, Record]]:
    """Yield (offset of the line, its size, record)."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield offset, len(line), _parse(line, f"{path}:{number}")
            offset += len(line)


def _parse(line: bytes, where: str) -> Record:
    try:
        record = Record(**json.loads(line))
        bytes.fromhex(record.key)
    except (ValueError, TypeError):
        # Slowly, for a message that names the fault.
        tree = parse_json(line.decode(errors="replace"), where=where, fix=_DAMAGED)
        check_kind(tree, Record, where=where, fix=_DAMAGED)
        raise UserError(f"{where}: damaged", fix=_DAMAGED) from None
    return record


@dataclasses.dataclass(slots=True)
class Usage:
    """Calls and tokens of one model over one way of asking."""

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, record: Record) -> None:
        """Count one more record."""
        self.calls += 1
        self.failed += record.status == "failed"
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens


class StageLedger:
    """The records of one stage: found by key, read from disk when needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        # Places in the file instead of records: a large ledger does not fit into memory.
        self._places: dict[bytes, tuple[int, int]] = {}
        self.asked_with: Counter[tuple[str, str, str]] = Counter()
        # By (model, origin, name of the prompt).
        self.usage: dict[tuple[str, str, str], Usage] = {}
        self._end = 0
        for offset, size, record in _read_lines(path):
            self._note(record, offset, size)
        if left := path.stat().st_size - self._end:
            say_warning(f"{path}: half an answer at its end ({left} bytes) is cut off")
            os.ftruncate(self._descriptor, self._end)
        self._synced = time.monotonic()
        self._is_synced = True

    def _note(self, record: Record, offset: int, size: int) -> None:
        self._places[bytes.fromhex(record.key)] = (offset, size)
        self.asked_with[record.asked_with()] += 1
        name = record.prompt.partition("@")[0]
        self.usage.setdefault((record.model, record.origin, name), Usage()).add(record)
        self._end = offset + size

    def num_answers(self) -> int:
        """Count the recorded calls; programs that were run are none."""
        return sum(used.calls for (model, _, _), used in self.usage.items() if model != SANDBOX)

    def find(self, key: str) -> Record | None:
        """Return the latest record of a key."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        offset, size = place
        return _parse(os.pread(self._descriptor, size, offset), f"{self._path}, byte {offset}")

    def append(self, record: Record) -> None:
        """Write a record, whole or not at all."""
        tree = {slot: getattr(record, slot) for slot in Record.__slots__}
        line = (json.dumps(tree, ensure_ascii=False) + "\n").encode()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            # A full disk takes part of a line; the next one must not be glued to it.
            os.ftruncate(self._descriptor, self._end)
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from None
        self._note(record, self._end, len(line))
        self._is_synced = False
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        if not self._is_synced:
            os.fsync(self._descriptor)
        self._synced, self._is_synced = time.monotonic(), True

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        os.close(self._descriptor)


class Ledger:
    """All stages' records of one output folder, locked against another run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages: dict[str, StageLedger] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[Ledger]:
        """Yield the ledger of a folder, which is made if missing, under its lock.

        Raises:
            UserError: another process holds it, or a line is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a+") as lock:
            if not try_lock(lock):
                lock.seek(0)
                raise UserError(
                    f"{folder}: in use by {lock.read().strip() or 'another run'}",
                    fix="wait until it ends, or use another output_dir",
                )
            sign_lock(lock)
            ledger = cls(folder)
            try:
                for path in sorted(folder.glob("*.jsonl")):
                    if path.stem != BATCHES:
                        ledger.stage(path.stem)
                yield ledger
            finally:
                for stage in ledger._stages.values():
                    stage.close()

    def stage(self, name: str) -> StageLedger:
        """Return the records of one stage."""
        if name not in self._stages:
            self._stages[name] = StageLedger(self.folder / f"{name}.jsonl")
        return self._stages[name]

    def usage(self) -> dict[str, dict[tuple[str, str, str], Usage]]:
        """Return what every stage has used, by (model, origin, prompt)."""
        return {name: stage.usage for name, stage in self._stages.items()}

    def has_answers(self) -> bool:
        """Return True if a server has answered any call."""
        return any(
            used.calls > used.failed
            for stage in self._stages.values()
            for (_, origin, name), used in stage.usage.items()
            if origin != "import" and name != PROGRAM
        )

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each stage's file."""
        return {name: (self.folder / f"{name}.jsonl").stat().st_size for name in self._stages}
