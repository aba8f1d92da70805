"""Start language models on a job's nodes, run a synthesis on them, and stop them.

    python -m pipeline.submission.serving CONFIG [key=value ...] -- [FLAGS-OF-SRUN]

    nodes ──> servers: srun, `start_server` of cluster.env ──all answer──> ReasonAug synthesize
                                                                           │
      finished, or requeued <── exit code, signal <── servers are stopped <┘

Called by `slurm/synthesize.sbatch`. Every answer is in the synthesis's ledger, so each start
continues where the one before it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DiffembedError, Stopped, UserError, errors_end_the_process
from pipeline.submission import allocation
from pipeline.submission.restart import MAX_IDLE, Ending, History, continue_job, decide, log

# How long a synthesis may take to stop after it was asked to: it finishes the requests in flight.
# The first is for the end of the job's time, of which Slurm warns two minutes before.
_STOP_SECONDS = {signal.SIGUSR1: 60, signal.SIGTERM: 20}
_SERVER_STOP_SECONDS = 20
# A server that ends is started again so often.
_MAX_STARTS = 3
_POLL_SECONDS = 1.0
_PORTS = range(20_000, 30_000)
_SERVER = """\
set -euo pipefail
source "${DIFFEMBED_CLUSTER_ENV:-slurm/cluster.env}"
set +u
activate
set -u
export SERVER_RANK=$SLURM_PROCID
start_server "$@"
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Synthesis:
    """A synthesis as `python -m ReasonAug synthesize --state` describes it.

    Args:
        output_dir: its folder.
        model: the model's name.
        api_key_env: the variable with the key of its servers.
        rows: number of rows if it is finished; None if not.
        config: the resolved config, as YAML.
    """

    output_dir: Path
    model: str
    api_key_env: str | None
    rows: int | None
    config: str


def describe_synthesis(words: Sequence[str]) -> Synthesis:
    """Read a synthesis's config, and tell if it is finished.

    By a program, because `ReasonAug` is built on this package and not the reverse.

    Args:
        words: path of the config and overrides.

    Raises:
        DiffembedError: that program fails, with its message and exit code.
    """
    command = [sys.executable, "-m", "ReasonAug", "synthesize", *words, "--state"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        kind = UserError if done.returncode == 2 else DiffembedError
        raise kind(lines[-1].removeprefix("UserError: "))
    tree = json.loads(done.stdout.splitlines()[-1])
    return Synthesis(**{**tree, "output_dir": Path(tree["output_dir"])})


def divide(nodes: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Divide nodes into servers of `size` nodes each.

    Raises:
        UserError: they are too few, or some would be left over.
    """
    if not nodes or len(nodes) % size:
        raise UserError(
            f"{len(nodes)} nodes for servers of SERVER_NODES={size}",
            allowed=f"a multiple of {size}",
            fix="change --nodes in SYNTHESIZE_FLAGS, or SERVER_NODES, in slurm/cluster.env",
        )
    return [tuple(nodes[at : at + size]) for at in range(0, len(nodes), size)]


class Server:
    """One server on some of the job's nodes.

    Args:
        number: among the servers of this job.
        nodes: its nodes; the first answers.
        model: the model's name, for `start_server`.
        folder: receives its log.
        flags: of srun.
    """

    def __init__(
        self, number: int, nodes: Sequence[str], model: str, folder: Path, flags: Sequence[str]
    ) -> None:
        job = int(os.environ["SLURM_JOB_ID"])
        # Two jobs on one node must not meet: each has 64 ports, two for each server, because a
        # server of several nodes also uses the next one.
        self._port = _PORTS[(job * 64 + number * 2) % len(_PORTS)]
        self._number, self._nodes, self._model, self._flags = number, nodes, model, flags
        self.host = allocation.address(nodes[0])
        self.url = f"http://{self.host}:{self._port}/v1"
        self.log = folder / f"server-{job}-{number}.out"
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it answers later."""
        self.starts += 1
        count = str(len(self._nodes))
        words = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
        # The other nodes of a server serve nothing without the one that has ended.
        words += [f"--nodelist={','.join(self._nodes)}", "--kill-on-bad-exit=1", "--overlap"]
        # By default a task gets one CPU. A server that is started again keeps its earlier log.
        words += [f"--cpus-per-task={os.environ['SLURM_CPUS_ON_NODE']}", "--open-mode=append"]
        # Slurm must not expand a % in the folder's name.
        words += [f"--output={str(self.log).replace('%', '%%')}", *self._flags]
        own = {"SERVER_PORT": str(self._port), "SERVER_HEAD": self.host, "SERVER_NODES": count}
        self._process = subprocess.Popen(
            [*words, "bash", "-c", _SERVER, "start_server", self._model],
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            # In its own session: Ctrl-C and the signals of a job reach this process first.
            start_new_session=True,
        )
        log(f"server {self._number} starts on {','.join(self._nodes)}: {self.url}, log {self.log}")

    def has_ended(self) -> bool:
        """Return True if its processes are gone."""
        return self._process is None or self._process.poll() is not None

    def answers(self) -> bool:
        """Return True if it answers a request in any way but a server error."""
        # A site's proxy does not know the nodes of a job.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/models", timeout=5):
                return True
        except urllib.error.HTTPError as error:
            # 401 comes from a server that wants a key: this request has none.
            return error.code < 500
        except (OSError, ValueError):
            return False

    def last_line(self) -> str:
        """Return the last line of its log."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else "its log is empty"
        return "it has no log"

    def ask_to_stop(self) -> None:
        """Send SIGTERM, which srun forwards."""
        if self._process and not self.has_ended():
            self._process.terminate()

    def kill(self, deadline: float) -> None:
        """Wait for its end until a deadline, then kill it."""
        if self._process:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Interrupted(Exception):  # noqa: N818 -- an outcome, not a fault
    """A signal asks this job to end."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise `Interrupted` at the first signal of Slurm; ignore later ones, and all afterwards.

    A requeue sends SIGTERM, too, which must not interrupt the requeue itself.
    """

    def ignore() -> None:
        for each in _STOP_SECONDS:
            signal.signal(each, signal.SIG_IGN)

    def interrupt(number: int, _: Any) -> None:
        ignore()
        raise Interrupted(signal.Signals(number))

    for number in _STOP_SECONDS:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        ignore()


@contextlib.contextmanager
def running(servers: Sequence[Server], seconds: float) -> Iterator[None]:
    """Start servers and wait until all answer; stop them, whatever happens.

    Raises:
        DiffembedError: one ends, or does not answer in time.
    """
    try:
        for server in servers:
            server.start()
        _wait_until_all_answer(servers, seconds)
        yield
    finally:
        # All are asked before the first is waited for, so that one period of grace serves all.
        for server in servers:
            server.ask_to_stop()
        deadline = time.monotonic() + _SERVER_STOP_SECONDS
        for server in servers:
            server.kill(deadline)


def _wait_until_all_answer(servers: Sequence[Server], seconds: float) -> None:
    start = time.monotonic()
    waiting = list(servers)
    while waiting:
        for server in [*waiting]:
            if server.has_ended():
                raise DiffembedError(
                    f"the server at {server.url} ended before it answered: {server.last_line()} | "
                    f"fix: read {server.log}; start_server in slurm/cluster.env starts it"
                )
            if server.answers():
                waiting.remove(server)
                log(f"{server.url} answers after {time.monotonic() - start:.0f} s")
        if waiting and time.monotonic() - start > seconds:
            raise DiffembedError(
                f"the server at {waiting[0].url} did not answer within SERVER_SECONDS={seconds:g}: "
                f"{waiting[0].last_line()} | fix: read {waiting[0].log}, or raise SERVER_SECONDS "
                f"in slurm/cluster.env"
            )
        time.sleep(_POLL_SECONDS if waiting else 0)


def run_stages(words: Sequence[str], synthesis: Synthesis, servers: Sequence[Server]) -> int:
    """Run the synthesis against the servers; return its exit code, or 1 if no server is left.

    Raises:
        Interrupted: by a signal, after the synthesis has stopped.
    """
    command = [sys.executable, "-m", "ReasonAug", "synthesize", *words]
    if servers:
        key = synthesis.api_key_env
        entries = [{"url": server.url, "api_key_env": key} for server in servers]
        command.append(f"model.servers={json.dumps(entries)}")
    hosts = [server.host for server in servers]
    # As for servers: signals reach this process first, which stops the synthesis before them.
    stages = subprocess.Popen(command, env=without_proxy(os.environ, hosts), start_new_session=True)
    try:
        while (code := stages.poll()) is None:
            _start_again(servers)
            if servers and all(server.has_ended() for server in servers):
                log("no server is left")
                _stop(stages, _STOP_SECONDS[signal.SIGTERM])
                return 1
            time.sleep(_POLL_SECONDS)
        return code
    except Interrupted as interrupted:
        log(f"{interrupted}: the synthesis stops")
        _stop(stages, _STOP_SECONDS[interrupted.number])
        raise


def without_proxy(environment: Mapping[str, str], hosts: Sequence[str]) -> dict[str, str]:
    """Return an environment in which requests to some hosts use no proxy."""
    # Both spellings, because libraries read one or the other.
    known = {environment[name] for name in ("no_proxy", "NO_PROXY") if environment.get(name)}
    value = ",".join([*sorted(known), *dict.fromkeys(hosts)])
    return {**environment, "no_proxy": value, "NO_PROXY": value}


def _start_again(servers: Sequence[Server]) -> None:
    """Start servers that have ended; the synthesis asks the others meanwhile."""
    for server in servers:
        if server.has_ended() and server.starts < _MAX_STARTS:
            log(f"the server at {server.url} has ended: {server.last_line()}")
            server.start()


def _stop(stages: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask the synthesis to stop; kill it, losing the requests in flight, if that takes too long."""
    stages.terminate()
    try:
        stages.wait(seconds)
    except subprocess.TimeoutExpired:
        stages.kill()
        stages.wait()


def progress(output_dir: Path) -> int:
    """Return the size of a synthesis's ledger, which grows with every answer."""
    return sum(path.stat().st_size for path in (output_dir / "ledger").glob("*.jsonl"))


def run(words: Sequence[str], flags: Sequence[str]) -> int:
    """Run one start of the job; return the exit code of the job.

    Raises:
        DiffembedError: the servers do not start, or the job makes no progress.
    """
    synthesis, job = describe_synthesis(words), allocation.own_id()
    folder = synthesis.output_dir / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    # Before the servers start: a start that dies in its first minute must count as idle too.
    history = History(synthesis.output_dir, job)
    history.start(progress(synthesis.output_dir), os.environ.get("SLURM_JOB_NODELIST", ""))
    log(f"start {history.num_starts} of job {job}: {synthesis.output_dir}")
    size, seconds = _site_number("SERVER_NODES"), _site_number("SERVER_SECONDS")
    groups = divide(allocation.node_names(), size) if size else []
    servers = [
        Server(number, nodes, synthesis.model, folder, flags) for number, nodes in enumerate(groups)
    ]
    code, signalled, fault = 1, "", ""
    try:
        with signals_interrupt(), running(servers, seconds):
            code = run_stages(words, synthesis, servers)
            # The synthesis gives up on servers that hang; others may start.
            if code == Stopped.exit_code and servers and not any(s.answers() for s in servers):
                code = 1
    except Interrupted as interrupted:
        code, signalled = Stopped.exit_code, interrupted.number.name
    except DiffembedError as error:
        # On the first start, the command line is probably wrong, and would fail again.
        if history.num_starts == 1:
            raise
        fault = f", {error}"
    log(f"end: exit code {code}{fault}")
    _end(synthesis.output_dir, job, history, code, signalled)
    return code


def _site_number(name: str) -> int:
    """Return a number of the site's file.

    Raises:
        UserError: it is none.
    """
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"slurm/cluster.env: {name}={value}", allowed="a whole number")
    return int(value)


def _end(output_dir: Path, job: str, history: History, code: int, signalled: str) -> None:
    """Requeue the job if that helps, and print the decision.

    Raises:
        DiffembedError: it makes no progress.
    """
    state = allocation.read_state(job)
    how = f"exit code {code}" + (f" after {signalled}" if signalled else "")
    size = progress(output_dir)
    history.end(how)
    ending = Ending(
        code=code,
        out_of_time=signalled == "SIGUSR1",
        preempted=state.preempted,
        running=state.running,
        idle_starts=history.idle_starts(size),
        what="the synthesis",
    )
    verdict, why = decide(ending)
    if verdict == "stuck":
        raise DiffembedError(
            f"job {job} recorded no answer across {MAX_IDLE} requeues "
            f"({'; '.join(history.endings(size))}) | fix: read the log above, then submit again"
        )
    if verdict == "requeue":
        log(continue_job(job, history, why))
    elif code == Stopped.exit_code and state.running:
        log("not requeued: the synthesis stopped (see its last line); submit again to continue")
    else:
        log(f"not requeued: {why}")


def main(words: list[str]) -> None:
    """Run the job of this batch script."""
    at = words.index("--") if "--" in words else len(words)
    with errors_end_the_process():
        sys.exit(run(words[:at], words[at + 1 :]))


if __name__ == "__main__":
    main(sys.argv[1:])
