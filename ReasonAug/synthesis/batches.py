"""Send calls through the batch API: upload, create, poll, download, and ask the rest again.

Calls gather until no item can continue without an answer, or a batch is full. A batch is written
down in ledger/batches.jsonl before it is created and again with its id, so that a killed run finds
it on the server and collects it instead of paying twice. Requests that expired are part of the next
batch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import openai

from pipeline.errors import Stopped, UserError, say_warning
from ReasonAug.synthesis.calls import Call, Halt, Secrets
from ReasonAug.synthesis.completions import (
    Tokens,
    body_of,
    estimate_tokens,
    outcome,
    read_reply,
)
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.ledger import BATCHES, Record
from ReasonAug.synthesis.limits import Budget, prices_of
from ReasonAug.synthesis.servers import make_client

_QUIET = 0.2  # seconds without another call, after which a batch is sent
_LABEL = "diffembed"  # the key of our metadata
_ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
_RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
_RETRIED = (408, 409, 429)


@dataclasses.dataclass(slots=True)
class _Waiting:
    """A call in a batch."""

    call: Call[Any]
    future: asyncio.Future[Record]
    tries: int = 0
    mode: str = ""  # in which it was asked last
    lost: Tokens = dataclasses.field(default_factory=Tokens)  # of empty answers


class BatchTransport:
    """Gather calls into batches."""

    def __init__(
        self, config: SynthesisConfig, secrets: Secrets, budget: Budget, halt: Halt, folder: Path
    ) -> None:
        self._config, self._secrets, self._budget, self._halt = config, secrets, budget, halt
        self._server = config.model.servers[0]
        self._client = make_client(self._server, config.limits.timeout)
        structured = config.model.structured
        self._mode = "schema" if structured == "auto" else structured
        self._may_fall_back = structured == "auto"
        self._book = _Book(folder / f"{BATCHES}.jsonl")
        self._pending: dict[str, _Waiting] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._elsewhere: dict[str, str] | None = None  # key -> batch of an earlier start
        self._adopting = asyncio.Lock()

    async def send(self, call: Call[Any]) -> Record:
        """Return the outcome of a call, once its batch has ended."""
        prices = prices_of(self._config, call.model, "batch")
        prompt = estimate_tokens(call)
        most, cost = prompt + call.max_tokens, prices.cost(prompt, call.max_tokens)
        await self._budget.reserve(most, cost)
        used, paid = 0, 0.0
        try:
            future: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
            self._add(call.key(), _Waiting(call, future))
            record = await future
            used = record.prompt_tokens + record.completion_tokens
            paid = prices.cost(record.prompt_tokens, record.completion_tokens)
            return record
        finally:
            await self._budget.settle(most, cost, used=used, paid=paid)

    async def close(self) -> None:
        """Close all connections."""
        if self._timer:
            self._timer.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    def _add(self, key: str, waiting: _Waiting) -> None:
        self._pending[key] = waiting
        if self._timer:
            self._timer.cancel()
        quiet = 0.0 if len(self._pending) >= self._config.batch.max_requests else _QUIET
        self._timer = asyncio.get_running_loop().call_later(quiet, self._flush)

    def _flush(self) -> None:
        calls, self._pending = self._pending, {}
        if calls:
            task = asyncio.get_running_loop().create_task(self._handle(calls))
            self._tasks.add(task)  # asyncio itself holds tasks weakly
            task.add_done_callback(self._tasks.discard)

    async def _handle(self, calls: dict[str, _Waiting]) -> None:
        """Follow the batches of these calls to their end; their futures receive any error."""
        try:
            async with self._adopting:
                if self._elsewhere is None:
                    self._elsewhere = await self._find_earlier()
            groups: dict[str, dict[str, _Waiting]] = {}
            for key, waiting in calls.items():
                groups.setdefault(self._elsewhere.pop(key, ""), {})[key] = waiting
            new = groups.pop("", {})
            following = [self._adopt(batch, group) for batch, group in groups.items()]
            if new:
                following.append(self._follow(await self._create(new), new))
            await asyncio.gather(*following)
        except Exception as error:
            explained = self._explain(error)
            for waiting in calls.values():
                if not waiting.future.done():
                    waiting.future.set_exception(explained)

    def _explain(self, error: Exception) -> Exception:
        """Return an error of the client as one of ours, without keys or tracebacks in it."""
        if not isinstance(error, openai.APIError):
            return error
        said = self._secrets.redact(str(error.message))[:300]
        if isinstance(error, openai.APIStatusError) and error.status_code in (400, 401, 403, 404):
            return UserError(
                f"{self._server.url}: HTTP {error.status_code}: {said}",
                fix="check the server's url and api_key_env, and that it has a batch API",
            )
        return Stopped(f"{self._server.url}: {said} | fix: run the same command again later")

    # --- the server --------------------------------------------------------------------------

    async def _create(self, calls: Mapping[str, _Waiting]) -> str:
        """Upload the calls and start their batch; return its id."""
        lines = [
            {
                "custom_id": key,
                "method": "POST",
                "url": _ENDPOINT,
                "body": body_of(waiting.call, self._mode),
            }
            for key, waiting in calls.items()
        ]
        for waiting in calls.values():
            waiting.mode = self._mode
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        # With the time, because the same calls may be sent again after they expired.
        label = hashlib.sha256(content + str(time.time_ns()).encode()).hexdigest()[:32]
        self._book.write({"label": label, "keys": list(calls)})
        file = await self._patiently(
            lambda: self._client.files.create(file=(f"{label}.jsonl", content), purpose="batch")
        )
        window: Any = self._config.batch.window
        batch = await self._patiently(
            lambda: self._client.batches.create(
                input_file_id=file.id,
                endpoint=_ENDPOINT,
                completion_window=window,
                metadata={_LABEL: label},
            )
        )
        self._book.write({"label": label, "batch": batch.id})
        return str(batch.id)

    async def _patiently(self, ask: Any) -> Any:
        """Ask until the server answers, or for as long as the patience lasts."""
        began = time.monotonic()
        wait = 1.0
        while True:
            try:
                return await ask()
            except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError):
                if time.monotonic() - began > self._config.limits.patience:
                    raise
                await self._sleep(min(wait, self._config.batch.poll))
                wait *= 2

    async def _sleep(self, seconds: float) -> None:
        """Sleep in pieces, to notice that the run is to end."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._halt.check()
            await asyncio.sleep(min(left, 0.5))
        self._halt.check()

    async def _adopt(self, batch_id: str, calls: dict[str, _Waiting]) -> None:
        """Follow a batch of an earlier start; ask its calls again if this server lacks it."""
        try:
            await self._follow(batch_id, calls)
        except openai.NotFoundError:
            say_warning(
                f"{self._server.url} has no batch {batch_id}, which an earlier start created; its "
                f"{len(calls):,} calls are asked again"
            )
            await self._follow(await self._create(calls), calls)

    async def _follow(self, batch_id: str, calls: dict[str, _Waiting]) -> None:
        """Wait for the end of a batch, and hand out its answers; what lacks one is asked again."""
        while True:
            batch = await self._patiently(lambda: self._client.batches.retrieve(batch_id))
            if batch.status not in _RUNNING:
                break
            await self._sleep(self._config.batch.poll)
        if batch.status == "failed":
            errors = (batch.errors and batch.errors.data) or []
            faults = "; ".join(error.message or "" for error in errors)[:300] or "without a reason"
            raise UserError(
                f"{self._server.url}: batch {batch_id} was refused: {self._secrets.redact(faults)}",
                fix="lower batch.max_requests, or mend what the server names",
            )
        found: dict[str, dict[str, Any]] = {}
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                found |= await self._download(file)
        if any((line.get("response") or {}).get("status_code") == 200 for line in found.values()):
            self._may_fall_back = False  # this server works, in this mode
        missing = 0
        for key, waiting in calls.items():
            record = self._record(waiting, found.get(key))
            if record is not None:
                waiting.future.set_result(record)
                continue
            missing += 1
            waiting.tries += 1
            self._add(key, waiting)
        if missing:
            say_warning(
                f"batch {batch_id} ended ({batch.status}) without {missing:,} of {len(calls):,} "
                "answers, which are asked again"
            )

    async def _download(self, file: str) -> dict[str, dict[str, Any]]:
        """Return the lines of a result file by their keys; damaged lines are left out."""
        content = await self._patiently(lambda: self._client.files.content(file))
        found = {}
        for line in content.text.split("\n"):
            try:
                tree = json.loads(line)
                found[tree["custom_id"]] = tree
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def _record(self, waiting: _Waiting, line: dict[str, Any] | None) -> Record | None:
        """Return the record of one line of results; None if the call must be asked again."""
        call, last = waiting.call, waiting.tries + 1 >= self._config.batch.attempts
        attempts = waiting.tries + 1
        reason = "expired"
        if line is not None:
            response = line.get("response") or {}
            status = response.get("status_code")
            if status == 200:
                try:
                    reply = read_reply(response.get("body"))
                except ValueError as error:
                    reason = f"not a chat completion: {error}"
                else:
                    if not reply.is_empty:
                        more: dict[str, Any] = {"origin": "batch", "attempts": attempts}
                        return outcome(call, reply, self._secrets, lost=waiting.lost, **more)
                    waiting.lost += reply.tokens(call)
                    reason = "an empty answer"
            else:
                said = line.get("error") or (response.get("body") or {}).get("error") or {}
                code, message = said.get("code"), said.get("message", "")
                reason = f"HTTP {status}: {code}: {message}"[:500]
                rejected = status in (400, 413, 422)
                if rejected:
                    last = last or not self._fell_back(waiting)
                elif isinstance(status, int) and 400 < status < 500:
                    last = last or status not in _RETRIED
        if last:
            return call.record(
                status="failed",
                reason=self._secrets.redact(reason),
                origin="batch",
                attempts=attempts,
                prompt_tokens=waiting.lost.prompt,
                completion_tokens=waiting.lost.completion,
            )
        return None

    def _fell_back(self, waiting: _Waiting) -> bool:
        """Ask for less structure if a server refuses the schema; return False if it cannot help."""
        # A batch of an earlier start may have asked for the schema.
        if (waiting.mode or "schema") != self._mode:
            return True  # another call has fallen back already
        if not self._may_fall_back or self._mode == "none":
            return False
        say_warning(f"{self._server.url} refuses a JSON schema; asked without one from now on")
        self._mode = "none"
        return True

    # --- batches of an earlier start ---------------------------------------------------------

    async def _find_earlier(self) -> dict[str, str]:
        """Return the batch of each key that was handed to the server before."""
        written = self._book.read()
        labels = {entry["label"]: entry["keys"] for entry in written if "keys" in entry}
        batches = {entry["label"]: entry["batch"] for entry in written if "batch" in entry}
        if labels.keys() - batches.keys():
            # Killed after the batch was created and before its id was written down.
            async for batch in self._client.batches.list(limit=100):
                label = (batch.metadata or {}).get(_LABEL)
                if label in labels:
                    batches.setdefault(label, batch.id)
        return {key: batches[label] for label, keys in labels.items() if label in batches
                for key in keys}  # fmt: skip


class _Book:
    """The batches that were handed to the server, in an append-only file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an entry and wait until it is on the disk."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> Sequence[dict[str, Any]]:
        """Return all entries; a killed writer may have left half a line."""
        if not self._path.exists():
            return []
        entries = []
        for line in self._path.read_text().split("\n"):
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries
