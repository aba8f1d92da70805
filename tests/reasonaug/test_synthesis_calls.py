"""Calls against a real server: each asked once, whatever the server or the machine does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import Stopped, UserError
from ReasonAug.synthesis.ledger import Ledger
from ReasonAug.synthesis.run import synthesize
from tests.reasonaug.language_server import FAULTS, Behaviour, LanguageServer, serving
from tests.reasonaug.small_synthesis import config_of, read, records, tree_of
from tests.support import free_port

pytestmark = pytest.mark.usefixtures("no_report")


@contextlib.contextmanager
def signal_once(condition: Callable[[], bool]) -> Iterator[None]:
    """Send this process SIGTERM as soon as a condition holds."""

    def watch() -> None:
        while not condition():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def rows(folder: Path) -> bytes:
    return (folder / "rows.jsonl").read_bytes()


def test_a_finished_run_asks_nothing_and_the_ledger_alone_gives_the_same_rows(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    before = rows(undisturbed)
    synthesize(config_of(undisturbed, dead))
    assert "finished already" in capsys.readouterr().out
    for name in ("finished.json", "rows.jsonl", "summary.json"):
        (undisturbed / name).unlink()
    for path in (undisturbed / "stages").iterdir():
        path.unlink()
    synthesize(config_of(undisturbed, dead))
    assert rows(undisturbed) == before


def test_faults_of_a_server_cost_tries_but_no_row(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behaviour = Behaviour(faults={**dict.fromkeys(FAULTS, 0.1), "endless": 0.02, "429-after": 0.02})
    with serving(behaviour) as (url, server):
        # The timeout ends an answer without end.
        synthesize(config_of(tmp_path / "out", url, limits={"timeout": 3}))
    met = Counter(fault for _, fault in server.met)
    assert set(met) == set(FAULTS)
    assert rows(tmp_path / "out") == rows(undisturbed)
    assert all(record["status"] == "ok" for record in records(tmp_path / "out"))
    assert server.most_in_flight <= 8


def test_a_server_without_structured_output_gives_the_same_rows(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its JSON comes in fences, with commas left behind or cut short, its verdicts in words."""
    with serving(Behaviour(structured=False)) as (url, _):
        synthesize(config_of(tmp_path / "out", url))
    assert "asked for none" in capsys.readouterr().err
    found = records(tmp_path / "out")
    assert any(record["prompt"].startswith("repair@") for record in found)
    assert any("```json" in record["answer"] for record in found)
    assert rows(tmp_path / "out") == rows(undisturbed)


def test_retry_after_is_respected(tmp_path: Path) -> None:
    """Nothing reaches the server for the second that it asked for."""
    with serving(Behaviour(faults={"429-after": 0.3})) as (url, server):
        synthesize(config_of(tmp_path / "out", url, limits={"concurrency": 1}), limit=3)
    assert len(server.refused_until_later) > 1
    for request in server.refused_until_later:
        assert server.times[request + 1] - server.times[request] >= 0.99


def test_a_refusal_is_recorded_and_costs_one_problem_only(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving(Behaviour(refusals=0.15)) as (url, server):
        synthesize(config_of(out, url))
        asked = server.answered.total()
        (out / "finished.json").unlink()
        synthesize(config_of(out, url))
        assert server.answered.total() == asked
        failed = [record for record in records(out) if record["status"] == "failed"]
        assert failed and all(r["reason"] == "refused: I cannot help with that." for r in failed)
        stages = (out / "stages").glob("*.jsonl")
        dropped = {item["dropped"] for path in stages for item in read(path)}
        assert {None, "refused"} <= dropped <= {None, "refused", "unverified"}
        # The same server, which knows the solutions of its problems.
        server.behaviour = dataclasses.replace(server.behaviour, refusals=0.0)
        synthesize(config_of(out, url), retry_failed=True)
        assert server.answered.total() >= asked + len(failed)
    assert rows(out) == rows(undisturbed)


def test_a_server_that_rejects_every_request_ends_the_run(tmp_path: Path) -> None:
    """Instead of recording a failure for each; another name of the parameter cures it."""
    out = tmp_path / "out"
    with serving(Behaviour(unknown="max_tokens")) as (url, server):
        with pytest.raises(UserError, match=r"rejects every request: .*max_tokens"):
            synthesize(config_of(out, url))
        assert len(records(out)) < 8
        server.keep_bodies = True
        cured = {"token_limit_key": "max_completion_tokens", "extra": {"temperature": None}}
        synthesize(config_of(tmp_path / "cured", url, model=cured), limit=1)
    assert all("temperature" not in body for body in server.bodies)
    assert {body["max_completion_tokens"] for body in server.bodies} == {2048}


def test_no_key_reaches_a_file_or_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server quotes the key in its errors, as real ones do."""
    key = "sk-planted-1234567890"
    monkeypatch.setenv("SOME_KEY", key)
    with serving(Behaviour(key=key)) as (url, _):
        server = [{"url": url, "api_key_env": "SOME_KEY"}]
        good = config_of(tmp_path / "good", model={"servers": server})
        synthesize(good, limit=2)
        wrong = f"{key}-wrong"
        monkeypatch.setenv("SOME_KEY", wrong)
        bad = config_of(tmp_path / "bad", model={"servers": server})
        with pytest.raises(UserError, match=r"HTTP 401: .*\[api key\]") as error:
            synthesize(bad)
        chain: BaseException | None = error.value
        while chain is not None:
            assert key not in str(chain)
            chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) > 1000 and key.encode() not in written
    said = capfd.readouterr()
    assert key not in said.out + said.err


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"url": "http://h/v1", "api_key": "sk-planted"}, "unknown key 'model.servers.0.api_key'"),
        ({"url": "http://h/v1", "api_key_env": "sk-planted"}, "a text that names no variable"),
        ({"url": "http://user:sk-planted@h/v1"}, "http://h with a user"),
        ({"url": "http://h/v1?key=sk-planted"}, "a URL without secrets"),
    ],
)
def test_a_key_in_a_config_is_refused_without_showing_it(
    server: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        config_of(tmp_path / "out", model={"servers": [server]})
    assert message in str(error.value)
    assert "sk-planted" not in str(error.value)


def test_a_missing_key_is_named_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with serving() as (url, server):
        servers = [{"url": url, "api_key_env": "SOME_KEY"}]
        with pytest.raises(UserError, match="SOME_KEY is not set"):
            synthesize(config_of(tmp_path / "out", model={"servers": servers}))
        assert server.requests == 0


def test_a_budget_stops_the_run_and_a_larger_one_continues_it(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prices = {"prompt": 1.0, "completion": 2.0}
    model = {"max_tokens": 600}
    with serving() as (url, server):
        for limits in ({"max_tokens": 12_000}, {"max_cost": 0.025}):
            with pytest.raises(Stopped, match=r"budget of .* calls are left") as stopped:
                synthesize(config_of(out, url, limits=limits, prices=prices, model=model))
            assert stopped.value.exit_code == 75
            used = [(r["prompt_tokens"], r["completion_tokens"]) for r in records(out)]
            if "max_tokens" in limits:
                assert 9_000 < sum(map(sum, used)) <= 12_000
            else:
                assert 0.020 < sum(p * 1e-6 + c * 2e-6 for p, c in used) <= 0.025
        assert "calls left" in capsys.readouterr().out
        synthesize(config_of(out, url, prices=prices, model=model))
        assert set(server.answered.values()) == {1}


def test_requests_a_minute_are_limited(tmp_path: Path) -> None:
    """600 a minute, so at most ten a second after the first burst."""
    with serving() as (url, server):
        synthesize(config_of(tmp_path / "out", url, limits={"requests_per_minute": 600}), limit=6)
    times = server.times
    for count in range(15, len(times)):
        assert times[count] - times[count - 15] >= 0.4


def test_a_dead_server_is_left_out_and_the_other_does_its_work(
    undisturbed: Path, tmp_path: Path
) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with serving() as (url, _):
        synthesize(config_of(tmp_path / "out", dead, url))
    assert rows(tmp_path / "out") == rows(undisturbed)


def test_two_servers_share_the_work_and_one_that_comes_late_joins(tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        url, early = stack.enter_context(serving(Behaviour(delay=0.1)))
        late: list[LanguageServer] = []

        def join() -> None:
            while early.answered.total() < 3:
                time.sleep(0.01)
            late.append(stack.enter_context(serving(port=port))[1])

        joining = threading.Thread(target=join)
        joining.start()
        config = config_of(
            tmp_path / "out",
            *(url, f"http://127.0.0.1:{port}/v1"),
            problems={"per_concept": 8},
            limits={"concurrency": 2},
            # Each server knows only the problems that it wrote itself.
            checks={"solution": False},
        )
        synthesize(config)
        joining.join()
        assert early.answered.total() > 0 and late[0].answered.total() > 0


def test_no_server_at_all_stops_the_run_to_be_continued(tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(Stopped, match=r"no answer from .* calls are left"):
        synthesize(config_of(tmp_path / "out", dead, limits={"patience": 0.5}))
    assert records(tmp_path / "out") == []


def test_the_batch_api_gives_the_same_rows(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some requests of each batch expire, and are part of the next one."""
    with serving(Behaviour(expired=0.3)) as (url, server):
        synthesize(config_of(tmp_path / "out", url, api="batch", batch={"max_requests": 7}))
        assert server.requests == 0 and len(server.batches) > 8
        assert set(server.answered.values()) == {1}
    assert "asked again" in capsys.readouterr().err
    assert rows(tmp_path / "out") == rows(undisturbed)
    assert {record["origin"] for record in records(tmp_path / "out")} == {"batch"}


@pytest.mark.parametrize("noted", [True, False], ids=["with its id", "without its id"])
def test_a_batch_of_a_killed_run_is_collected_instead_of_paid_again(
    noted: bool, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving() as (url, server):
        config = config_of(out, url, api="batch", batch={"poll": 30})
        with signal_once(lambda: bool(server.batches)), pytest.raises(Stopped, match="signal"):
            synthesize(config)
        assert len(server.batches) == 1
        if not noted:
            book = out / "ledger" / "batches.jsonl"
            book.write_text(book.read_text().split("\n")[0] + "\n")
        synthesize(config_of(out, url, api="batch"))
        assert set(server.answered.values()) == {1}
    assert rows(out) == rows(undisturbed)


def test_a_signal_ends_the_run_after_the_requests_in_flight(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(Behaviour(delay=0.2)) as (url, server):
        stopped = pytest.raises(Stopped, match=r"signal .* the same command continues")
        with signal_once(lambda: server.answered.total() > 3), stopped:
            synthesize(config_of(out, url, limits={"concurrency": 2}))
        assert server.answered.total() == len(records(out))


def test_another_prompt_or_model_asks_again_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts"
    prompts.mkdir()
    with serving() as (url, server):
        synthesize(config_of(out, url))
        asked = server.answered.total()
        (prompts / "check.md").write_text(
            "# User\nConcept: {concept}\nProblem:\n{problem}\n\nDoes solving this problem properly "
            "require it? Answer in JSON with verdict and reason."
        )
        synthesize(config_of(out, url, prompts=str(prompts)))
        assert server.answered.total() == asked + 15
        said = capsys.readouterr().err
        assert "15 recorded answers of another version of the prompt 'check' are not used" in said
        synthesize(config_of(out, url, model={"name": "other"}))
        said = capsys.readouterr().err
        assert "recorded answers of the model 'template' are not used" in said
        assert server.answered.total() == 2 * asked + 15


def test_a_ledger_in_use_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = config_of(out, "http://127.0.0.1:1/v1")
    with Ledger.open(out / "ledger"), pytest.raises(UserError, match="in use by process"):
        synthesize(config)


def test_a_dry_run_counts_the_calls_that_a_run_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with serving() as (url, server):
        prices = {"prompt": 1.0, "completion": 2.0}
        config = config_of(out, url, prices=prices, rewrites={"exam": 0.5})
        synthesize(config, dry_run=True)
        assert server.requests == 0
        planned = _calls_left(capsys.readouterr().out)
        synthesize(config)
        assert planned == server.answered.total()
        capsys.readouterr()
        synthesize(config, dry_run=True)
        assert _calls_left(capsys.readouterr().out) == 0


def _calls_left(said: str) -> int:
    found = re.search(r"^\| in all \| [\d,]+ \| ([\d,]+) \|", said, re.MULTILINE)
    assert found
    return int(found[1].replace(",", ""))


def test_a_sample_is_a_page_and_its_calls_count_for_the_whole_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving() as (url, server):
        synthesize(config_of(out, url), limit=4)
        page = (out / "sample.md").read_text()
        assert page.startswith("# Sample: 4 problems") and page.count("**Problem**") == 4
        assert not (out / "rows.jsonl").exists()
        assert 0 < server.answered.total() < 25
        synthesize(config_of(out, url))
        assert set(server.answered.values()) == {1}


def test_the_client_is_asked_for_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("ReasonAug.synthesis.")]:
        if name.rpartition(".")[2] in ("servers", "batches", "imports"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openai", None)
    config = config_of(tmp_path / "out", "http://127.0.0.1:1/v1")
    synthesize(config, dry_run=True)
    with pytest.raises(UserError, match=r"needs the package 'openai'.*diffembed\[synthesize\]"):
        synthesize(config)


def test_the_command_reads_overrides_and_ends_with_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ReasonAug.__main__ import main

    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree_of(tmp_path / "out", "http://127.0.0.1:1/v1")))
    began = time.monotonic()
    monkeypatch.setattr("sys.argv", ["ReasonAug", "synthesize", str(path), "limits.patience=0.2"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 75
    assert time.monotonic() - began < 60
    # From its server, or from any: one attempt may outlast the patience on a busy machine.
    assert capsys.readouterr().err.startswith("Stopped: no answer from ")
