"""Ask each question once: look it up in the ledger, or send it and record the answer."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

from pipeline.errors import Stopped, UserError, say_warning
from ReasonAug.synthesis.answers import UnreadableError, json_schema, read_answer
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.ledger import CUT_OFF, Ledger, Record, StageLedger, call_key
from ReasonAug.synthesis.prompts import Prompt, Prompts

T = TypeVar("T")
Item = dict[str, Any]

# The prompts that write; all others are checks, by the judge and at its temperature.
_WRITING = frozenset(("propose", "definition", "problem", "rewrite", "negative", "forum", "exam"))
_REFUSED = "refused: "
IMPORTED = "import"
# Calls that failed from the start, or answers cut off: after so many no other will do better.
MAX_FAILED = 5
# A key of fewer characters may be a word, such as EMPTY, that texts hold by chance.
_SHORTEST_KEY = 16


# The prompts that the current item has asked, for plans.
asked_prompts: ContextVar[list[str] | None] = ContextVar("asked_prompts", default=None)


class Halt:
    """The reason to send nothing more, once there is one; requests in flight are finished."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def set(self, error: Exception) -> None:
        """Halt, unless another reason came first."""
        self.error = self.error or error

    def check(self) -> None:
        """Raise the reason, if there is one."""
        if self.error is not None:
            raise self.error


class NotAskedError(Exception):
    """A dry run has found a call that the ledger does not answer."""


class Unanswered(Exception):  # noqa: N818 -- an outcome, not a fault
    """A call has no usable answer; `reason` is the word for `dropped`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[T]):
    """One question to a model."""

    item: str
    prompt: Prompt
    values: Mapping[str, str]
    answer: type[T]
    model: str
    temperature: float
    max_tokens: int
    structured: str
    token_limit_key: str = "max_tokens"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def parameters(self) -> dict[str, Any]:
        """Return what is part of the key in addition to model, prompt and values."""
        return {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
            **({"extra": dict(self.extra)} if self.extra else {}),
        }

    def key(self) -> str:
        """Return the key under which the answer is recorded."""
        return call_key(
            model=self.model,
            version=self.prompt.version,
            parameters=self.parameters(),
            values=self.values,
        )

    def messages(self) -> list[dict[str, str]]:
        """Return the messages to send."""
        return self.prompt.messages(self.values)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the answer."""
        return json_schema(self.answer)

    def record(self, **outcome: Any) -> Record:
        """Return the record of this call with its outcome."""
        return Record(
            key=self.key(),
            item=self.item,
            model=self.model,
            prompt=self.prompt.label,
            parameters=self.parameters(),
            **outcome,
        )


def imported_key(stage: str, item: str) -> str:
    """Return the key of an answer that was imported: it belongs to an item, not to a prompt."""
    return call_key(model=IMPORTED, version=stage, parameters={}, values={"item": item})


class Transport(Protocol):
    """A way to get a question answered."""

    async def send(self, call: Call[Any]) -> Record:
        """Return the outcome; a call that fails for good is a record, too.

        Raises:
            Stopped: the run must end here, for example at its budget.
            UserError: no call can succeed, for example without a valid key.
        """


class Secrets:
    """The keys of all servers, which must not appear in anything that is written."""

    def __init__(self, config: SynthesisConfig) -> None:
        names = {server.api_key_env for server in config.model.servers if server.api_key_env}
        found = (os.environ.get(name, "").strip() for name in names)
        self._keys = sorted((key for key in found if key), key=len, reverse=True)

    def redact(self, text: str) -> str:
        """Return a message with every key in it blacked out; a short one where it stands alone."""
        for key in self._keys:
            if len(key) >= _SHORTEST_KEY:
                text = text.replace(key, "[api key]")
            elif key in text:
                text = re.sub(rf"(?<!\w){re.escape(key)}(?!\w)", "[api key]", text)
        return text

    def redact_answer(self, text: str) -> str:
        """Return an answer with every key in it blacked out, except keys that may be words."""
        for key in self._keys:
            if len(key) >= _SHORTEST_KEY and key in text:
                text = text.replace(key, "[api key]")
        return text


class Calls:
    """Questions of one stage, each asked once."""

    def __init__(
        self,
        config: SynthesisConfig,
        prompts: Prompts,
        ledger: Ledger,
        transport: Transport,
        halt: Halt,
        *,
        retry_failed: bool = False,
    ) -> None:
        self._config, self._prompts, self._ledger = config, prompts, ledger
        self._transport, self._halt = transport, halt
        self._retry_failed = retry_failed
        self._in_flight: dict[str, asyncio.Future[Record]] = {}
        self.recorded = 0  # answers that were in the ledger
        self.sent = 0
        self._sent_in_stage = self._cut_in_stage = 0
        self._failures: Counter[str] = Counter()  # by reason, since they were last said
        # Failures before the first answer of all: if it never comes, the config is at fault and not
        # the calls, which must be asked again.
        self._held: list[tuple[StageLedger, Record]] | None = None if ledger.has_answers() else []

    async def ask(
        self,
        stage: str,
        name: str,
        answer: type[T],
        *,
        item: str,
        kind: str = "",
        **values: str,
    ) -> T:
        """Return the answer to a prompt.

        Raises:
            Unanswered: the call failed for good, or its answer is unreadable even after a repair.
            Stopped: nothing more is sent.
        """
        call = self._call(self._prompts.get(name, kind), answer, item, values)
        record = await self._answered(stage, call)
        try:
            return read_answer(answer, record.answer, is_cut=record.is_cut)
        except UnreadableError as error:
            if record.is_cut:
                # A repair could only invent the end.
                raise Unanswered("cut_off") from None
            keys = ", ".join(f'"{field}"' for field in call.schema()["properties"])
            repair = {"keys": keys, "reason": str(error), "text": record.answer}
        record = await self._answered(
            stage, self._call(self._prompts.get("repair"), answer, item, repair)
        )
        try:
            return read_answer(answer, record.answer, is_cut=record.is_cut)
        except UnreadableError:
            raise Unanswered("unreadable") from None

    async def ask_about(
        self, stage: str, name: str, answer: type[T], item: Item, *fields: str, **more: str
    ) -> T:
        """Return the answer to a prompt about an item: `fields` of it, and more values."""
        values = {field: item[field] for field in fields} | more
        return await self.ask(stage, name, answer, item=item["id"], kind=item["kind"], **values)

    def imported(self, stage: str, item: str) -> str | None:
        """Return an answer that was imported for an item, if there is one."""
        record = self._ledger.stage(stage).find(imported_key(stage, item))
        return record.answer if record else None

    def _call(
        self, prompt: Prompt, answer: type[T], item: str, values: Mapping[str, str]
    ) -> Call[T]:
        model = self._config.model
        writes = prompt.name in _WRITING
        return Call(
            item=item,
            prompt=prompt,
            values=values,
            answer=answer,
            model=model.name if writes else model.judge or model.name,
            # A second solution must be able to differ from the first.
            temperature=model.temperature
            if writes or prompt.name.startswith("solve")
            else model.judge_temperature,
            max_tokens=model.max_tokens,
            structured=model.structured,
            token_limit_key=model.token_limit_key,
            extra=model.extra,
        )

    def end_stage(self, stage: str) -> None:
        """Say which calls have failed, and why.

        Raises:
            UserError: all calls so far have failed; none of them is recorded.
        """
        self._sent_in_stage = self._cut_in_stage = 0
        if not self._failures:
            return
        (reason, _), count = self._failures.most_common(1)[0], self._failures.total()
        if self._held and len(self._held) >= MAX_FAILED:
            raise UserError(
                f"{stage}: all {count:,} calls failed: {reason}",
                fix="check the server's url, the name of the model, model.token_limit_key and "
                "model.extra",
            )
        cure = "raise model.max_tokens" if reason == CUT_OFF else "--retry-failed asks them again"
        say_warning(
            f"{stage}: {count:,} calls failed or were cut off, most often: {reason} | "
            f"fix: {cure}; {self._ledger.folder / stage}.jsonl has each"
        )
        self._failures.clear()

    def end(self) -> None:
        """Record the failures of a run without any answer, which are few."""
        for ledger, record in self._held or ():
            ledger.append(record)
        self._held = None

    async def _answered(self, stage: str, call: Call[Any]) -> Record:
        record = await self._record(self._ledger.stage(stage), call)
        if record.status == "ok":
            return record
        if record.is_cut:
            raise Unanswered("cut_off")
        raise Unanswered("refused" if record.reason.startswith(_REFUSED) else "unanswered")

    def _keep(self, ledger: StageLedger, record: Record) -> None:
        """Record an outcome.

        Raises:
            UserError: all answers of this stage were cut off so far.
        """
        self.sent += 1
        self._sent_in_stage += 1
        failed = record.status == "failed"
        if failed or record.is_cut:
            self._failures[record.reason] += 1
        is_answer = not failed or record.is_cut or record.reason.startswith(_REFUSED)
        if self._held is not None and not is_answer:
            self._held.append((ledger, record))
            return
        self.end()
        ledger.append(record)
        self._cut_in_stage += record.is_cut
        if self._cut_in_stage == self._sent_in_stage == MAX_FAILED:
            raise UserError(
                f"the first {MAX_FAILED} answers of a stage are cut off at model.max_tokens="
                f"{self._config.model.max_tokens}",
                fix="raise it: a model that reasons spends it before it answers",
            )

    async def _record(self, ledger: StageLedger, call: Call[Any]) -> Record:
        if (asked := asked_prompts.get()) is not None:
            asked.append(call.prompt.name)
        key = call.key()
        found = ledger.find(key)
        if found is not None and not (self._retry_failed and found.status == "failed"):
            self.recorded += 1
            return found
        # Two items may ask the same question.
        if (pending := self._in_flight.get(key)) is not None:
            return await asyncio.shield(pending)
        self._halt.check()
        future: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = future
        try:
            record = await self._transport.send(call)
            self._keep(ledger, record)
            future.set_result(record)
            return record
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # read, because mostly no other item waits for it
            if isinstance(error, Exception) and not isinstance(error, NotAskedError):
                self._halt.set(error)
            raise
        finally:
            del self._in_flight[key]


def refused(reason: str) -> str:
    """Return the reason of a record whose model declined to answer."""
    return _REFUSED + reason


class Interrupted(Stopped):
    """A signal asked the run to end."""
