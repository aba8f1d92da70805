"""Servers that answer in odd ways, or not: nothing is silently paid, lost or changed."""

from __future__ import annotations

import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pipeline.errors import Stopped, UserError
from ReasonAug.synthesis.run import synthesize
from tests.reasonaug.language_server import Behaviour, LanguageServer, serving
from tests.reasonaug.small_synthesis import config_of, read, records
from tests.support import free_port

pytestmark = pytest.mark.usefixtures("no_report")


def rows(folder: Path) -> bytes:
    return (folder / "rows.jsonl").read_bytes()


def dropped(folder: Path) -> set[str | None]:
    return {item["dropped"] for path in (folder / "stages").glob("*.jsonl") for item in read(path)}


def problems_of(body: dict[str, Any]) -> bool:
    return "Write one self-contained problem" in body["messages"][-1]["content"]


class Reasoner(LanguageServer):
    """Spends its tokens on thoughts before it writes the problems of one setting."""

    only = "a laboratory"

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        found = super()._completion(body)
        if problems_of(body) and self.only in body["messages"][-1]["content"]:
            choice = found["choices"][0]
            choice["finish_reason"], choice["message"]["content"] = "length", None
            choice["message"]["reasoning_content"] = "Let me think. " * 100
            found["usage"]["completion_tokens"] = body["max_tokens"]
        return found


class EndlessReasoner(Reasoner):
    """Spends them always."""

    only = ""


def test_an_answer_that_is_cut_off_is_paid_once_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with serving(kind=Reasoner) as (url, server):
        synthesize(config_of(out, url))
        assert server.requests == server.answered.total() == len(records(out))
    cut = [record for record in records(out) if record["reason"]]
    assert cut and all(record["reason"] == "cut off at model.max_tokens" for record in cut)
    assert {record["completion_tokens"] for record in cut} == {2048}
    assert dropped(out) == {None, "cut_off"}
    said = capsys.readouterr()
    assert f"problems: {len(cut)} calls failed or were cut off" in said.err
    assert "fix: raise model.max_tokens" in said.err
    assert f"problems: {15 - len(cut)} of 15 items ({len(cut)} cut_off)" in said.out


def test_a_model_whose_answers_are_all_cut_off_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(kind=EndlessReasoner) as (url, server):
        with pytest.raises(UserError, match=r"cut off at model\.max_tokens=2048 \| fix: raise it"):
            synthesize(config_of(out, url, limits={"concurrency": 1}))
        assert server.requests == 10  # all definitions, and the first problems


class HalfWriter(LanguageServer):
    """Reaches its limit in the middle of a problem."""

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        found = super()._completion(body)
        if problems_of(body) and "a laboratory" in body["messages"][-1]["content"]:
            choice = found["choices"][0]
            choice["finish_reason"] = "length"
            choice["message"]["content"] = choice["message"]["content"][:-20]
        return found


def test_no_repair_invents_the_end_of_an_answer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(kind=HalfWriter) as (url, _):
        synthesize(config_of(out, url))
    assert not [record for record in records(out) if record["prompt"].startswith("repair@")]
    assert dropped(out) == {None, "cut_off"}


class Empty(LanguageServer):
    """Answers each question about a laboratory with nothing at first, and counts it."""

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        found = super()._completion(body)
        text = body["messages"][-1]["content"]
        if problems_of(body) and not self.met[text, "nothing"]:
            self.met[text, "nothing"] += 1
            found["choices"][0]["message"]["content"] = ""
            found["usage"] = {"prompt_tokens": 7, "completion_tokens": 1000}
        return found


def test_empty_answers_are_paid_for_too(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(kind=Empty) as (url, _):
        synthesize(config_of(out, url))
    assert rows(out) == rows(undisturbed)
    used = {r["item"]: r["completion_tokens"] for r in records(undisturbed)}
    more = [
        record["completion_tokens"] - used[record["item"]]
        for record in read(out / "ledger" / "problems.jsonl")
        if record["attempts"] == 2
    ]
    assert len(more) == 15
    assert all(record["completion_tokens"] > 1000 for record in read(out / "ledger/problems.jsonl"))


class Uncounted(LanguageServer):
    """Does not say how many tokens it used."""

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**super()._completion(body), "usage": None}


def test_tokens_that_a_server_does_not_count_are_estimated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise no budget would ever be reached."""
    out = tmp_path / "out"
    with (
        serving(kind=Uncounted) as (url, _),
        pytest.raises(Stopped, match="budget of 12,000 tokens reached"),
    ):
        synthesize(config_of(out, url, limits={"max_tokens": 12_000}, model={"max_tokens": 600}))
    assert capsys.readouterr().err.count("counts no tokens; they are estimated") == 1
    used = sum(r["prompt_tokens"] + r["completion_tokens"] for r in records(out))
    assert 6_000 < used <= 12_000


@pytest.mark.parametrize("key", ["EMPTY", "a", "the"])
def test_a_key_that_is_a_word_changes_no_answer(
    key: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with serving(Behaviour(key=key)) as (url, _):
        servers = [{"url": url, "api_key_env": "SOME_KEY"}]
        synthesize(config_of(tmp_path / "out", model={"servers": servers}))
    assert rows(tmp_path / "out") == rows(undisturbed)


class Unpaid(LanguageServer):
    """Wants money after ten answers."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if self.answered.total() >= 10:
            return web.json_response({"error": {"message": "Insufficient Balance"}}, status=402)
        return await super().chat(request)


def test_an_empty_account_stops_the_run_and_costs_no_item(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (
        serving(kind=Unpaid) as (url, _),
        pytest.raises(Stopped, match=r"HTTP 402: Insufficient Balance"),
    ):
        synthesize(config_of(out, url))
    assert {record["status"] for record in records(out)} == {"ok"}


def test_failures_before_the_first_answer_are_asked_again(
    undisturbed: Path, tmp_path: Path
) -> None:
    """A wrong parameter, a login page, a server at fault: no call is to blame."""
    out = tmp_path / "out"
    with serving(Behaviour(unknown="max_tokens")) as (url, _):
        with pytest.raises(UserError, match="rejects every request"):
            synthesize(config_of(out, url))
        synthesize(config_of(out, url, model={"token_limit_key": "max_completion_tokens"}))
    assert rows(out) == rows(undisturbed)


class LoginPage(LanguageServer):
    """Is not the server at all."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>Please log in</html>", content_type="text/html")


class Stream(LanguageServer):
    """Sends its answers in pieces, although no request asks for that."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text='data: {"choices": []}\n\n', content_type="text/event-stream")


class Moved(LanguageServer):
    """Has another address, where a client must not post again."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPMovedPermanently("/v1/chat/completions")


class Circle(LanguageServer):
    """Has its own address as another one."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPPermanentRedirect("/v1/chat/completions")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (LoginPage, UserError, "not a chat completion: .*'<html>Please log in.*/v1"),
        (Stream, UserError, "not a chat completion: .*'data: .*/v1"),
        (Moved, UserError, "HTTP 405 .*/v1"),
        (Circle, Stopped, "connection: TooManyRedirects"),
    ],
)
def test_an_address_of_something_else_ends_the_run(
    kind: type[LanguageServer], error: type[Exception], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (
        serving(kind=kind) as (url, _),
        pytest.raises(error, match=f"answers no request: {message}"),
    ):
        synthesize(config_of(out, url, limits={"attempts": 2}))
    assert records(out) == []


class Gateway(LanguageServer):
    """A gateway whose server starts two seconds later."""

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(behaviour)
        self.up = time.monotonic() + 2

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if time.monotonic() < self.up:
            return web.Response(status=502, text="<html>Bad Gateway</html>")
        return await super().chat(request)


def test_a_gateway_without_its_server_costs_no_tries(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(kind=Gateway) as (url, _):
        synthesize(config_of(out, url, limits={"attempts": 1}))
    assert rows(out) == rows(undisturbed)


class Later(LanguageServer):
    """Asks to come back in an hour."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        error = {"error": {"message": "quota of this hour"}}
        return web.json_response(error, status=429, headers={"Retry-After": "3600"})


def test_a_wait_beyond_the_patience_is_named_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with serving(kind=Later) as (url, _):
        message = r"asks to wait 3,[56]\d\d s \(HTTP 429: quota of this hour\).*limits\.patience"
        with pytest.raises(Stopped, match=message):
            synthesize(config_of(tmp_path / "out", url))
    assert time.monotonic() - began < 60


def test_silence_is_explained_while_it_lasts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(Stopped, match="Connection refused"):
        synthesize(config_of(tmp_path / "out", dead, limits={"patience": 8}))
    said = [line for line in capsys.readouterr().err.split("\n") if "no answer from" in line]
    assert len(said) == 1 and said[0].startswith(f"WARNING: no answer from {dead} (connection: ")
    assert said[0].endswith("Connection refused); tried again for 8 s (limits.patience)")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("certificate")
    made, key = folder / "own.pem", folder / "own.key"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*words, "-keyout", key, "-out", made], check=True, capture_output=True)
    return made, key


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> Iterator[ssl.SSLContext]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    yield context


def test_a_certificate_of_an_own_authority_is_named_and_can_be_trusted(
    certificate: tuple[Path, Path], tls: ssl.SSLContext, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with serving(tls=tls) as (url, server):
        with pytest.raises(UserError, match=r"not trusted here .*SSL_CERT_FILE=FILE"):
            synthesize(config_of(tmp_path / "out", url), limit=1)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        synthesize(config_of(tmp_path / "out", url), limit=1)
        assert server.answered.total() > 0


def test_https_to_a_port_of_http_is_named(tmp_path: Path) -> None:
    with serving() as (url, _), pytest.raises(UserError, match="this port may speak http"):
        synthesize(config_of(tmp_path / "out", url.replace("http:", "https:")))


class Proxy(LanguageServer):
    """A site's proxy, which does not know the machines of the site."""

    def app(self) -> web.Application:
        async def refuse(request: web.Request) -> web.Response:
            return web.Response(status=403, text="<html>Access denied</html>")

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", refuse)
        return app


def test_a_proxy_in_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(kind=Proxy) as (proxy, _), serving() as (url, server):
        place = proxy.removesuffix("/v1")
        monkeypatch.setenv("http_proxy", place.replace("//", "//user:secret@"))
        message = rf"HTTP 403 through the proxy {place} .*fix: name the server's host in no_proxy"
        with pytest.raises(UserError, match=message) as refused:
            synthesize(config_of(tmp_path / "out", url))
        assert "secret" not in str(refused.value)
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1080")
        with pytest.raises(UserError, match=r"the proxy socks5://127\.0\.0\.1:1080 for"):
            synthesize(config_of(tmp_path / "out", url))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        synthesize(config_of(tmp_path / "out", url), limit=1)
        assert server.answered.total() > 0


@pytest.mark.parametrize(
    "url", ["http://h:port/v1", "http://h:99999/v1", "http://[::1/v1", "http:///v1", "h:8000/v1"]
)
def test_a_url_that_names_no_server_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"http://HOST:PORT/v1"):
        config_of(tmp_path / "out", url)


# --- the batch API ---------------------------------------------------------------------------


def test_a_batch_api_without_structured_output_costs_no_call(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with serving(Behaviour(structured=False, sloppy=False)) as (url, _):
        synthesize(config_of(out, url, api="batch"))
    assert capsys.readouterr().err.count("refuses a JSON schema") == 1
    assert {record["status"] for record in records(out)} == {"ok"}
    assert rows(out) == rows(undisturbed)


def test_a_batch_that_another_server_has_is_asked_again(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with serving() as (url, _):
        config = config_of(out, url, api="batch", batch={"poll": 30})
        from tests.reasonaug.test_synthesis_calls import signal_once

        book = out / "ledger" / "batches.jsonl"
        with (
            signal_once(lambda: book.exists() and book.read_text().count("\n") == 2),
            pytest.raises(Stopped, match="signal"),
        ):
            synthesize(config)
    with serving() as (url, _):
        synthesize(config_of(out, url, api="batch"))
    assert "which an earlier start created; its 5 calls are asked again" in capsys.readouterr().err
    assert rows(out) == rows(undisturbed)


class RefusesBatches(LanguageServer):
    """Ends every batch without a reason."""

    def _finish(self, batch: dict[str, Any]) -> None:
        batch["status"] = "failed"


def test_a_batch_refused_without_a_reason_is_one_line(tmp_path: Path) -> None:
    with (
        serving(kind=RefusesBatches) as (url, _),
        pytest.raises(UserError, match="was refused: without a reason"),
    ):
        synthesize(config_of(tmp_path / "out", url, api="batch"))


class RejectsAll(LanguageServer):
    """Rejects each request of a batch."""

    def _finish(self, batch: dict[str, Any]) -> None:
        self.behaviour.expired = 1.0
        self.expired.clear()
        super()._finish(batch)
        text = self.files[batch["error_file_id"]]
        rejected = '"response": {"status_code": 400}'
        self.files[batch["error_file_id"]] = text.replace('"response": null', rejected)


def test_a_batch_api_that_rejects_everything_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        serving(kind=RejectsAll) as (url, _),
        pytest.raises(UserError, match="definitions: all 5 calls failed: HTTP 400: "),
    ):
        synthesize(config_of(out, url, api="batch"))
    assert records(out) == []
