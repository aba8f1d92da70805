"""A real Slurm of several virtual nodes on this machine: up in a second, gone without a trace."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.support import PATIENCE

# slurmctld and slurmd live here, which is not on every user's PATH.
_PATH = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun", "scancel", "sinfo")
_ADDRESS = "127.0.0.1"
_NODES = ("node1", "node2")
# The configuration of the controller and all commands, then of each node, and its munge.
_CONFS = {"slurm.conf": "munge"} | {f"{node}.conf": f"munge-{node}" for node in _NODES}
_CPUS, _GPUS = 16, 8
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
_ALL_JOBS = ("squeue", "-r", "-t", "all")
_ALL_NODES = ("sinfo", "-N", "-l")

_SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again after cred_expire + 1 seconds; Slurm's default is two minutes.
AuthInfo=socket={folder}/{munge}.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
# The nodes' copies of this file differ in the socket.
DebugFlags=NO_CONF_HASH
# No control groups, no accounting database: neither needs to exist on a test machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
ReturnToService=2
# The nodes may claim more processors and memory than this machine has.
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,sched_interval=1,bf_interval=1,batch_sched_delay=0
# A job that is cancelled saves and ends its log within this, also on a busy machine.
KillWait=60
# Slurm waits 10 seconds for an answer by default, and as long for a controller that is away.
MessageTimeout=20
# Finished jobs stay listed, so that a test can read how they ended.
MinJobAge=3600
GresTypes=gpu
# Jobs of the second partition preempt jobs of the first, which get GraceTime to save.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=120 State=UP
PartitionName=test Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent PriorityTier=2
"""


def why_unavailable() -> str:
    """Return the reason why this machine cannot run Slurm; empty if it can."""
    missing = [name for name in _COMMANDS if shutil.which(name, path=_PATH) is None]
    if not missing:
        return ""
    return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"


class Cluster:
    """One controller, a daemon for each of two nodes, and a munge for each of the three.

    All are children of this process. A munge serves one daemon, as on a real cluster: when two
    nodes show it the same credential, the second is told of a replay, and slurmd 22.05 may free
    the text of that error from two threads at once and crash.

    Everything lives in one temporary folder. The nodes are called node1 and node2; the names need
    not resolve, because Slurm has their address. Each claims 16 processors and 8 GPUs.
    """

    def __init__(self) -> None:
        # Not below pytest's folder: a Unix socket's path holds about 100 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # A Slurm job that runs the tests must not leak its own settings into this cluster.
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = {**own, "PATH": _PATH, "SLURM_CONF": str(self._folder / "slurm.conf")}

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        """Start the cluster; on leaving, end its jobs and daemons and remove its folder."""
        try:
            self._write_files()
            self._start_daemons()
            yield self
        finally:
            self._stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    def command(self, *words: object) -> str:
        """Run a Slurm command and return its output without the last line break."""
        return self.attempt(*words, check=True).stdout.strip()

    def attempt(
        self,
        *words: object,
        check: bool = False,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with this cluster's settings.

        Raises:
            AssertionError: `check` is set and the command failed; shows its output.
        """
        done = subprocess.run(
            [str(word) for word in words],
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert not (check and done.returncode), f"{words}: {done.stdout}{done.stderr}"
        return done

    def states(self, job: str) -> dict[str, str]:
        """State of each element of a job, such as `{"7": "RUNNING"}` or `{"8_0": "FAILED"}`."""
        listing = self.attempt("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").stdout
        return dict(line.split() for line in listing.splitlines())

    def wait(
        self,
        job: str,
        until: Callable[[set[str]], bool] = _ENDED.issuperset,
        *,
        seconds: float = PATIENCE,
    ) -> dict[str, str]:
        """Poll until the set of a job's states satisfies `until`; by default until it has ended.

        Not `sbatch --wait`, which looks only every few seconds.

        Raises:
            AssertionError: it took longer than `seconds`.
        """
        found: dict[str, str] = {}

        def satisfied() -> bool:
            nonlocal found
            found = self.states(job)
            return bool(found) and until(set(found.values()))

        self.poll(satisfied, seconds=seconds)
        return found

    def poll(self, ready: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
        """Poll a condition until it is true.

        Raises:
            AssertionError: it took longer than `seconds`, or a daemon ended by itself; shows jobs,
                nodes and the last log lines.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            fault = f"not within {seconds} s" if time.monotonic() > deadline else ""
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    fault = f"{name} ended with {daemon.returncode}"
            if fault:
                views = [self.attempt(c, *f).stdout for c, *f in (_ALL_JOBS, _ALL_NODES)]
                logs = [f"{p.name}:\n{p.read_text()[-1000:]}" for p in self._folder.glob("*.log")]
                raise AssertionError("\n".join([fault, *views, *logs]))
            time.sleep(0.25)  # a look may be a command of Slurm, which costs CPU

    def cancel_all(self) -> None:
        """End every job and wait until its processes are gone."""
        self.attempt("scancel", f"--user={os.getuid()}")
        self.poll(lambda: not self.attempt("squeue", "-h").stdout)

    def find_rank(self, program: str, rank: int) -> int:
        """Process id of a rank of the only step that runs a program."""
        for process in self._processes(f"SLURM_PROCID={rank}\0"):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if program.encode() in words[1:3]:  # the second behind `forked_python.py`
                return int(process.name)
        raise AssertionError(f"no rank {rank} of {program}")

    def cut_power(self, node: str) -> None:
        """End everything on a node at once, and let the controller notice.

        It would notice after SlurmdTimeout; this has the same effect.
        """
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for task in list(self._processes(f"SLURMD_NODENAME={node}\0")):
            with contextlib.suppress(OSError):
                parent = Path("/proc") / (task / "stat").read_text().rpartition(")")[2].split()[1]
                if (parent / "comm").read_text().startswith("slurmstepd"):
                    _kill(parent)
            _kill(task)
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def restore_power(self, node: str) -> None:
        """Start a node's daemon again; it takes jobs at once."""
        self._start_node(node)
        self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """End the controller, as for an upgrade, and start it again on leaving."""
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(PATIENCE)
        try:
            yield
        finally:
            self._start("slurmctld", "slurmctld", "-D")
            self.poll(lambda: self.attempt("scontrol", "ping").stdout.count("UP") == 1)

    def _write_files(self) -> None:
        folder = self._folder
        # Slurm's own user must reach its spool below this folder.
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (folder / "state").mkdir()
        controller_port, *ports = _free_ports(1 + len(_NODES))
        host = socket.gethostname().split(".")[0]
        lines = []
        for node, port in zip(_NODES, ports, strict=True):
            # Slurm needs both folders of every node to differ.
            (folder / "spool" / node).mkdir(parents=True)
            (folder / "tmp" / node).mkdir(parents=True)
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr={_ADDRESS} Port={port} "
                f"CPUs={_CPUS} RealMemory=256000 Gres=gpu:{_GPUS} State=UNKNOWN\n"
            )
        for name, munge in _CONFS.items():
            conf = _SLURM_CONF.format(
                host=host,
                address=_ADDRESS,
                port=controller_port,
                user=_user_name(),
                folder=folder,
                munge=munge,
            )
            (folder / name).write_text("".join(lines) + conf)
        # Slurm only counts GPUs that have a character device; any such device will do.
        for i in range(_GPUS):
            (folder / f"gpu{i}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(
            f"NodeName={','.join(_NODES)} Name=gpu File={folder}/gpu[0-{_GPUS - 1}]\n"
        )

    def _start_daemons(self) -> None:
        folder = self._folder
        for munge in _CONFS.values():
            self._start(
                munge,
                *("munged", "--foreground"),
                "--force",  # it would refuse a key below a world-writable folder
                *(f"--socket={folder}/{munge}.socket", f"--key-file={folder}/munge.key"),
                *(f"--pid-file={folder}/{munge}.pid", f"--seed-file={folder}/{munge}.seed"),
                f"--log-file={folder}/{munge}.log",
            )
        self.poll(lambda: all((folder / f"{munge}.socket").exists() for munge in _CONFS.values()))
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in _NODES:
            self._start_node(node)
        count = len(_NODES)

        def idle() -> bool:
            return (
                self.attempt("sinfo", "-h", "-N", "-p", "test", "-o", "%T").stdout.split()
                == ["idle"] * count
            )

        self.poll(idle)
        # Idle proves that nodes reach the controller; only a step proves the way back.
        self.command("srun", f"--nodes={count}", "--ntasks-per-node=1", "true")
        self.poll(idle)

    def _start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node, "-f", f"{self._folder}/{node}.conf")

    def _start(self, name: str, *words: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            daemon = subprocess.Popen(
                words, env=self.environment, cwd=self._folder, stdout=log, stderr=log
            )
        self._daemons[name] = daemon

    def _stop(self) -> None:
        # A cluster that never started has no jobs and no controller.
        with contextlib.suppress(AssertionError):
            self.cancel_all()
        # Munge last: the others need it to shut down.
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # A job's own daemon outlives slurmd; it and its tasks know this cluster by its config.
        for process in self._processes():
            _kill(process)

    def _processes(self, *marks: str) -> Iterator[Path]:
        """Processes of this cluster's jobs whose environment holds all marks."""
        wanted = [mark.encode() for mark in (f"SLURM_CONF={self._folder}/", *marks)]
        for process in Path("/proc").glob("[0-9]*"):
            # Gone by now, or another user's.
            with contextlib.suppress(OSError):
                environment = (process / "environ").read_bytes()
                if all(mark in environment for mark in wanted):
                    yield process


def _user_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _kill(process: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(process.name), signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Return free ports; held open together so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_ADDRESS, 0))
        return [each.getsockname()[1] for each in sockets]


class BatchJob:
    """A submitted job and its log; a subclass submits it.

    Args:
        cluster: runs it.
        log: the file of its output, whose attempts are appended.
    """

    id: str

    def __init__(self, cluster: Cluster, log: Path) -> None:
        self.cluster, self.log = cluster, log

    def find(self, pattern: str) -> list[str]:
        """Return matches of the pattern, or of its group, in the lines of the log."""
        text = self.log.read_text() if self.log.exists() else ""
        return re.findall(pattern, text, re.MULTILINE)

    def end(self) -> str:
        """Wait until the job has ended and return its state."""
        return self.cluster.wait(self.id)[self.id]
