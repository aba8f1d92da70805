"""Entry point of training: `deepspeed pipeline/train.py CONFIG --deepspeed ds_configs/zero3.json`.

Starts the same way under deepspeed, torchrun, mpirun, srun and plain python.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # `python pipeline/train.py` puts pipeline/ first on the path, where our modules would hide
    # others of the same name; the checkout above it belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Now, because the imports below take seconds, in which a launcher may be killed.
    from pipeline import launch

    _launchers = launch.launcher_processes()

from pipeline import run_folder
from pipeline.config import EvaluateEveryConfig, TrainConfig, dump_config, load_config
from pipeline.data.manifest import read_manifest
from pipeline.errors import (
    DiffembedError,
    MachineError,
    UserError,
    describe_error,
    explain_os_error,
    require_utf8,
    say_error,
    say_line,
    say_warning,
)
from pipeline.files import require_writable
from pipeline.launch import (
    World,
    discover_world,
    has_launcher,
    let_gpu_memory_grow,
    local_ranks,
    share_cores,
)
from pipeline.run_folder import RunDir
from pipeline.training.ds_config import load_ds_config, resolve_ds_config
from pipeline.training.evaluations import ScoringCommands

if TYPE_CHECKING:
    from pipeline.planning import RunPlan
    from pipeline.planning.calibration import Machine
    from pipeline.planning.memory import Schedule, Target


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line of a training run."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a text embedder; run it again to resume."
    )
    parser.add_argument("config", help="YAML file, see launch/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to CONFIG")
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="see ds_configs/")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole config, batch arithmetic and memory plan, and stop",
    )
    parser.add_argument(
        "--world-size", type=int, help="ranks to plan for (only with --dry-run)", default=None
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="GPU to plan for: h100, h200, a100-80, ... or its GiB (only with --dry-run)",
        default=None,
    )
    parser.add_argument(
        "--gpus-per-node", type=int, help="for host memory (only with --dry-run)", default=None
    )
    # The deepspeed launcher adds this to every command line; the environment holds it too.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    # Overrides may stand before and after the options.
    return parser.parse_intermixed_args(arguments)


def check_folders(config: TrainConfig, *, writes: bool) -> None:
    """Check the folders of a run before anything large is imported.

    Args:
        config: the run.
        writes: whether this process will write to the run's folder.

    Raises:
        UserError: there are no shards, or the run's folder is another run's or not writable.
    """
    RunDir(config.output_dir).require_own()
    read_manifest(config.data.path)
    if writes:
        require_writable(config.output_dir, key="output_dir")
        if config.checkpoint.mirror is not None:
            require_writable(config.checkpoint.mirror, key="checkpoint.mirror")


def check_options(options: argparse.Namespace) -> None:
    """Check the options that only a dry run takes.

    Raises:
        UserError: one is given without `--dry-run`, or is no number of ranks.
    """
    ranks, per_node = options.world_size, options.gpus_per_node
    if ranks is not None and (ranks < 1 or not options.dry_run):
        raise UserError(f"--world-size {ranks}", allowed="a number of ranks, with --dry-run")
    if options.gpu is not None and not options.dry_run:
        raise UserError(f"--gpu {options.gpu}", fix="add --dry-run; a run sees its GPUs itself")
    if per_node is not None and (per_node < 1 or not options.dry_run):
        raise UserError(f"--gpus-per-node {per_node}", allowed="a number, with --dry-run")


def run(arguments: list[str], launchers: tuple[int, ...] = ()) -> None:
    """Train, or plan with `--dry-run`.

    Args:
        arguments: the command line.
        launchers: processes whose end stops the ranks (see `launch.launcher_processes`).

    Raises:
        DiffembedError: wrong input, or stopped on request.
    """
    options = parse_arguments(arguments)
    config = load_config(TrainConfig, options.config, tuple(options.overrides))
    check_options(options)
    world = discover_world()
    world = dataclasses.replace(
        world,
        world_size=options.world_size or world.world_size,  # a dry run may plan for other ranks
        launchers=launchers if has_launcher(world, launchers) else (),
    )
    ds_config = resolve_ds_config(
        load_ds_config(options.deepspeed), config, world_size=world.world_size
    )
    check_folders(config, writes=world.is_main and not options.dry_run)
    share_cores(world)
    let_gpu_memory_grow()
    if config.deterministic:
        # torch refuses deterministic products without it; read when cuBLAS is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    plan: RunPlan | None = None
    if options.dry_run or "auto" in (config.schedule, config.chunks.keep_graphs):
        plan, machine = make_plan(options, config, ds_config, world)
        if options.dry_run:
            print_plan(plan, config, machine)
            return
        chunks = dataclasses.replace(config.chunks, keep_graphs=plan.keep_graphs)
        config = dataclasses.replace(config, schedule=plan.schedule, chunks=chunks)
    predicted = predict(config, ds_config, world, plan=plan) if world.is_main else {}
    # Here, because its imports take longer than all the checks above.
    from pipeline.training.trainer import train

    scoring = scoring_commands(config.evaluate) if config.evaluate else None
    train(config, ds_config, world, scoring=scoring, predicted=predicted)


def make_plan(
    options: argparse.Namespace, config: TrainConfig, ds_config: dict[str, Any], world: World
) -> tuple[RunPlan, Machine]:
    """Choose what the config leaves to `auto`; return the plan and the machine it is for.

    A collective call, in which the ranks join, except in a dry run.
    """
    from pipeline import comm
    from pipeline.planning import plan_run

    if not options.dry_run:
        comm.start(world)  # to agree on the memory that every rank has
    target = target_of(options, world)
    # Read once: ranks with other constants would choose other schedules.
    machine, earlier = comm.on_main(lambda: (machine_of(options, target), earlier_schedule(config)))
    plan = plan_run(
        config,
        ds_config,
        world_size=world.world_size,
        target=target,
        speed=machine.speed,
        earlier=earlier,
    )
    return plan, machine


def print_plan(plan: RunPlan, config: TrainConfig, machine: Machine) -> None:
    """Print the config, the plan, and, where the machine's speed is known, its time."""
    from pipeline.planning.describe import describe, describe_time
    from pipeline.planning.speed import DEFAULT_NETWORK

    print(dump_config(config))
    print(describe(plan, config))
    if machine.warning:
        say_warning(machine.warning)
    if machine.speed is not None:
        print("\n" + describe_time(plan, config, machine, network=DEFAULT_NETWORK))


def earlier_schedule(config: TrainConfig) -> Schedule | None:
    """Return the schedule of the run that this command resumes; None for a new run."""
    run = RunDir(config.output_dir)
    if config.schedule != "auto" or not run_folder.checkpoint_names(run.checkpoints):
        return None
    try:
        found = load_config(TrainConfig, run.config).schedule
    except UserError:  # a config of an earlier version
        return None
    return None if found == "auto" else found


def predict(
    config: TrainConfig,
    ds_config: dict[str, Any],
    world: World,
    *,
    plan: RunPlan | None = None,
) -> dict[str, float]:
    """Return what a step should take, by key of its metrics, as far as it is known.

    A prediction that is not possible ends no run.

    Args:
        config: the run, without `auto`.
        ds_config: the resolved DeepSpeed config.
        world: the ranks. Only rank 0 predicts: nothing here is collective.
        plan: by which `auto` was chosen; None to make one.
    """
    from pipeline import comm
    from pipeline.planning import expected_step, plan_run
    from pipeline.planning.calibration import this_machine
    from pipeline.planning.memory import Target
    from pipeline.planning.speed import DEFAULT_NETWORK

    on_gpu = comm.device().type == "cuda"
    per_host = local_ranks() if world.launched else world.world_size
    # Schedule and graphs are chosen already, so that memory is not compared with anything.
    target = Target(available=math.inf, name="", on_gpu=on_gpu, ranks_per_host=per_host)
    try:
        machine = this_machine(target, comm.device_name())
        if machine.warning:
            say_warning(machine.warning)
        if machine.speed is None and not on_gpu:
            return {}
        ranks = world.world_size
        plan = plan or plan_run(config, ds_config, world_size=ranks, target=target, build=False)
        return expected_step(plan, config, machine, network=DEFAULT_NETWORK)
    except Exception as error:  # a plan may fail on what a run can do, and no run needs it
        say_line(f"no prediction of a step: {error or type(error).__name__}")
        return {}


def target_of(options: argparse.Namespace, world: World) -> Target:
    """Return the memory to plan with: of a named GPU, or of this machine.

    Args:
        options: the command line.
        world: the ranks to plan for.
    """
    from pipeline import comm
    from pipeline.planning.memory import USABLE, Target

    per_host = options.gpus_per_node or (local_ranks() if world.launched else 8)
    if options.gpu is not None:
        return Target.gpu(options.gpu, ranks_per_host=per_host)
    on_gpu = comm.device().type == "cuda"
    ranks = local_ranks() if world.launched else world.world_size
    hint = "; --gpu NAME plans for GPUs" if options.dry_run else ""
    return Target(
        available=USABLE * comm.least_memory(world),
        name="this machine's GPUs" if on_gpu else f"this machine's RAM, shared by {ranks}{hint}",
        on_gpu=on_gpu,
        ranks_per_host=per_host,
    )


def machine_of(options: argparse.Namespace, target: Target) -> Machine:
    """Return the machine that a dry run is for: a named GPU, or this one.

    Raises:
        UserError: a calibration is damaged.
    """
    from pipeline import comm
    from pipeline.planning.calibration import choose_machine, this_machine

    if options.gpu is None:
        return this_machine(target, comm.device_name())
    return choose_machine(options.gpu, None, ranks_per_host=target.ranks_per_host)


def scoring_commands(every: EvaluateEveryConfig) -> ScoringCommands:
    """Return the command lines by which training has its checkpoints scored.

    Processes, because training must neither wait for them nor end with them. Of the layers above
    training, this is the only thing it sees.
    """
    from pipeline.submission import submit

    python = [sys.executable, "-m"]
    texts = [] if every.text_elements is None else [str(every.text_elements)]

    def submit_jobs(train: Path, checkpoint: str, evaluate: Path) -> list[str]:
        return [*python, submit.__name__, str(train), checkpoint, str(evaluate), *texts]

    def run_here(train: Path, checkpoint: str, evaluate: Path) -> list[list[str]]:
        diffembed = [*python, "pipeline.cli"]
        return [
            [*diffembed, "export", str(train), "--checkpoint", checkpoint, "--no-check"],
            [*diffembed, "evaluate", "run", str(evaluate)],
            [*diffembed, "report", str(evaluate)],
        ]

    return ScoringCommands(submit=submit_jobs, local=run_here)


def _say_on_all_ranks(error: Exception, explained: DiffembedError | None) -> None:
    """Say why this rank ends, and end the others, which do not know it; a bug has a traceback."""
    line = f"{type(error).__name__}: {error}"
    if explained is not None:
        line = describe_error(explained)
    if "pipeline.comm" in sys.modules:
        from pipeline import comm

        own, line = line, comm.end_together(line)
        if not line.endswith(own):  # a rank failed before, which made this one fail: no bug here
            explained = explained or MachineError(own)
    if explained is None:
        traceback.print_exc()
    say_line(line, file=sys.stderr)


def main(launchers: tuple[int, ...] = ()) -> None:
    """Run, and leave with the exit code of the outcome (see DiffembedError)."""
    code = 0
    try:
        require_utf8()
        run(sys.argv[1:], launchers)
    except DiffembedError as error:
        say_error(error)
        code = error.exit_code
    except Exception as error:
        explained = explain_os_error(error)
        code = explained.exit_code if explained else 1
        _say_on_all_ranks(error, explained)
    # Not sys.exit: a rank that fails must be gone at once, so that the launcher ends the others
    # instead of leaving them to wait in a collective.
    if "pipeline.comm" not in sys.modules:  # nothing was started, and importing it takes seconds
        sys.stdout.flush()
        os._exit(code)
    from pipeline import comm

    # 75: stopped on request, by all ranks together.
    comm.leave(code, gracefully=code in (0, 75))


if __name__ == "__main__":
    main(_launchers)
