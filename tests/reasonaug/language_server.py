"""A language model's server that answers from the template generator, and misbehaves on demand.

It speaks chat completions, structured output and the batch API over real HTTP. What it writes is
verifiable: problems come from `ReasonAug.concepts`, so their results are known. An answer depends
on the request alone; a share of the solutions is wrong on purpose, and remembered as such.

    python -m tests.reasonaug.language_server --port 0 --announce FILE
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import sympy  # noqa: F401 -- some concepts import it, and a request should not wait for that
from aiohttp import web

from ReasonAug.concepts import CONCEPTS
from ReasonAug.problem import compose

BY_NAME = {concept.name: concept for concept in CONCEPTS}
FAULTS = ("429", "429-after", "500", "reset", "truncated", "endless", "type", "empty", "slow")

_MARKS = (
    ("repair", "It cannot be read"),
    ("propose", "concepts of this domain"),
    ("definition", "Define this concept"),
    ("problem", "Write one self-contained problem"),
    ("check", "Does solving this problem properly require"),
    ("rewrite", "A reviewer rejected"),
    ("tests", "tests of the function"),
    ("judge", "Solution to be marked"),
    ("negative", "Write a worked problem that shares"),
    ("forum", "question-and-answer forum"),
    ("exam", "formal examination question"),
    ("solve-coding", "Write the function `"),
    ("solve-numeric", "Solve this problem (attempt"),
)
_CONCEPT = re.compile(r"^Concept(?: that the solution must rely on)?: (.*)$", re.MULTILINE)
_PROBLEM = re.compile(
    r"(?:Problem:|search starts from this problem:|attempt \d+\)\.\n)\n(.*?)\n\n(?:Does solving|"
    r"Objection|Write \d+ tests|Solution to be marked|Write a worked|Turn this problem|Write the "
    r'function|"solution" is)',
    re.DOTALL,
)


@dataclass
class Known:
    """The server's knowledge about a problem that it wrote."""

    concept: str
    domain: str
    solution: str
    result: str
    function: str = ""
    tests: list[str] = field(default_factory=list)
    code: str = ""
    is_wrong: bool = False


@dataclass
class Behaviour:
    """Behaviour of the server.

    Args:
        faults: share of the requests that meet each fault, once each; see FAULTS.
        structured: it knows response_format.
        sloppy: without response_format, JSON comes wrapped in words and fences.
        wrong: share of the solutions that are wrong.
        off_topic: share of the problems that a check rejects.
        refusals: share of the requests that are refused for good.
        key: the only key that is accepted.
        expired: share of a batch's requests that expire the first time.
        delay: seconds before an answer.
        unknown: a parameter that the server refuses.
        cheap: problems are two sums, for measuring speed.
    """

    faults: dict[str, float] = field(default_factory=dict)
    structured: bool = True
    sloppy: bool = True
    wrong: float = 0.0
    off_topic: float = 0.0
    refusals: float = 0.0
    key: str = ""
    expired: float = 0.0
    delay: float = 0.0
    unknown: str = ""
    cheap: bool = False


def draw(*parts: object) -> float:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Writer:
    """Writes the content of answers."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.known: dict[str, Known] = {}

    def answer(self, text: str) -> dict[str, Any]:
        name = next(name for name, mark in _MARKS if mark in text)
        answer: dict[str, Any] = getattr(self, f"_{name.replace('-', '_')}")(text)
        return answer

    def _repair(self, text: str) -> dict[str, Any]:
        body = text.partition("\nText:\n")[2]
        for end in ("", "}", '"}', '"]}'):
            with contextlib.suppress(ValueError):
                tree: dict[str, Any] = json.loads(body[body.find("{") :] + end)
                return tree
        raise AssertionError(body)

    def _propose(self, text: str) -> dict[str, Any]:
        domain = re.search(r"^Domain: (.*)$", text, re.MULTILINE)[1]  # type: ignore[index]
        count = int(re.search(r"Name (\d+) concepts", text)[1])  # type: ignore[index]
        known = set(re.findall(r"^- (.*)$", text, re.MULTILINE))
        names = [c.name for c in CONCEPTS if c.domain == domain and c.name not in known]
        return {"concepts": [*names[:count], *list(known)[:1]]}

    def _definition(self, text: str) -> dict[str, Any]:
        concept = BY_NAME.get(self._concept(text))
        if concept is None:
            name = self._concept(text)
            words = " ".join(
                hashlib.sha256(name.encode()).hexdigest()[i : i + 4] for i in range(0, 60, 4)
            )
            return {"definition": f"{name} says that {words} add up.", "code": ""}
        return {"definition": concept.definition, "code": concept.code}

    def _concept(self, text: str) -> str:
        found = _CONCEPT.search(text)
        assert found, text
        return found[1].strip()

    def _problem(self, text: str) -> dict[str, Any]:
        return self._write(self._concept(text), text, "problem")

    def _rewrite(self, text: str) -> dict[str, Any]:
        return self._write(self._concept(text), text, "rewrite")

    def _write(self, name: str, text: str, salt: str) -> dict[str, Any]:
        rng = Random(f"{salt}/{text}")
        concept = BY_NAME.get(name)
        if concept is None or self.behaviour.cheap:
            return self._sum(name, rng)
        problem = compose(concept, rng, form=rng.randrange(len(concept.forms)), max_tokens=500)
        known = Known(problem.concept, problem.domain, problem.solution, "")
        if concept.code:
            known.code = re.search(r"```python\n(.*?)\n```", problem.solution, re.DOTALL)[1]  # type: ignore[index]
            examples = re.findall(r"^(\w+)(\(.*\)) -> (.*)$", problem.statement, re.MULTILINE)
            known.function = examples[0][0]
            known.tests = [f"assert {f}{call} == {result}" for f, call, result in examples]
            solution, result = known.code, known.function
        else:
            solution = problem.solution
            result = known.result = re.findall(r"-?\d+(?:\.\d+)?", solution)[-1]
        if rng.random() < self.behaviour.wrong:
            known.is_wrong = True
            if concept.code:
                solution = f"def {known.function}(*arguments):\n    return None"
            else:
                result = str(float(known.result) * 2 + 7)
        self.known[problem.statement] = known
        return {"problem": problem.statement, "solution": solution, "answer": result}

    def _sum(self, name: str, rng: Random) -> dict[str, Any]:
        a, b = rng.randrange(10**6), rng.randrange(10**6)
        words = " ".join(rng.choices(_VOCABULARY, k=60))
        statement = f"Two shelves hold {a} and {b} books. {words}. How many books are there?"
        known = Known(name, "", f"By {name} there are {a} + {b} = {a + b} books.", str(a + b))
        self.known[statement] = known
        return {"problem": statement, "solution": known.solution, "answer": known.result}

    def _known(self, text: str) -> tuple[str, Known | None]:
        found = _PROBLEM.search(text)
        assert found, text
        return found[1], self.known.get(found[1])

    def _check(self, text: str) -> dict[str, Any]:
        problem, _ = self._known(text)
        off = draw("off", problem) < self.behaviour.off_topic
        return {"verdict": not off, "reason": "It can be solved without it." if off else "It does."}

    def _judge(self, text: str) -> dict[str, Any]:
        _, known = self._known(text)
        return {"verdict": known is None or not known.is_wrong, "reason": "Worked out again."}

    def _tests(self, text: str) -> dict[str, Any]:
        _, known = self._known(text)
        tests = known.tests if known else []
        return {"tests": [*tests, "print('no test')"]}

    def _solve_coding(self, text: str) -> dict[str, Any]:
        _, known = self._known(text)
        assert known
        return {"solution": f"```python\n{known.code}\n```", "answer": known.function}

    def _solve_numeric(self, text: str) -> dict[str, Any]:
        _, known = self._known(text)
        result = known.result if known else "42"
        return {"solution": f"It is {result}.", "answer": f"{result}"}

    def _negative(self, text: str) -> dict[str, Any]:
        own = re.search(r"relies on this concept:\n(.*?):", text)[1]  # type: ignore[index]
        others = [c for c in CONCEPTS if c.name != own]
        concept = others[int(draw("negative", text) * len(others))]
        if self.behaviour.cheap:
            return {"concept": concept.name, "problem": "Another shelf?", "solution": "None."}
        problem = compose(concept, Random(text), form=0, max_tokens=300)
        return {
            "concept": concept.name,
            "problem": problem.statement,
            "solution": problem.solution,
        }

    def _forum(self, text: str) -> dict[str, Any]:
        return {"question": f"Hello, I am stuck. {self._known(text)[0]} Thanks!"}

    def _exam(self, text: str) -> dict[str, Any]:
        return {"question": f"Question 1. {self._known(text)[0]} (5 marks)"}


_VOCABULARY = sorted({w for c in CONCEPTS for w in re.findall(r"[a-z]{4,}", c.definition)})


class LanguageServer:
    """The HTTP side."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.writer = Writer(behaviour)
        self.answered: Counter[str] = Counter()  # by request
        self.requests = 0
        self.in_flight = self.most_in_flight = 0
        self.met: Counter[tuple[str, str]] = Counter()
        self.times: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.expired: set[str] = set()
        self.keep_bodies = False
        self.refused_until_later: list[int] = []  # by number of the request

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/files", self.upload)
        app.router.add_get("/v1/files/{id}/content", self.download)
        app.router.add_post("/v1/batches", self.create_batch)
        app.router.add_get("/v1/batches", self.list_batches)
        app.router.add_get("/v1/batches/{id}", self.retrieve_batch)
        app.router.add_get("/stats", self.stats)
        return app

    async def stats(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "answers": self.answered.total(),
                "distinct": len(self.answered),
                "requests": self.requests,
            }
        )

    def _refuse_key(self, request: web.Request) -> web.Response | None:
        given = request.headers.get("Authorization", "")
        if self.behaviour.key and given != f"Bearer {self.behaviour.key}":
            # As some servers do: the key comes back in the message.
            message = f"Incorrect API key provided: {given.removeprefix('Bearer ')}"
            return web.json_response({"error": {"message": message}}, status=401)
        return None

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if (refused := self._refuse_key(request)) is not None:
            return refused
        self.requests += 1
        self.times.append(time.monotonic())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            body = await request.json()
            if self.keep_bodies:
                self.bodies.append(body)
            identity = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            if self.behaviour.delay:
                await asyncio.sleep(self.behaviour.delay)
            for fault in FAULTS:
                share = self.behaviour.faults.get(fault, 0.0)
                if not self.met[identity, fault] and draw(fault, identity) < share:
                    self.met[identity, fault] += 1
                    response = await self._misbehave(fault, request, body)
                    if response is not None:
                        return response
            if self.behaviour.unknown and self.behaviour.unknown in body:
                message = f"Unsupported parameter: {self.behaviour.unknown}"
                return web.json_response({"error": {"message": message}}, status=400)
            if "response_format" in body and not self.behaviour.structured:
                return web.json_response(
                    {"error": {"message": "response_format is not supported"}}, status=400
                )
            self.answered[identity] += 1
            return web.json_response(self._completion(body))
        except ConnectionError:  # the client was killed
            return web.Response(status=499)
        finally:
            self.in_flight -= 1

    async def _misbehave(
        self, fault: str, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse | None:
        match fault:
            case "429":
                return web.json_response({"error": {"message": "slow down"}}, status=429)
            case "429-after":
                self.refused_until_later.append(len(self.times) - 1)
                headers = {"Retry-After": "1"}
                return web.json_response(
                    {"error": {"message": "wait"}}, status=429, headers=headers
                )
            case "500":
                return web.Response(status=500, text="<html>oops</html>")
            case "type":
                return web.Response(text="<html>a login page</html>", content_type="text/html")
            case "empty":
                return web.json_response({**self._completion(body), "choices": []})
            case "truncated":
                text = json.dumps(self._completion(body))
                return web.Response(text=text[: len(text) // 2], content_type="application/json")
            case "slow":
                await asyncio.sleep(0.3)
                return None
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if fault == "reset":
            response.content_length = 10_000
        await response.prepare(request)
        await response.write(b'{"choices": [')
        if fault == "reset":
            assert request.transport
            request.transport.abort()
            return response
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while True:  # endless
                await response.write(b" " * 1024)
                await asyncio.sleep(0.01)
        return response

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        refused = draw("refusal", text) < self.behaviour.refusals
        content = "" if refused else self._content(text, "response_format" in body)
        prompt = sum(len(message["content"]) for message in body["messages"]) // 4
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {
                        "role": "assistant",
                        "content": None if refused else content,
                        "refusal": "I cannot help with that." if refused else None,
                    },
                }
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": len(content) // 4,
                "total_tokens": prompt + len(content) // 4,
            },
        }

    def _content(self, text: str, structured: bool) -> str:
        tree = self.writer.answer(text)
        content = json.dumps(tree, ensure_ascii=False)
        if structured or not self.behaviour.sloppy:
            return content
        match int(draw("sloppy", text) * 5):
            case 0:
                return f"Certainly! Here it is:\n```json\n{content}\n```\nAnything else?"
            case 1:
                return content[:-1] + ",}"
            case 2 if "verdict" in tree:
                return f"{'Yes' if tree['verdict'] else 'No'}, {tree['reason']}"
            case 2 if "problem" in tree and "concept" not in tree and tree["answer"] == "":
                return f"**Problem:**\n{tree['problem']}\n\n**Solution:**\n{tree['solution']}"
            case 3 if "It cannot be read" not in text:
                return content[: -2 if content.endswith('"}') else -1]
        return content

    # --- the batch API -----------------------------------------------------------------------

    async def upload(self, request: web.Request) -> web.Response:
        if (refused := self._refuse_key(request)) is not None:
            return refused
        reader = await request.multipart()
        content = ""
        async for part in reader:
            if part.name == "file":  # type: ignore[union-attr]
                content = (await part.read()).decode()  # type: ignore[union-attr]
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return web.json_response(
            {"id": name, "object": "file", "bytes": len(content), "created_at": 0,
             "filename": "x.jsonl", "purpose": "batch", "status": "processed"}
        )  # fmt: skip

    async def create_batch(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {
            "id": name, "object": "batch", "endpoint": body["endpoint"], "created_at": 0,
            "completion_window": body["completion_window"], "status": "validating",
            "input_file_id": body["input_file_id"], "metadata": body.get("metadata"), "looks": 0,
        }  # fmt: skip
        return web.json_response(self.batches[name])

    async def list_batches(self, request: web.Request) -> web.Response:
        found = list(self.batches.values())
        return web.json_response({"object": "list", "data": found, "has_more": False})

    async def retrieve_batch(self, request: web.Request) -> web.Response:
        if (batch := self.batches.get(request.match_info["id"])) is None:
            return web.json_response({"error": {"message": "No batch found"}}, status=404)
        batch["looks"] += 1
        if batch["looks"] == 1:
            batch["status"] = "in_progress"
        elif batch["status"] == "in_progress":
            self._finish(batch)
        return web.json_response(batch)

    def _finish(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for line in self.files[batch["input_file_id"]].split("\n"):
            if not line:
                continue
            entry = json.loads(line)
            identity = entry["custom_id"]
            if identity not in self.expired and draw("expired", identity) < self.behaviour.expired:
                self.expired.add(identity)
                error = {"code": "batch_expired", "message": "not in time"}
                bad.append({"custom_id": identity, "response": None, "error": error})
                continue
            if "response_format" in entry["body"] and not self.behaviour.structured:
                said = {"error": {"message": "response_format is not supported"}}
                bad.append({"custom_id": identity, "response": {"status_code": 400, "body": said}})
                continue
            self.answered[identity] += 1
            response = {"status_code": 200, "body": self._completion(entry["body"])}
            good.append({"custom_id": identity, "response": response, "error": None})
        # In another order than asked.
        good.reverse()
        for kind, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[kind] = f"file-{len(self.files)}"
                self.files[batch[kind]] = "".join(json.dumps(line) + "\n" for line in lines)
        batch["status"] = "expired" if bad else "completed"

    async def download(self, request: web.Request) -> web.Response:
        return web.Response(text=self.files[request.match_info["id"]])


@contextlib.contextmanager
def serving(
    behaviour: Behaviour | None = None,
    port: int = 0,
    *,
    kind: type[LanguageServer] = LanguageServer,
    tls: ssl.SSLContext | None = None,
) -> Iterator[tuple[str, LanguageServer]]:
    """Run a server in a thread; yield its base URL and itself."""
    server = kind(behaviour or Behaviour())
    loop = asyncio.new_event_loop()
    started, place = threading.Event(), {}

    async def start() -> None:
        runner = web.AppRunner(server.app(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, shutdown_timeout=0.1, ssl_context=tls)
        await site.start()
        place["runner"] = runner
        place["port"] = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        started.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(place["runner"].cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait(30)
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{place['port']}/v1", server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--announce", type=Path, help="receives the base URL")
    parser.add_argument("--behaviour", default="{}", help="JSON of Behaviour")
    arguments = parser.parse_args()
    with serving(Behaviour(**json.loads(arguments.behaviour)), arguments.port) as (url, _):
        print(url, flush=True)
        if arguments.announce:
            partial = arguments.announce.with_suffix(".partial")
            partial.write_text(url)
            partial.rename(arguments.announce)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
