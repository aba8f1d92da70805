"""Choose the machine of a plan: a named GPU, a calibrated device, or both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.errors import UserError
from pipeline.planning.calibration import Calibration, find, load
from pipeline.planning.memory import GIB, USABLE, Target, gpu_named
from pipeline.planning.speed import GPUS, Gpu

DEFAULT_GPU = "h100"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The memory and the speed that a plan is for.

    Attributes:
        target: its memory.
        name: of the GPU, or of the calibrated device.
        speed: measured, or from a data sheet; None where neither is known.
        warning: about a calibration; empty if all is well.
    """

    target: Target
    name: str
    speed: Gpu | Calibration | None
    warning: str = ""

    def origin(self, network: float | None = None) -> str:
        """Return the words by which a plan says what its seconds are from."""
        if isinstance(self.speed, Calibration):
            return self.speed.label
        link = "" if network is None else f", {network:g} Gb/s a host"
        return f"a projection for {self.name}{link}; not measured"

    def require_speed(self) -> Gpu | Calibration:
        """Return the speed.

        Raises:
            UserError: it is not known, as of a size in GiB.
        """
        if self.speed is None:
            raise UserError(f"--gpu {self.name}: its speed is not known", allowed=", ".join(GPUS))
        return self.speed


def choose_machine(gpu: str | None, calibration: Path | None, *, ranks_per_host: int) -> Machine:
    """Return the machine of a command line.

    Args:
        gpu: its name, or its memory in GiB; None: the calibrated device, or an H100.
        calibration: a chosen file; None: the default one of the GPU, if there is one.
        ranks_per_host: ranks that share a machine.

    Raises:
        UserError: no such GPU, or a calibration that is damaged, or was chosen and is missing.
    """
    if gpu is None and calibration is not None:
        found = load(calibration)
        _, warning = find(None, found.device, calibration)
        return Machine(
            target=_memory_of(found, ranks_per_host),
            name=found.device,
            speed=found,
            warning=warning,
        )
    name = gpu or DEFAULT_GPU
    target = Target.gpu(name, ranks_per_host=ranks_per_host)
    sheet = GPUS.get(name.lower())
    if sheet is None and calibration is None:  # a size in GiB
        return Machine(target=target, name=name, speed=None)
    measured, warning = find(name, None, calibration)
    return Machine(target=target, name=name, speed=measured or sheet, warning=warning)


def this_machine(target: Target, device: str) -> Machine:
    """Return the machine that this process runs on; of a CPU, the speed only if it was calibrated.

    Args:
        target: its memory.
        device: its name, from `comm.device_name`.

    Raises:
        UserError: its calibration is damaged.
    """
    measured, warning = find(None, device, None)
    speed = measured or GPUS.get(gpu_named(device) or "")
    return Machine(target=target, name=device, speed=speed, warning=warning)


def _memory_of(calibration: Calibration, ranks_per_host: int) -> Target:
    size = calibration.memory if calibration.on_gpu else calibration.memory / ranks_per_host
    return Target(
        available=USABLE * size,
        name=f"{USABLE:g} of {size / GIB:.1f} GiB, {calibration.device}",
        on_gpu=calibration.on_gpu,
        ranks_per_host=ranks_per_host,
    )
