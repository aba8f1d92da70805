"""Send calls to OpenAI-compatible servers, and live with all that such servers do.

    fault                                      outcome
    429                                        the server rests, by Retry-After if it is sent
    5xx, 408, 409, reset, half or foreign body another try, after a wait that doubles
    no connection, 502, 503                    the server is left out for a while, others take over
    400, 413, 422                              a recorded failure; the first 400 to a schema makes
                                               the server ask without one
    401, 404, 403 before any answer, no trust  the run ends: every call would fail
    in its certificate, or the first five
    calls failed
    402, an exhausted quota                    the run stops, to be continued
    an answer cut off at the token limit       recorded as it is, and not asked again

The body of an answer is read in pieces, under a limit of time and size, because some servers never
end one; the client reads the body of an error whole, under the limit of time.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import time
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import tenacity

from pipeline.errors import Stopped, UserError, say_warning
from ReasonAug.synthesis.calls import MAX_FAILED, Call, Halt, Secrets
from ReasonAug.synthesis.completions import (
    Reply,
    Tokens,
    body_of,
    estimate_tokens,
    outcome,
    read_reply,
)
from ReasonAug.synthesis.config import ServerConfig, SynthesisConfig
from ReasonAug.synthesis.ledger import Record
from ReasonAug.synthesis.limits import Budget, Rate, prices_of

_MAX_BODY = 8 * 2**20  # bytes of a response
_LONGEST_REST = 60.0  # seconds that a server is left out, unless it asks for more
_LONGEST_RETRY_AFTER = 3600.0
_FATAL = (401, 403, 404)
_REJECTED = (400, 413, 422)
_AWAY = (502, 503)  # a gateway's words for a server that is not there, or not yet
_SILENCE = 5.0  # seconds without any server after which the reason is said,
_SAID_AGAIN = 300.0  # and after which it is said again
_MODES = ("schema", "object", "none")


class _FaultError(Exception):
    """Something that another try may cure.

    Args:
        counts: it is one of the tries that a request has.
        is_foreign: the body is no chat completion, or an empty one.
    """

    def __init__(self, reason: str, *, counts: bool = True, is_foreign: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.counts, self.is_foreign = reason, counts, is_foreign


class _RejectedError(Exception):
    """The server will not answer this request.

    Args:
        is_foreign: it takes no such requests at all.
    """

    def __init__(self, reason: str, *, is_foreign: bool = False) -> None:
        super().__init__(reason)
        self.is_foreign = is_foreign


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
    proxy = proxy_of(server.url)
    if proxy and urlsplit(proxy).scheme not in ("http", "https"):
        raise UserError(
            f"the environment names the proxy {_shown(proxy)} for {server.url}",
            allowed="http://HOST:PORT",
            fix="unset it, or name the server's host in no_proxy",
        )
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=server.url,
        timeout=timeout,
        max_retries=0,
        # Half the CPU time of the default, whose pool goes through all connections each time.
        http_client=openai.DefaultAioHttpClient(),
    )


def proxy_of(url: str) -> str:
    """Return the proxy that the environment names for a URL, or an empty text."""
    parts, known = urlsplit(url), urllib.request.getproxies()
    proxy = known.get(parts.scheme) or known.get("all") or ""
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def _shown(proxy: str) -> str:
    """Return a proxy without the password that it may hold."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class Server:
    """One server, and how it has behaved."""

    def __init__(self, config: ServerConfig, *, timeout: float, structured: str) -> None:
        self.url = config.url
        proxy = proxy_of(config.url)
        self.via = f" through the proxy {_shown(proxy)}" if proxy else ""
        self.client = make_client(config, timeout)
        self.ready_at = 0.0
        self.fault = ""  # the last one
        self.asked_to_wait = False
        self.faults = 0  # in a row
        self.answers = 0
        self._mode = 0 if structured == "auto" else _MODES.index(structured)
        self._may_fall_back = structured == "auto"
        self._said: set[str] = set()

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
        return True

    def answered(self, reply: Reply) -> None:
        """Note an answer: this server works, in this mode."""
        self.answers += 1
        self.faults = 0
        # Not at the fall: whether less structure was the cure is known only now.
        if self._may_fall_back and self._mode:
            self._say(
                f"refuses response_format {_MODES[self._mode - 1]}; asked for {self.mode} from "
                "now on"
            )
        self._may_fall_back = False
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self._say("counts no tokens; they are estimated from the lengths of texts")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            say_warning(f"{self.url} {text}")

    def rest(self, fault: str, seconds: float | None = None) -> None:
        """Leave the server out, for longer after each fault in a row."""
        self.fault, self.asked_to_wait = fault, seconds is not None
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
        self._silent_since: float | None = None
        self._said_at = -math.inf

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
            first = min(self.servers, key=lambda server: server.ready_at)
            if now - self.last_sign > self._patience:
                raise Stopped(
                    f"no answer from {self._faults()} for {now - self.last_sign:.0f} s | "
                    "fix: start the server and run the same command again"
                )
            if first.asked_to_wait and first.ready_at - now > self._patience:
                raise Stopped(
                    f"{first.url} asks to wait {first.ready_at - now:,.0f} s ({first.fault}) | "
                    "fix: run the same command again then, or raise limits.patience"
                )
            self._say_silence(now)
            await asyncio.sleep(min(first.ready_at - now, 1.0) + 0.001)

    def _faults(self) -> str:
        return ", ".join(f"{server.url} ({server.fault})" for server in self.servers)

    def _say_silence(self, now: float) -> None:
        """Say why nothing moves, once in a while."""
        self._silent_since = self._silent_since or now
        if now - self._silent_since > _SILENCE and now - self._said_at > _SAID_AGAIN:
            self._said_at = now
            say_warning(
                f"no answer from {self._faults()}; tried again for {self._patience:g} s "
                "(limits.patience)"
            )

    def answered(self, server: Server, reply: Reply) -> None:
        """Note an answer of any kind."""
        server.answered(reply)
        self.last_sign = self.last_answer = time.monotonic()
        self._silent_since = None

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
        self._failed = 0  # calls, before any answer
        self._is_first = budget.tokens == 0  # no earlier start was answered either
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
        lost = Tokens()

        def is_over(state: tenacity.RetryCallState) -> bool:
            nonlocal counted
            fault = state.outcome.exception() if state.outcome else None
            counted += isinstance(fault, _FaultError) and fault.counts
            return counted >= self._config.limits.attempts or (
                # Servers work for others, but have sent this request away all the time.
                time.monotonic() - began > self._config.limits.patience
            )

        async def once() -> Record:
            nonlocal tries, lost
            tries += 1
            await self._requests.take(1)
            await self._tokens.take(most_tokens)
            reply = await self._request(call)
            used = reply.tokens(call)
            self._tokens.correct(used.total - most_tokens)
            if reply.is_empty:
                lost += used  # it is paid for, too
                raise _FaultError("an empty answer", is_foreign=True)
            seconds = round(time.monotonic() - began, 3)
            return outcome(call, reply, self._secrets, lost=lost, attempts=tries, seconds=seconds)

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
            self._require_answers(error, reason)
            return call.record(
                status="failed",
                reason=reason,
                attempts=tries,
                seconds=round(waited, 3),
                prompt_tokens=lost.prompt,
                completion_tokens=lost.completion,
            )

    def _require_answers(self, error: _FaultError | _RejectedError, reason: str) -> None:
        """End a run whose first calls have all failed.

        Raises:
            UserError: other requests would be rejected, or answered with anything else, too.
            Stopped: its servers are at fault.
        """
        # What is left of an earlier start may be just the calls that no server answers.
        is_left = not self._is_first and not isinstance(error, _RejectedError)
        if self._pool.has_answered or is_left:
            return
        self._failed += 1
        if self._failed < MAX_FAILED:
            return
        urls = ", ".join(server.url for server in self._pool.servers)
        if isinstance(error, _RejectedError) and not error.is_foreign:
            raise UserError(
                f"{urls} rejects every request: {reason}",
                fix="check the name of the model, and set model.token_limit_key or model.extra as "
                "this server needs them",
            )
        if error.is_foreign:
            raise UserError(
                f"{urls} answers no request: {reason}",
                fix="check the server's url, which usually ends in /v1, and its log",
            )
        raise Stopped(
            f"{urls} answers no request: {reason} | fix: look into the server's log, and run the "
            "same command again"
        )

    async def _request(self, call: Call[Any]) -> Reply:
        server = await self._pool.pick()
        mode, body = server.mode, b""
        try:
            async with asyncio.timeout(self._config.limits.timeout):
                body = await _read_body(server.client, body_of(call, mode))
            reply = read_reply(json.loads(body))
        except openai.APIStatusError as error:
            raise self._explain(error, server, mode) from None
        except (openai.APIConnectionError, TimeoutError) as error:
            raise self._explain_silence(error, server) from None
        except (openai.APIError, ValueError) as error:
            self._pool.last_sign = time.monotonic()
            start = f": {body[:80].decode(errors='replace')!r}" if body else ""
            reason = f"not a chat completion: {str(error)[:200]}{start}"
            raise _FaultError(reason, is_foreign=True) from None
        except Exception as error:
            # The body is read outside the client's own handling of faults.
            if not type(error).__module__.startswith(("httpx", "aiohttp", "ssl")):
                raise
            raise self._explain_silence(error, server) from None
        if reply.is_empty:
            self._pool.last_sign = time.monotonic()
        else:
            self._pool.answered(server, reply)
        return reply

    def _explain_silence(self, error: BaseException, server: Server) -> Exception:
        """Return what it means that no answer, or half of one, has come; let the server rest."""
        cause: BaseException | None = error
        # The client takes every fault of a connection for a timeout; its cause is more exact.
        while cause is not None and not isinstance(cause, aiohttp.ClientError):
            cause = cause.__cause__
        if isinstance(cause, aiohttp.ClientSSLError) and not self._pool.has_answered:
            return _explain_tls(cause, server.url)
        is_late = isinstance(error, openai.APITimeoutError | TimeoutError)
        if isinstance(cause, TimeoutError) or (cause is None and is_late):
            fault = _FaultError(
                f"no whole answer within {self._config.limits.timeout:g} s (limits.timeout)"
            )
        else:
            is_dead = isinstance(cause, aiohttp.ClientConnectorError)
            if isinstance(error, openai.APIError) and cause is None:
                cause = error.__cause__
            reason = f"connection{server.via}: {_cause_of(cause or error)}"
            fault = _FaultError(reason, counts=not is_dead)
        server.rest(fault.reason)
        return fault

    def _explain(self, error: openai.APIStatusError, server: Server, mode: str) -> Exception:
        """Return what an HTTP status means for the request, and let the server rest."""
        status = error.status_code
        said = self._secrets.redact(str(error.message)).removeprefix(f"Error code: {status}")
        said = " ".join(said.removeprefix(" - ").split())[:300]  # a page of HTML has many lines
        reason = f"HTTP {status}{server.via}{f': {said}' if said else ''}"
        if status == 402 or getattr(error, "code", None) == "insufficient_quota":
            # A failure recorded for each call that is left would cost all their items.
            return Stopped(f"{server.url}: {reason} | fix: raise the quota of this account")
        if status == 429:
            self._pool.last_sign = time.monotonic()
            server.rest(reason, _retry_after(error))
            return _FaultError(reason, counts=False)
        if status in _REJECTED:
            self._pool.last_sign = time.monotonic()
            if server.fall_back(mode):
                return _FaultError(reason, counts=False)
            return _RejectedError(reason)
        if status in _FATAL and not (status == 403 and self._pool.has_answered):
            return UserError(
                f"{server.url}: {reason}",
                fix="name the server's host in no_proxy, or check its url and api_key_env"
                if server.via
                else "check the server's url, which usually ends in /v1, its api_key_env and the "
                "name of the model",
            )
        if status in (408, 409) or status >= 500:
            server.rest(reason, _retry_after(error) if status == 503 else None)
            return _FaultError(reason, counts=status not in _AWAY)
        return _RejectedError(reason, is_foreign=True)


def _cause_of(error: BaseException) -> str:
    """Return why there is no connection, in the words of the system."""
    if not isinstance(error, OSError) or error.errno is None:
        return type(error).__name__
    # Faults of name servers have numbers of their own, below 0.
    return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)


def _explain_tls(error: aiohttp.ClientSSLError, url: str) -> UserError:
    """Return what is wrong between this machine and a server that wants https."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return UserError(
            f"{url}: its certificate is not trusted here ({error.certificate_error})",
            fix="export SSL_CERT_FILE=FILE with the certificates of your CA",
        )
    return UserError(f"{url}: {error}", fix="check the server's url: this port may speak http")


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
