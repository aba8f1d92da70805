"""Entry of the launchers: `deepspeed pipeline/train.py CONFIG --deepspeed ds_configs/zero3.json`.

Starts the same way under deepspeed, torchrun, mpirun, srun and plain python.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    # `python pipeline/train.py` puts pipeline/ first on the path, where our modules would hide
    # others of the same name; the checkout above it is what belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Now, because the imports below take seconds, in which a launcher may be killed.
    from pipeline import launcher

    _launchers = launcher.processes()

from pipeline import comm
from pipeline.config import TrainConfig, dump_config, load_config
from pipeline.errors import DiffembedError, explain_os_error, say_error
from pipeline.training.ds_config import load_ds_config, resolve_ds_config


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of a training run."""
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
    # The deepspeed launcher adds this to every command line; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    # Overrides may stand before and after the options.
    return parser.parse_intermixed_args(arguments)


def run(arguments: list[str], launchers: tuple[int, ...] = ()) -> None:
    """Train, or plan, as the command line says.

    Args:
        arguments: the command line.
        launchers: its processes (see launcher.processes), without which no rank goes on.

    Raises:
        DiffembedError: wrong input, or stopped on request.
    """
    options = parse_arguments(arguments)
    config = load_config(TrainConfig, options.config, tuple(options.overrides))
    world = comm.discover_world()
    if world.launched:
        world = dataclasses.replace(world, launchers=launchers)
    world_size = options.world_size or world.world_size
    ds_config = resolve_ds_config(load_ds_config(options.deepspeed), config, world_size=world_size)
    if options.dry_run or "auto" in (config.schedule, config.chunks.keep_graphs):
        from pipeline.planning.plan import describe, plan_run

        if not options.dry_run:
            comm.start(world)  # to agree on the memory that every rank has
        available = comm.least_memory(world)
        plan = plan_run(config, ds_config, world_size=world_size, available=available)
        if options.dry_run:
            print(dump_config(config))
            print(describe(plan, config))
            return
        chunks = dataclasses.replace(config.chunks, keep_graphs=plan.keep_graphs)
        config = dataclasses.replace(config, schedule=plan.schedule, chunks=chunks)
    from pipeline.training.trainer import train

    train(config, ds_config, world)


def main(launchers: tuple[int, ...] = ()) -> None:
    """Run and leave with the exit code that the outcome has (see DiffembedError)."""
    code = 0
    try:
        run(sys.argv[1:], launchers)
    except DiffembedError as error:
        say_error(error)
        code = error.exit_code
    except Exception as error:
        explained = explain_os_error(error)
        if explained is None:
            traceback.print_exc()
        else:
            say_error(explained)
        code = explained.exit_code if explained else 1
    # Not sys.exit: a rank that fails must be gone at once, so that the launcher ends the others
    # instead of leaving them to wait in a collective.
    comm.leave(code, gracefully=code in (0, 75))


if __name__ == "__main__":
    main(_launchers)
