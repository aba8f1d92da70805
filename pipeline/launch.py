"""Find out, without torch, how this process was launched; launch ranks on this machine.

    variables of torchrun, deepspeed, Open MPI or srun -> World, rendezvous (address, port)
    parent processes, launcher's port                  -> has the launcher ended?
    run_ranks(command, N)                              -> N ranks, their exit code

Ranks whose launcher was killed must end: the others would wait for them until the timeout, in a
folder that the next start needs.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DiffembedError, UserError, say_line, several

# Variables that hold rank, world size and local rank, by launcher. Where srun or mpirun starts one
# torchrun per host, a rank has the variables of both: torchrun's come first.
_LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
# Of NVIDIA's driver, and of AMD's.
_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Every count of the process group in one place."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False  # by a launcher, as one of its ranks
    launchers: tuple[int, ...] = ()  # see `launcher_processes`; empty if their end does not matter

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes for all."""
        return self.rank == 0


def discover_world(environ: Mapping[str, str] | None = None) -> World:
    """Read rank and world size from whichever launcher started this process.

    Raises:
        UserError: a launcher set only part of its variables, no number, or a rank out of range.
    """
    env = os.environ if environ is None else environ
    for launcher, (rank, size, local_rank) in _LAUNCHERS.items():
        present = [name for name in (rank, size, local_rank) if name in env]
        # A plain `python` inside an sbatch script sees SLURM_PROCID=0 but is not a step of srun.
        if rank not in present or size not in present:
            continue
        if local_rank not in present:
            raise UserError(
                f"{launcher} set {rank} and {size} but not {local_rank}",
                fix=f"if they are left from another job, run `unset {rank} {size}`; else start "
                f"the ranks by {launcher}",
            )
        world = World(
            rank=_number(env, rank),
            world_size=_number(env, size),
            local_rank=_number(env, local_rank),
            launched=True,
        )
        if not 0 <= world.rank < world.world_size:
            raise UserError(
                f"{rank}={world.rank}", allowed=f"0 to {size}-1 ({world.world_size - 1})"
            )
        return world
    return World()


def local_ranks(environ: Mapping[str, str] | None = None) -> int:
    """Return the number of ranks that the launcher started on this host, 1 where it is unknown.

    Of a step of srun, the most that it started on one of its hosts.
    """
    env = os.environ if environ is None else environ
    if (ranks := _counted_ranks(env)) is not None:
        return ranks
    if "SLURM_STEP_NUM_TASKS" in env:
        # As in `8(x3),2`: 8 on each of three hosts, 2 on the last.
        words = re.findall(r"(?:^|,)(\d+)", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return max((1, *map(int, words)))
    return 1


def _counted_ranks(env: Mapping[str, str]) -> int | None:
    """Return the ranks on this host as torchrun, deepspeed and Open MPI count them.

    They come before Slurm's variables, which their ranks inherit where a step of srun started them.
    """
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if name in env:
            return max(1, _number(env, name))
    return None


# Variables that make a process a rank of a launcher, an MPI job or a Slurm step.
_RANK_VARIABLES = re.compile(
    r"(SLURM|SRUN|OMPI|PMI\w*|PRTE|TORCHELASTIC)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)"
    r"|MASTER_(ADDR|PORT)|DIFFEMBED_STARTED_BY"
)
# Holds the process id of `run_ranks`, which a rank alone would not know for its launcher.
_STARTED_BY = "DIFFEMBED_STARTED_BY"
# Needed to find Slurm itself.
_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS"}


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a process that must not act as a rank of this process's job."""
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not _RANK_VARIABLES.fullmatch(name)
    }


def requested_gpu(
    environ: Mapping[str, str] | None = None, devices: tuple[str, ...] = _GPU_DEVICES
) -> str:
    """Return the evidence that this process should compute on a GPU, or an empty text.

    A driver too old for torch makes every GPU invisible to it: a run would otherwise train on the
    CPU, for days, without an error.

    Args:
        environ: variables of the process.
        devices: files of which a machine with a GPU has one.
    """
    env = os.environ if environ is None else environ
    # NoDevFiles is what Slurm sets in a job without GPUs.
    hidden = env.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")
    if hidden or env.get("DS_ACCELERATOR") == "cpu":
        return ""
    found = [device for device in devices if Path(device).exists()]
    granted = [name for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS") if env.get(name)]
    # A job without GPUs may run on a host that has some.
    if not found or ("SLURM_JOB_ID" in env and not granted):
        return ""
    return f"{granted[0]}={env[granted[0]]}" if granted else f"there is {found[0]}"


def require_visible_gpu(*, visible: bool, torch_version: str) -> None:
    """Refuse to compute on the CPU of a machine whose GPU should be used.

    Args:
        visible: whether torch sees a GPU.
        torch_version: for the message.

    Raises:
        UserError: it sees none, although one was requested.
    """
    if not visible and (requested := requested_gpu()):
        raise UserError(
            f"{requested}, but torch {torch_version} sees no GPU",
            allowed="a torch that the driver supports (`nvidia-smi` shows its CUDA version)",
            fix="install such a torch, or set DS_ACCELERATOR=cpu to compute on the CPU",
        )


def require_accelerator(*, visible: bool) -> None:
    """Refuse a DS_ACCELERATOR with which DeepSpeed would not compute where torch does.

    Args:
        visible: whether torch sees a GPU.

    Raises:
        UserError: it names another device.
    """
    chosen, wanted = os.environ.get("DS_ACCELERATOR"), "cuda" if visible else "cpu"
    if chosen in (None, wanted):
        return
    fix = "unset DS_ACCELERATOR"
    if chosen == "cpu":
        fix += ", or export CUDA_VISIBLE_DEVICES= too, to compute on the CPU"
    sees = "a GPU" if visible else "no GPU"
    raise UserError(
        f"DS_ACCELERATOR={chosen}, but torch sees {sees}", allowed=f"{wanted}, or none", fix=fix
    )


_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def let_gpu_memory_grow(environ: MutableMapping[str, str] | None = None) -> None:
    """Let torch extend its blocks of GPU memory, unless the user has configured the allocator.

    A large buffer that was freed is divided among whatever comes next, some of which stays: the
    next buffer of that size would need memory in addition. Call it before torch uses a GPU.
    """
    env = os.environ if environ is None else environ
    if not any(name in env for name in _ALLOCATOR):
        # The new name and the old one: each is read by some of the torch versions we run with.
        env.update(dict.fromkeys(_ALLOCATOR[:2], "expandable_segments:True"))


def threads_are_chosen() -> bool:
    """Return whether the user, and not torchrun, has set OMP_NUM_THREADS.

    torchrun sets it to 1 where it starts several ranks and the user has set nothing: the optimizer
    of an offloaded run would then use one core a rank.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return bool(os.environ.get("OMP_NUM_THREADS"))
    try:
        # The environment torchrun was started with, without the variables it has set since.
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in given)


def share_cores(world: World) -> None:
    """Give this rank its share of the cores, unless the user has chosen one.

    Every rank would otherwise start a thread for each core of the host, and they would wait for
    each other.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads_are_chosen():
        return
    # Each rank that srun started has its own cores, and sees no others.
    cores, ranks = len(os.sched_getaffinity(0)), _counted_ranks(os.environ) or 1
    threads = max(1, cores // ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if world.is_main:
        say_line(
            f"OMP_NUM_THREADS={threads}: {several(cores, 'core')} for {several(ranks, 'rank')} "
            "on this host"
        )


def rendezvous(environ: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Return address and port at which rank 0 waits for the others, the same on all ranks.

    Raises:
        UserError: rank 0's host is unknown, its name does not resolve, or the port is not a number.
        DiffembedError: the name could not be looked up now.
    """
    env = os.environ if environ is None else environ
    address = env.get("MASTER_ADDR") or _first_host(env)
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else _port_of_job(env)
    try:
        socket.getaddrinfo(address, port)
    except socket.gaierror as error:
        # Ranks would look it up again and again until the timeout.
        found = f"MASTER_ADDR={address}: {error.strerror} ({socket.gethostname()})"
        if error.errno != socket.EAI_NONAME:
            raise DiffembedError(found) from error
        raise UserError(
            found, allowed="a name or address by which every host reaches the host of rank 0"
        ) from error
    return address, port


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError as error:
        raise UserError(f"{name}={env[name]}", allowed="a whole number") from error


def _port_of_job(env: Mapping[str, str]) -> int:
    """Return a port that all ranks of a run choose, and that two runs on a node rarely share.

    Several runs may share the nodes of one Slurm job: each is a step of srun, or an mpirun, whose
    ranks on other nodes are in a step of their own.
    """
    job, run = env.get("SLURM_JOB_ID", ""), env.get("PMIX_NAMESPACE", "")
    if "SLURM_STEP_ID" in env and "OMPI_COMM_WORLD_SIZE" not in env:
        run = env["SLURM_STEP_ID"]
    job = f"{job}.{run}" if job and run else job or run
    # Below 32768, where Linux begins to give connections ports of its own choice.
    return 20000 + zlib.crc32(job.encode()) % 10000


def _first_host(env: Mapping[str, str]) -> str:
    """Return rank 0's address: the first host of a Slurm job, or this one if alone."""
    if "OMPI_COMM_WORLD_SIZE" in env:
        on_several_hosts = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") != env["OMPI_COMM_WORLD_SIZE"]
        nodes = env.get("SLURM_JOB_NODELIST")
    else:
        on_several_hosts = env.get("SLURM_STEP_NUM_NODES", "1") != "1"
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not on_several_hosts:
        return "127.0.0.1"
    fix = "set MASTER_ADDR to the host of rank 0 (mpirun -x MASTER_ADDR=HOST)"
    if not nodes:
        raise UserError("MASTER_ADDR is not set, and the ranks are on several hosts", fix=fix)
    try:
        hosts = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"MASTER_ADDR is not set, and {error}", fix=fix) from error
    return hosts.split()[0]


# Of one connection to the launcher, and of refusals until it counts as ended.
_TIMEOUT_SECONDS = 5.0
# Programs other than process 1 that adopt processes whose parent has ended.
_ADOPTERS = ("systemd", "slurmstepd")


def launcher_processes() -> tuple[int, ...]:
    """Return process ids of the parent, and of the command `deepspeed` if it started the parent.

    When that command is killed, its children keep running. Further ancestors do not count: a run
    keeps running when the shell is closed that it was started from.
    """
    parent = os.getppid()
    try:
        above = _parent_of(parent)
        return (parent, above) if _is_deepspeed(above) else (parent,)
    except OSError:  # the parent has just ended, or a system without /proc
        return (parent,)


def has_launcher(world: World, launchers: Sequence[int]) -> bool:
    """Return whether the end of these processes, of which one is the parent, ends the run.

    A rank alone that a shell or a script has started keeps running without them.
    """
    return world.launched or os.environ.get(_STARTED_BY, "") in [str(p) for p in launchers]


def _parent_of(process: int) -> int:
    # pid (name) state ppid ...; the name may hold anything but ends with the last bracket.
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _words_of(process: int) -> list[bytes]:
    return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")


def _is_deepspeed(process: int) -> bool:
    return any(word.rpartition(b"/")[2] == b"deepspeed" for word in _words_of(process)[:2])


def launcher_address(environ: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """Return address and port at which the launcher answers as long as it lives, if it has one.

    torchrun has one (the store on its first host, through which the ranks find each other), and so
    has Open MPI (the PMIx server of this host); both answer before the first rank starts.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        by_torchrun = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return (env["MASTER_ADDR"], int(env["MASTER_PORT"])) if by_torchrun else None
    if "OMPI_COMM_WORLD_RANK" in env:
        uris = " ".join(env[name] for name in sorted(env) if name.startswith("PMIX_SERVER_URI"))
        found = re.search(r";tcp4://([^:]+):(\d+)", uris)
        return (found[1], int(found[2])) if found else None
    return None


def require_launcher() -> None:
    """Raise if the launcher had already ended before this process looked up its parent.

    Some ranks may never have been started then, and the others would wait for them until the
    timeout, in a folder that the next start needs.

    Raises:
        DiffembedError: the launcher has ended.
    """
    if _left_by_deepspeed():
        raise DiffembedError("the command deepspeed has ended")
    where, deadline = launcher_address(), time.monotonic() + _TIMEOUT_SECONDS
    while where and _refuses(where):
        if time.monotonic() > deadline:
            address, port = where
            raise DiffembedError(f"the launcher that answered at {address}:{port} has ended")
        time.sleep(0.5)


def _left_by_deepspeed() -> bool:
    """Return whether `deepspeed` started the parent on this host and has ended since."""
    try:
        parent = os.getppid()
        above = _parent_of(parent)
        adopted = above == 1 or Path(f"/proc/{above}/comm").read_text().strip() in _ADOPTERS
        by_deepspeed = b"deepspeed.launcher.launch" in _words_of(parent)
        return by_deepspeed and adopted and not _is_deepspeed(above)
    except OSError:
        return False


def _refuses(where: tuple[str, int]) -> bool:
    """Return whether the host is there, but no process listens at the port."""
    try:
        socket.create_connection(where, timeout=_TIMEOUT_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # a network that is not up yet: joining waits for that
        return False
    return False


@contextmanager
def end_with_launcher(launchers: tuple[int, ...]) -> Iterator[None]:
    """End this process if the launcher's processes change while the block runs.

    For the block in which ranks wait for each other: nothing is lost yet.
    """
    joined = threading.Event()

    def watch() -> None:
        while launcher_processes() == launchers:
            if joined.wait(1.0):
                return
        say_line("the launcher ended before all ranks had joined", file=sys.stderr)
        os._exit(1)

    if launchers:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


# --- ranks on this machine -------------------------------------------------------------------

# After one rank has failed, the others notice it in their next collective call.
_GRACE_SECONDS = 15.0


def run_ranks(
    command: Sequence[str], num_ranks: int, *, grace_seconds: float = _GRACE_SECONDS
) -> int:
    """Run ranks of one command on this machine and wait for them.

    Signals are passed on to every rank. Unlike torchrun and deepspeed it returns the ranks' own
    exit code (75: stopped on request), and prints nothing.

    Args:
        command: of each rank.
        num_ranks: processes to start; a single one is started without a rendezvous.
        grace_seconds: after a rank has failed, the others have this long to end by themselves.

    Returns:
        The exit code of the rank that failed first, or 0; 128 + the signal that ended it.
    """
    asked: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    # Separate sessions, because a terminal sends Ctrl-C to all processes of a session.
    ranks = [
        subprocess.Popen(command, env=environment, start_new_session=True)
        for environment in local_environments(num_ranks)
    ]
    try:
        return _wait(ranks, asked, grace_seconds)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for rank in ranks:
            rank.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def local_environments(num_ranks: int) -> Iterator[dict[str, str]]:
    """Yield the environment of each rank on this machine; a single one has no rendezvous."""
    base = {**without_rank(os.environ), _STARTED_BY: str(os.getpid())}
    if num_ranks == 1:
        yield base
        return
    # Free now; where another program takes it before rank 0 does, that rank names the cure.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(num_ranks):
        yield {
            **base,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)},
            **{"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }


def _wait(ranks: Sequence[subprocess.Popen[bytes]], asked: list[int], grace_seconds: float) -> int:
    """Wait for all ranks, or until the grace after the first failure is over."""
    code, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        # Taken out one by one: a signal may come meanwhile, and is not to be lost.
        for _ in range(len(asked)):
            del asked[0]
            for rank in ranks:
                # Every request means: save and stop. A second one ends a rank at once.
                if rank.poll() is None:
                    rank.terminate()
        failed = [rank.returncode for rank in ranks if rank.poll() not in (None, 0)]
        if failed and code == 0:
            code, deadline = failed[0], time.monotonic() + grace_seconds
        time.sleep(0.05)
    failed = [rank.returncode for rank in ranks if rank.poll() not in (None, 0)]
    code = code or (failed[0] if failed else 0)
    return code if code >= 0 else 128 - code


def processor_name() -> str:
    """Return the name of this machine's processor, with the number of its cores."""
    name = "processor"
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores"


def count_gpus() -> int:
    """Return the number of GPUs that processes started here would see, without torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([device for device in chosen.split(",") if device.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())
