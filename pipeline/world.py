"""Which rank this is and where the ranks meet, as the launcher says it; free of torch."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import DiffembedError, UserError

# Per launcher: the variables that hold rank, world size and local rank.
_LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Every count of the process group in one place."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False  # by a launcher, as one of its ranks
    launchers: tuple[int, ...] = ()  # its processes (see launcher.processes), if their end matters

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes for all."""
        return self.rank == 0


def discover_world(environ: Mapping[str, str] | None = None) -> World:
    """Read rank and world size from whichever launcher started this process.

    Raises:
        UserError: a launcher set only part of its variables, no number, or a rank out of range.
    """
    env = os.environ if environ is None else environ
    for launcher, (rank, size, local_rank) in _LAUNCHERS.items():
        present = [name for name in (rank, size, local_rank) if name in env]
        # A plain `python` inside an sbatch script sees SLURM_PROCID=0 but is no step of srun.
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
    """Return how many ranks the launcher started on this host, 1 where it does not say."""
    env = os.environ if environ is None else environ
    if "SLURM_CPUS_PER_TASK" in env and "SLURM_STEP_NUM_TASKS" in env:
        return 1  # Slurm has given each rank cores of its own
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if name in env:
            return max(1, _number(env, name))
    return 1


def gpu_asked_for(
    environ: Mapping[str, str] | None = None, devices: tuple[str, ...] = _GPU_DEVICES
) -> str:
    """Return what says that this process should compute on a GPU, empty where nothing does.

    A driver too old for torch makes every GPU invisible to it: a run would otherwise train on the
    CPU, for days, without an error.

    Args:
        environ: variables of the process.
        devices: files of which a machine with a GPU has one.
    """
    env = os.environ if environ is None else environ
    hidden = env.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")
    if hidden or env.get("DS_ACCELERATOR") == "cpu":
        return ""
    found = [device for device in devices if Path(device).exists()]
    granted = [name for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS") if env.get(name)]
    if not found or ("SLURM_JOB_ID" in env and not granted):
        return ""
    return f"{granted[0]}={env[granted[0]]}" if granted else f"there is {found[0]}"


def meeting_place(environ: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port at which rank 0 waits for the others, the same on all ranks.

    Raises:
        UserError: nobody named rank 0's host, its name is unknown here, or the port is no number.
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
            found, allowed="a name or address by which every host reaches that of rank 0"
        ) from error
    return address, port


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError as error:
        raise UserError(f"{name}={env[name]}", allowed="a whole number") from error


def _port_of_job(env: Mapping[str, str]) -> int:
    """A port that the ranks of a job agree on and two jobs on one node hardly share."""
    job = env.get("SLURM_JOB_ID") or env.get("PMIX_NAMESPACE") or ""
    return 20000 + zlib.crc32(job.encode()) % 10000


def _first_host(env: Mapping[str, str]) -> str:
    """Address of rank 0: the first host of a Slurm job, this machine where there is one."""
    if "OMPI_COMM_WORLD_SIZE" in env:
        several = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") != env["OMPI_COMM_WORLD_SIZE"]
        nodes = env.get("SLURM_JOB_NODELIST")
    else:
        several = env.get("SLURM_STEP_NUM_NODES", "1") != "1"
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not several:
        return "127.0.0.1"
    fix = "set MASTER_ADDR to the host of rank 0 (mpirun -x MASTER_ADDR=HOST)"
    if not nodes:
        raise UserError("MASTER_ADDR is not set, and the ranks are on several hosts", fix=fix)
    try:
        hosts = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"MASTER_ADDR is not set, and {error}", fix=fix) from error
    return hosts.split()[0]
