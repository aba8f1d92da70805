"""Send calls to OpenAI-compatible servers, and live with all that such servers do.

    fault                                      outcome
    429                                        the server rests, by Retry-After if it is sent
    5xx, 408, 409, reset, half or foreign body another try, after a wait that doubles
    no connection                              the server is left out for a while, others take over
    400, 413, 422                              a recorded failure; the first 400 to a schema makes
                                               the server ask without one
    401, 404, 403 before any answer,           the run ends: every call would fail
    or 400 to the first five requests

A body is read in pieces, under a limit of time and size, because some servers never end one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import openai
import tenacity

from pipeline.errors import Stopped, UserError, say_warning
from ReasonAug.synthesis.calls import Call, Halt, Secrets, refused
from ReasonAug.synthesis.config import ServerConfig, SynthesisConfig
from ReasonAug.synthesis.ledger import Record
from ReasonAug.synthesis.limits import Budget, Rate, prices_of

_MAX_BODY = 8 * 2**20  # bytes of a response
_LONGEST_REST = 60.0  # seconds that a server is left out, unless it asks for more
_LONGEST_RETRY_AFTER = 3600.0
_FATAL = (401, 403, 404)
_REJECTED = (400, 413, 422)
_MAX_REJECTED = 5  # requests in a row from the start, after which no other will do better
_MODES = ("schema", "object", "none")
_CHARACTERS_PER_TOKEN = 3  # fewer than usual, so that a budget is not passed


class _FaultError(Exception):
    """Something that another try may cure.

    Args:
        counts: it is one of the tries that a request has.
    """

    def __init__(self, reason: str, *, counts: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.counts = reason, counts


class _RejectedError(Exception):
    """The server will not answer this request."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """The content of a chat completion."""

    text: str
    refusal: str
    prompt_tokens: int
    completion_tokens: int


def read_reply(tree: Any) -> Reply:
    """Return the content of a chat completion.

    Raises:
        ValueError: it has no choice, or is none.
    """
    try:
        choice = tree["choices"][0]
        message = choice["message"]
        usage = tree.get("usage") or {}
        text = message.get("content")
        if text is not None and not isinstance(text, str):
            raise ValueError("its content is no text")
        refusal = message.get("refusal") or ""
        if choice.get("finish_reason") == "content_filter":
            refusal = refusal or "content filter"
        prompt_tokens = int(usage.get("prompt_tokens") or 0)
        completion_tokens = int(usage.get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer in it ({type(error).__name__}: {error})") from None
    if not text and not refusal:
        raise ValueError("an empty answer")
    return Reply(text or "", str(refusal), prompt_tokens, completion_tokens)


def outcome(call: Call[Any], reply: Reply, secrets: Secrets, **more: Any) -> Record:
    """Return the record of a call that was answered or refused."""
    if reply.refusal:
        more |= {"status": "failed", "reason": refused(secrets.redact(reply.refusal)[:300])}
    else:
        more |= {"status": "ok", "answer": secrets.redact(reply.text)}
    return call.record(
        prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens, **more
    )


def body_of(call: Call[Any], mode: str) -> dict[str, Any]:
    """Return the body of a request for a chat completion."""
    body: dict[str, Any] = {
        "model": call.model,
        "messages": call.messages(),
        "temperature": call.temperature,
        call.token_limit_key: call.max_tokens,
        **call.extra,
    }
    body = {name: value for name, value in body.items() if value is not None}
    if mode == "schema":
        schema = {"name": call.answer.__name__, "strict": True, "schema": call.schema()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif mode == "object":
        body["response_format"] = {"type": "json_object"}
    return body


def make_client(server: ServerConfig, timeout: float) -> openai.AsyncOpenAI:
    """Return the client of a server, with its key from the environment.

    Raises:
        UserError: the variable is not set.
    """
    key = "none"  # the client insists on one
    if server.api_key_env is not None:
        key = os.environ.get(server.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"environment variable {server.api_key_env} is not set",
                allowed=f"the key of {server.url}",
                fix="set it, or write api_key_env: null for a server without keys",
            )
        if not key.isascii() or not key.isprintable():
            raise UserError(f"environment variable {server.api_key_env}: not a key")
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=server.url,
        timeout=timeout,
        max_retries=0,
        # Half the CPU time of the default, whose pool goes through all connections each time.
        http_client=openai.DefaultAioHttpClient(),
    )


class Server:
    """One server, and how it has behaved."""

    def __init__(self, config: ServerConfig, *, timeout: float, structured: str) -> None:
        self.url = config.url
        self.client = make_client(config, timeout)
        self.ready_at = 0.0
        self.faults = 0  # in a row
        self.answers = 0
        self._mode = 0 if structured == "auto" else _MODES.index(structured)
        self._may_fall_back = structured == "auto"

    @property
    def mode(self) -> str:
        """The way in which this server is asked for structure."""
        return _MODES[self._mode]

    def fall_back(self, mode: str) -> bool:
        """Ask for less structure after a refusal of `mode`; return False if that cannot help."""
        if self.mode != mode:
            return True  # another request has fallen back already
        if not self._may_fall_back or self._mode + 1 == len(_MODES):
            return False
        self._mode += 1
        say_warning(f"{self.url} refuses response_format {mode}; asked for {self.mode} from now on")
        return True

    def answered(self) -> None:
        """Note an answer: this server works, in this mode."""
        self.answers += 1
        self.faults = 0
        self._may_fall_back = False

    def rest(self, seconds: float | None = None) -> None:
        """Leave the server out, for longer after each fault in a row."""
        now = time.monotonic()
        # Requests in flight fail together; they are one fault of the server.
        if self.ready_at <= now:
            self.faults += 1
        if seconds is None:
            seconds = min(_LONGEST_REST, 0.25 * 2 ** min(self.faults, 10))
        self.ready_at = max(self.ready_at, now + seconds)


class Pool:
    """Several servers behind one run, in turn; one that does not answer is left out and retried."""

    def __init__(self, servers: Sequence[Server], halt: Halt, *, patience: float) -> None:
        self.servers, self._halt, self._patience = servers, halt, patience
        self._next = 0
        self.last_sign = time.monotonic()  # of life, of any server
        self.last_answer = 0.0

    async def pick(self) -> Server:
        """Return the next server that is not resting; wait for one if all are.

        Raises:
            Stopped: no server has answered for longer than the patience.
        """
        while True:
            self._halt.check()
            now = time.monotonic()
            for _ in self.servers:
                server = self.servers[self._next]
                self._next = (self._next + 1) % len(self.servers)
                if server.ready_at <= now:
                    return server
            soonest = min(server.ready_at for server in self.servers)
            if now - self.last_sign > self._patience:
                urls = ", ".join(server.url for server in self.servers)
                raise Stopped(
                    f"no answer from {urls} for {now - self.last_sign:.0f} s | "
                    "fix: start the server and run the same command again"
                )
            await asyncio.sleep(min(soonest - now, 1.0) + 0.001)

    def answered(self, server: Server) -> None:
        """Note an answer of any kind."""
        server.answered()
        self.last_sign = self.last_answer = time.monotonic()

    @property
    def has_answered(self) -> bool:
        """True once any server has answered a call."""
        return any(server.answers for server in self.servers)


class LiveTransport:
    """Send calls one by one, so many at a time."""

    def __init__(
        self, config: SynthesisConfig, secrets: Secrets, budget: Budget, halt: Halt
    ) -> None:
        limits = config.limits
        self._config, self._secrets, self._budget = config, secrets, budget
        self._pool = Pool(
            [
                Server(server, timeout=limits.timeout, structured=config.model.structured)
                for server in config.model.servers
            ],
            halt,
            patience=limits.patience,
        )
        self._places = asyncio.Semaphore(limits.concurrency)
        self._rejected = 0
        self._requests = Rate(limits.requests_per_minute)
        self._tokens = Rate(limits.tokens_per_minute)

    async def send(self, call: Call[Any]) -> Record:
        """Return the outcome of a call, after as many tries as it takes."""
        async with self._places:
            prices = prices_of(self._config, call.model, "live")
            prompt = estimate_tokens(call)
            most = prompt + call.max_tokens
            cost = prices.cost(prompt, call.max_tokens)
            await self._budget.reserve(most, cost)
            used, paid = 0, 0.0
            try:
                record = await self._try(call, most)
                used = record.prompt_tokens + record.completion_tokens
                paid = prices.cost(record.prompt_tokens, record.completion_tokens)
                return record
            finally:
                await self._budget.settle(most, cost, used=used, paid=paid)

    async def close(self) -> None:
        """Close all connections."""
        for server in self._pool.servers:
            await server.client.close()

    async def _try(self, call: Call[Any], most_tokens: int) -> Record:
        began = time.monotonic()
        tries = 0
        counted = 0

        def is_over(state: tenacity.RetryCallState) -> bool:
            nonlocal counted
            fault = state.outcome.exception() if state.outcome else None
            counted += isinstance(fault, _FaultError) and fault.counts
            return counted >= self._config.limits.attempts or (
                # Servers work for others, but have sent this request away all the time.
                time.monotonic() - began > self._config.limits.patience
            )

        async def once() -> Record:
            nonlocal tries
            tries += 1
            await self._requests.take(1)
            await self._tokens.take(most_tokens)
            reply = await self._request(call)
            self._tokens.correct(reply.prompt_tokens + reply.completion_tokens - most_tokens)
            seconds = round(time.monotonic() - began, 3)
            return outcome(call, reply, self._secrets, attempts=tries, seconds=seconds)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_FaultError),
            wait=_wait,
            stop=is_over,
            reraise=True,
        )
        try:
            return await retrying(once)
        except (_FaultError, _RejectedError) as error:
            reason = self._secrets.redact(str(error))[:500]
            waited = time.monotonic() - began
            if waited > self._config.limits.patience and self._pool.last_answer < began:
                raise Stopped(
                    f"no answer from any server for {waited:.0f} s ({reason}) | "
                    "fix: run the same command again later"
                ) from None
            seconds = round(waited, 3)
            return call.record(status="failed", reason=reason, attempts=tries, seconds=seconds)

    async def _request(self, call: Call[Any]) -> Reply:
        server = await self._pool.pick()
        mode = server.mode
        try:
            async with asyncio.timeout(self._config.limits.timeout):
                body = await _read_body(server.client, body_of(call, mode))
            reply = read_reply(json.loads(body))
        except openai.APIStatusError as error:
            raise self._explain(error, server, mode) from None
        except (openai.APIConnectionError, TimeoutError) as error:
            server.rest()
            raise self._explain_silence(error) from None
        except (openai.APIError, ValueError) as error:
            self._pool.last_sign = time.monotonic()
            raise _FaultError(f"not a chat completion: {str(error)[:200]}") from None
        except Exception as error:
            # The body is read outside the client's own handling of faults.
            if not type(error).__module__.startswith(("httpx", "aiohttp", "ssl")):
                raise
            server.rest()
            raise self._explain_silence(error) from None
        self._pool.answered(server)
        return reply

    def _explain_silence(self, error: BaseException) -> _FaultError:
        """Return what it means that no answer, or half of one, has come."""
        cause: BaseException | None = error
        # The client takes every fault of a connection for a timeout; its cause is more exact.
        while cause is not None and not isinstance(cause, aiohttp.ClientError):
            cause = cause.__cause__
        if cause is None or isinstance(cause, TimeoutError):
            return _FaultError(f"no whole answer within {self._config.limits.timeout:g} s")
        is_dead = isinstance(cause, aiohttp.ClientConnectorError)
        return _FaultError(f"connection: {type(cause).__name__}", counts=not is_dead)

    def _explain(self, error: openai.APIStatusError, server: Server, mode: str) -> Exception:
        """Return what an HTTP status means for the request, and let the server rest."""
        status = error.status_code
        said = self._secrets.redact(str(error.message))[:300]
        reason = f"HTTP {status}: {said}"
        if status == 429:
            self._pool.last_sign = time.monotonic()
            if getattr(error, "code", None) == "insufficient_quota":
                return Stopped(f"{server.url}: {reason} | fix: raise the quota of this account")
            server.rest(_retry_after(error))
            return _FaultError(reason, counts=False)
        if status in _REJECTED:
            self._pool.last_sign = time.monotonic()
            if server.fall_back(mode):
                return _FaultError(reason, counts=False)
            self._rejected += 1
            if self._rejected >= _MAX_REJECTED and not self._pool.has_answered:
                return UserError(
                    f"{server.url} rejects every request: {reason}",
                    fix="set model.token_limit_key or model.extra as this server needs them",
                )
            return _RejectedError(reason)
        if status in _FATAL and not (status == 403 and self._pool.has_answered):
            return UserError(
                f"{server.url}: {reason}",
                fix="check the server's url, its api_key_env and the name of the model",
            )
        if status in (408, 409) or status >= 500:
            server.rest(_retry_after(error) if status == 503 else None)
            return _FaultError(reason)
        return _RejectedError(reason)


def estimate_tokens(call: Call[Any]) -> int:
    """Return about how many tokens a prompt has, rather too many than too few."""
    return sum(len(m["content"]) for m in call.messages()) // _CHARACTERS_PER_TOKEN + 16


async def _read_body(client: openai.AsyncOpenAI, body: dict[str, Any]) -> bytes:
    """Return the body of a response of at most `_MAX_BODY` bytes."""
    completions: Any = client.chat.completions.with_streaming_response
    pieces, size = [], 0
    # As an extra body, which the client sends as it is: checking and copying the messages and the
    # schema of each request took a quarter of the run's time.
    async with completions.create(model=body["model"], messages=[], extra_body=body) as response:
        async for piece in response.iter_bytes():
            pieces.append(piece)
            size += len(piece)
            if size > _MAX_BODY:
                raise ValueError(f"a body of more than {_MAX_BODY >> 20} MiB")
    return b"".join(pieces)


def _wait(state: tenacity.RetryCallState) -> float:
    """Return the wait before another try; a server that rests is waited for in `Pool.pick`."""
    fault = state.outcome.exception() if state.outcome else None
    if isinstance(fault, _FaultError) and not fault.counts:
        return 0.0
    return float(tenacity.wait_random_exponential(multiplier=0.25, max=30)(state))


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Return the seconds that a server asks to wait, given in seconds or as a date."""
    given = error.response.headers.get("retry-after-ms")
    try:
        if given is not None:
            seconds = float(given) / 1000
        else:
            given = error.response.headers.get("retry-after", "")
            seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(given)).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)
