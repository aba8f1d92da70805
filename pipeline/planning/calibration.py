"""Choose the machine of a plan, and read its speed as `plan calibrate` measured it, without torch.

measuring/ --Calibration--> DEVICE.json --load--> Calibration --measured.py--> seconds of a step
a named GPU, a calibrated device, or both --choose_machine--> Machine
"""

from __future__ import annotations

import dataclasses
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, several
from pipeline.files import read_record, write_sealed
from pipeline.planning.memory import GIB, USABLE, Target, gpu_named
from pipeline.planning.shape import Dtype
from pipeline.planning.speed import GPUS, Gpu

# Of the files; raised when a constant is added or measured otherwise, so that old ones are refused.
VERSION = 3
# The environment variable that names another folder for the files.
FOLDER_VARIABLE = "DIFFEMBED_CALIBRATIONS"
_FIX = "measure again with `diffembed plan calibrate`"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """Seconds of a linear layer: (tokens, inputs) @ (inputs, outputs), and its two gradients."""

    tokens: int
    inputs: int
    outputs: int
    forward: float
    by_input: float
    by_weight: float

    @property
    def flops(self) -> float:
        """FLOPs of each of the three."""
        return 2.0 * self.tokens * self.inputs * self.outputs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Seconds of attention in one row of one head."""

    length: int
    head_width: int
    forward: float
    backward: float

    @property
    def flops(self) -> float:
        """FLOPs of scores and weighted values."""
        return 4.0 * self.length**2 * self.head_width


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Seconds that grow with a size: `fixed + size * each`."""

    fixed: float
    each: float

    def at(self, size: float, times: float = 1.0) -> float:
        """Return the seconds of `times` calls whose sizes add up to `size`."""
        return times * self.fixed + size * self.each


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Both:
    """Seconds of a forward and of its backward."""

    forward: Line
    backward: Line


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DtypeSpeed:
    """The speed of layers in one type of numbers.

    Attributes:
        attention, dropped_attention: without and with dropout of its weights.
        rest: of a layer without products and attention, by the norm: `rms` or `layer`; sizes are
            bytes that it saves for its backward.
        outside: of a chunk outside of the layers; sizes are saved bytes.
        adapters: of one linear layer without products and dropout; sizes are numbers in and out.
        dropout: of one dropout; sizes are its numbers.
    """

    products: list[Product]
    attention: list[Attention]
    dropped_attention: list[Attention]
    rest: dict[str, Both]
    outside: Both
    adapters: Both
    dropout: Both


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpeed:
    """The speed of DeepSpeed at one ZeRO stage; `fixed` is of a tensor, `each` of a number."""

    gather: Line
    reduce: Line
    update: Line


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Everything that was measured while a number of ranks of one machine worked together.

    Attributes:
        ranks: of this machine.
        dtypes: by type of numbers.
        engine: by ZeRO stage, in fp32; stage 1 is like 2.
        add: seconds of a byte that is read and added up in device memory.
        table: seconds of a byte of the token table's gradient.
        agreement: seconds until all ranks know a number.
        loss: `fixed` of a call, `each` of a FLOP.
        search: of a mining; `fixed` of a query, `each` of a FLOP.
        host: bytes a second to host memory and back, one direction at a time.
    """

    ranks: int
    dtypes: dict[Dtype, DtypeSpeed]
    engine: dict[str, EngineSpeed]
    add: float
    table: float
    agreement: float
    loss: Line
    search: Line
    host: float

    def changed(self, compute: float, link: float) -> Constants:
        """Return the constants of a machine with other speeds, in multiples of this one's.

        Args:
            compute: in layers.
            link: between ranks.
        """
        # Seconds shrink as speeds grow.
        dtypes = {name: _times(speed, 1 / compute) for name, speed in self.dtypes.items()}
        engine = {
            stage: dataclasses.replace(
                speed, gather=_times(speed.gather, 1 / link), reduce=_times(speed.reduce, 1 / link)
            )
            for stage, speed in self.engine.items()
        }
        return dataclasses.replace(self, dtypes=dtypes, engine=engine)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The speed of a machine, and the circumstances of its measurement.

    Attributes:
        device: torch's name of the GPU, or the processor's.
        on_gpu: False for a CPU.
        memory: bytes of one GPU, or of the whole machine.
        threads: of each rank.
        torch: its version.
        date: of the measurement, as YYYY-MM-DD.
        constants: by number of ranks, fewest first.
    """

    version: int
    device: str
    on_gpu: bool
    memory: float
    threads: int
    torch: str
    date: str
    constants: list[Constants]

    def of(self, ranks: int) -> Constants:
        """Return the constants of the most ranks up to `ranks`, or of the fewest measured."""
        fitting = [found for found in self.constants if found.ranks <= ranks]
        return fitting[-1] if fitting else self.constants[0]

    def changed(self, *, compute: float, link: float) -> Calibration:
        """Return a machine with other speeds, in multiples of this one's; see `Constants`."""
        return dataclasses.replace(
            self, constants=[each.changed(compute, link) for each in self.constants]
        )

    @property
    def label(self) -> str:
        """The line in which a plan names its measurement."""
        counts = " and ".join(str(constants.ranks) for constants in self.constants)
        noun = "rank" if counts == "1" else "ranks"
        return f"measured on {self.device} with {counts} {noun}, {self.date}"


def _times(measured: Any, factor: float) -> Any:
    """Return the same tree with all seconds (floats) multiplied; integers are sizes."""
    if isinstance(measured, float):
        return measured * factor
    if isinstance(measured, list):
        return [_times(item, factor) for item in measured]
    if isinstance(measured, dict):
        return {key: _times(item, factor) for key, item in measured.items()}
    if isinstance(measured, int):
        return measured
    fields = dataclasses.fields(measured)
    return type(measured)(**{f.name: _times(getattr(measured, f.name), factor) for f in fields})


# --- files -----------------------------------------------------------------------------------


def default_path(device: str) -> Path:
    """Return the file of a device in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get(FOLDER_VARIABLE) or cache / "diffembed" / "calibrations")
    return folder / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, dataclasses.asdict(calibration))


def load(path: Path) -> Calibration:
    """Read a calibration.

    Raises:
        UserError: it is missing, damaged, or of another version of this package.
    """
    tree = read_record(path, Calibration, fix=_FIX)
    if tree.version != VERSION or not tree.constants:
        raise UserError(f"{path}: calibration of version {tree.version}", fix=_FIX)
    return tree


def find(gpu: str | None, device: str | None, path: Path | None) -> tuple[Calibration | None, str]:
    """Return the calibration to plan with, and a warning; the warning is empty if all is well.

    Args:
        gpu: the name of a planned GPU; None for this machine.
        device: the name of this machine's device, read where `gpu` is None.
        path: a chosen file; None for the default one of `gpu` or `device`.

    Raises:
        UserError: the file is damaged, or was chosen and is missing.
    """
    if path is None:
        path = _default(gpu, device)
        if path is None:
            return None, ""
    found = load(path)
    same = found.device == device if gpu is None else gpu_named(found.device) == gpu.lower()
    if not same:
        return None, f"{path}: measured on {found.device}, not on {gpu or device}; not used"
    return found, _age_warning(found, path)


def _default(gpu: str | None, device: str | None) -> Path | None:
    if gpu is None:
        path = default_path(device) if device else None
        return path if path and path.is_file() else None
    # Names of one GPU differ by its form, such as H100 80GB HBM3 and H100 PCIe.
    files = sorted(default_path("any").parent.glob("*.json"))
    return next((path for path in files if gpu_named(path.stem) == gpu.lower()), None)


def _age_warning(found: Calibration, path: Path) -> str:
    """Warn of constants of another torch; empty for the same one, and where none is installed."""
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
    # Not by what follows the plus, such as `+cpu`: it names a build.
    if installed.split("+")[0] == found.torch.split("+")[0]:
        return ""
    return f"{path}: measured with torch {found.torch}, not {installed}; {_FIX}"


def describe(calibration: Calibration) -> str:
    """Format what a reader may compare with a data sheet, for each number of ranks."""
    lines = [
        f"{calibration.label}, {several(calibration.threads, 'thread')} each, "
        f"torch {calibration.torch}"
    ]
    for constants in calibration.constants:
        for name, speed in constants.dtypes.items():
            best = max(product.flops / product.forward for product in speed.products)
            rows = max(row.flops / row.forward for row in speed.attention)
            lines.append(
                f"{several(constants.ranks, 'rank')}, {name}: {best:.3g} FLOP/s in linear layers, "
                f"{rows:.3g} in attention, {speed.rest['rms'].forward.fixed * 1e6:.0f} us a layer"
            )
        engine = constants.engine["3"]
        # Numbers in fp32, of 4 bytes. Where noise hid the slope, `each` is 0.
        lines.append(
            f"{several(constants.ranks, 'rank')}: ZeRO-3 gathers "
            f"{4e-9 / max(engine.gather.each, 1e-15):.3g} GB/s, reduces "
            f"{4e-9 / max(engine.reduce.each, 1e-15):.3g}, updates "
            f"{1 / max(engine.update.each, 1e-15):.3g} weights/s; host {constants.host / 1e9:.3g} "
            f"GB/s; agreement {constants.agreement * 1e6:.0f} us"
        )
    return "\n".join(lines)


# --- machines --------------------------------------------------------------------------------

_DEFAULT_GPU = "h100"


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
        """Return the words in which a plan names the source of its seconds."""
        if isinstance(self.speed, Calibration):
            return self.speed.label
        link = "" if network is None else f", {network:g} Gb/s a host"
        return f"a projection for {self.name}{link}; not measured"

    def require_speed(self) -> Gpu | Calibration:
        """Return the speed.

        Raises:
            UserError: it is not known, as for a size in GiB.
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
        return Machine(
            target=_memory_of(found, ranks_per_host),
            name=found.device,
            speed=found,
            warning=_age_warning(found, calibration),
        )
    name = gpu or _DEFAULT_GPU
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
    # Each rank has a GPU of its own; ranks on a CPU share the machine's memory.
    size = calibration.memory if calibration.on_gpu else calibration.memory / ranks_per_host
    return Target(
        available=USABLE * size,
        name=f"{USABLE:g} of {size / GIB:.1f} GiB, {calibration.device}",
        on_gpu=calibration.on_gpu,
        ranks_per_host=ranks_per_host,
    )
