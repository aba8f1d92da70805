"""Check what needs torch, in the ranks of a launcher: GPU, driver, attention kernels, all-reduce.

    LAUNCHER python -m pipeline.doctor.ranks     each rank; rank 0 prints `doctor: {finding}` lines

A torch that crashes as it is imported, or ranks that hang, end these processes and not the doctor.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.doctor import Finding, fail, guarded, ok, warn
from pipeline.doctor.machine import last_error
from pipeline.launch import (
    World,
    count_gpus,
    discover_world,
    local_environments,
    requested_gpu,
    require_visible_gpu,
)

_MARK = "doctor: "
# Ranks wait for each other this long; the processes have twice the time.
_JOIN_SECONDS = 120
_SECONDS = 2 * _JOIN_SECONDS
_CHECKS = ("torch", "attention", "ranks")


# --- the doctor's side -----------------------------------------------------------------------


def check_ranks(launcher: Sequence[str] = ()) -> Iterator[Finding]:
    """Start ranks, by a launcher or on this machine, and yield what rank 0 found.

    Args:
        launcher: words before `python`, such as `mpirun -n 2`; empty: one rank per GPU, or two.
    """
    program = ["-m", "pipeline.doctor.ranks"]
    if launcher:
        # In a container, `python` need not be where it is here.
        found = shutil.which("python")
        same = found is not None and Path(found).samefile(sys.executable)
        words = [*launcher, "python" if same else sys.executable, *program]
        yield from _judge([_spawn(words, dict(os.environ))], "its launcher")
        return
    program = [sys.executable, *program]
    number = min(8, count_gpus()) or 2
    ranks = [_spawn(program, environment) for environment in local_environments(number)]
    yield from _judge(ranks, f"{number} local ranks")


def _spawn(words: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # one kill ends a launcher with its ranks
    )


def _judge(processes: Sequence[subprocess.Popen[str]], what: str) -> Iterator[Finding]:
    # One deadline for all: ranks wait for each other, so that a missing one holds up every other.
    deadline = time.monotonic() + _SECONDS
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(1.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            # All of them: the rest wait for this one. What they printed is still in the pipes.
            for other in processes:
                if other.poll() is None:
                    os.killpg(other.pid, signal.SIGKILL)
            outputs.append(process.communicate())
    findings = [finding for out, _ in outputs for finding in read_findings(out)]
    yield from findings
    done = {finding.check for finding in findings}
    missing = [check for check in _CHECKS if check not in done]
    codes = [process.returncode for process in processes]
    if not missing and not any(codes):
        return
    if any(finding.level == "fail" for finding in findings):
        return  # the cause is named already
    # The first rank that failed; others may have ended only because it did.
    bad = next((number for number, code in enumerate(codes) if code), 0)
    lines = "".join(outputs[bad]).strip().splitlines()
    yield fail(
        # Checks are made in this order: the first without a finding is where a rank died.
        missing[0] if missing else "ranks",
        f"{what}: {_describe_code(codes[bad])}: {last_error(lines)}",
        "run `python -m pipeline.doctor.ranks` behind the launcher to see all it prints",
    )


def _describe_code(code: int) -> str:
    if code == -signal.SIGKILL:  # by `_judge`, or by the kernel
        return f"no answer within {_SECONDS} s, or killed for lack of memory"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def read_findings(output: str) -> list[Finding]:
    """Return the findings in the output of ranks, which launchers may put labels before."""
    found = []
    for line in output.splitlines():
        _, mark, text = line.partition(_MARK)
        if mark:
            found.append(Finding(**json.loads(text)))
    return found


# --- the ranks' side -------------------------------------------------------------------------


def examine(world: World) -> Iterator[Finding]:
    """Yield this rank's findings; a collective call of all ranks."""
    # Meanwhile the other ranks wait to be joined: what is the same on all of them is checked once.
    if world.is_main:
        yield from guarded("torch", check_torch)
        yield from guarded("attention", check_attention)
    yield from guarded("ranks", lambda: check_all_reduce(world))


def check_torch() -> Iterator[Finding]:
    """Check that torch sees the GPUs that are there, and was built for them."""
    import torch

    # Nothing is raised where no GPU is asked for.
    require_visible_gpu(visible=torch.cuda.is_available(), torch_version=torch.__version__)
    if not torch.cuda.is_available():
        reason = "none is asked for" if not requested_gpu() else "torch sees none"
        yield ok("torch", f"{torch.__version__}, no GPU ({reason})")
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    built = torch.version.cuda or torch.version.hip
    common = f"{torch.__version__} for CUDA {built}, driver {_driver()}, {len(names)} x {names[0]}"
    major, minor = torch.cuda.get_device_capability()
    # Such as sm_90, sm_90a and compute_90.
    kinds = torch.cuda.get_arch_list()
    # ROCm names its architectures otherwise (gfx942), and installs a build for all of them.
    if kinds and torch.version.hip is None and not _is_built_for(kinds, major, minor):
        found = f"{common}: built for {', '.join(kinds)}, this GPU is sm_{major}{minor}"
        yield fail("torch", found, "install a torch built for this GPU")
    elif major < 8:
        found = f"{common}: before Ampere, so attention runs row by row and bfloat16 is emulated"
        fix = "use a GPU of the Ampere generation or newer, or model.dtype: float32"
        yield warn("torch", found, fix)
    else:
        yield ok("torch", common)


def _is_built_for(kinds: Sequence[str], major: int, minor: int) -> bool:
    """Return True if code for one of these architectures runs on a GPU."""
    for kind in kinds:
        name, _, number = kind.partition("_")
        digits = "".join(character for character in number if character.isdigit())
        if not digits:
            continue
        # The last digit is the minor version: sm_90 is 9.0, sm_100 is 10.0.
        of = (int(digits[:-1]), int(digits[-1]))
        # Machine code runs on GPUs of its generation; `compute_` is translated for later ones.
        if of <= (major, minor) and (of[0] == major or name == "compute"):
            return True
    return False


def _driver() -> str:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        return done.stdout.split("\n")[0].strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def check_attention() -> Iterator[Finding]:
    """Run each attention kernel that is there on a few tokens, and compare with the definition."""
    import torch

    if not torch.cuda.is_available():
        error = _attention_error(torch.device("cpu"), torch.float32, None)
        yield _attention_finding("torch's own, row by row (on a CPU)", error, 1e-5)
        return
    from pipeline.model.attention import flash_attention, is_before_ampere, torch_varlen

    device = torch.device("cuda", torch.cuda.current_device())
    error = _attention_error(device, torch.bfloat16, None)
    # 0.02 is about five roundings of bfloat16, 2**-8 each.
    yield _attention_finding("torch's own, row by row", error, 0.02)
    kernels = [] if is_before_ampere(device) else [torch_varlen(), flash_attention()]
    for kernel in kernels:
        if kernel is not None:
            error = _attention_error(device, torch.bfloat16, kernel)
            yield _attention_finding(kernel.name, error, 0.02)
    if not any(kernels):
        yield warn(
            "attention",
            "no kernel for rows of several lengths: slow on a GPU",
            "install torch 2.11 or newer, or flash-attn, on a GPU since Ampere",
        )


def _attention_finding(name: str, error: float, allowed: float) -> Finding:
    if error <= allowed:
        return ok("attention", f"{name}, worst error {error:.1g}")
    found = f"{name}: {error:.3g} away from the definition, {allowed:g} is usual"
    fix = "install the tested versions of launch/constraints.txt, or uninstall this kernel"
    return fail("attention", found, fix)


def _attention_error(device: Any, dtype: Any, kernel: Any) -> float:
    """Return the largest error of outputs and gradients over two rows, against float64.

    Errors are shares of the largest value. Letters: T tokens of both rows, L of one row, H heads,
    K head width.
    """
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    sizes, heads, width = [5, 11], 2, 64
    q, k, v = (
        torch.randn(sum(sizes), heads, width, generator=generator, dtype=torch.float64)
        for _ in range(3)
    )  # (T, H, K)
    given = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    # Of what the kernel was given: rounding its inputs is not its error.
    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    if kernel is None:
        out = torch.cat([_row(F.scaled_dot_product_attention, *row) for row in _rows(given, sizes)])
    else:
        from pipeline.model.attention import PackedRows

        rows = PackedRows.of(torch.tensor(sizes), causal=False, device=device)
        out = kernel.attend(
            *given, rows=rows, scale=width**-0.5, dropout=0.0, window=None, softcap=None
        )
    wanted = torch.cat([_row(_definition, *row) for row in _rows(exact, sizes)])
    found = (out, *torch.autograd.grad(out.float().square().sum(), given))
    right = (wanted, *torch.autograd.grad(wanted.square().sum(), exact))
    return max(
        float((a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(found, right, strict=True)
    )


def _rows(tensors: Sequence[Any], sizes: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    yield from zip(*(tensor.split(list(sizes)) for tensor in tensors), strict=True)


def _row(attend: Any, q: Any, k: Any, v: Any) -> Any:
    """Attend in one row: (L, H, K) -> (H, L, K) -> (L, H, K)."""
    return attend(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)


def _definition(q: Any, k: Any, v: Any) -> Any:
    """Return softmax(q k^T / sqrt(K)) v."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v


def check_all_reduce(world: World) -> Iterator[Finding]:
    """Join the process groups and sum over all ranks, as training does."""
    import torch

    from pipeline import comm

    comm.start(world, timeout_seconds=_JOIN_SECONDS)
    number = comm.world_size()
    # 1 + 2 + ... + number: rank r adds r + 1, so that a rank that is missing or doubled shows.
    wanted = number * (number + 1) / 2
    on_device = comm.all_reduce_(torch.full((1024,), world.rank + 1.0, device=comm.device()))
    on_host = comm.sum_over_ranks(world.rank + 1)[0]
    hosts = sorted(set(comm.all_gather_object(platform.node())))
    if not world.is_main:
        return
    backend = "NCCL and gloo" if comm.device().type == "cuda" else "gloo"
    if number == 1:
        yield ok("ranks", f"one rank on {hosts[0]}: nothing to sum over")
    elif float(on_device.min()) == float(on_device.max()) == on_host == wanted:
        found = f"{number} ranks on {len(hosts)} hosts sum by {backend}"
        yield ok("ranks", found.replace("1 hosts", "one host"))
    else:
        yield fail(
            "ranks",
            f"{number} ranks sum to {float(on_device.max()):g} on devices and {on_host:g} on "
            f"hosts, not to {wanted:g}",
            "set NCCL_DEBUG=INFO, and NCCL_P2P_DISABLE=1 to see whether links are at fault",
        )


def main() -> None:
    """Be one rank."""
    # Ranks that have summed leave together; a fault of torch or a kernel is in rank 0's findings.
    code = 0
    for finding in examine(discover_world()):
        print(_MARK + json.dumps(dataclasses.asdict(finding)), flush=True)
        code = code or int(finding.level == "fail" and finding.check == "ranks")
    from pipeline import comm

    # The others may wait for a rank that failed.
    comm.leave(code, gracefully=code == 0)


if __name__ == "__main__":
    main()
