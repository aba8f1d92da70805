"""`diffembed plan`: what a run costs, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.arguments import DEFAULT_DEEPSPEED, Config, Overrides, load
from pipeline.config import TrainConfig

app = typer.Typer(help="What a run costs, before it starts.", no_args_is_help=True)


@app.command("run")
def plan_run(
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[Path, typer.Option(help="see ds_configs/")] = DEFAULT_DEEPSPEED,
    world_size: Annotated[int, typer.Option(help="ranks to plan for")] = 1,
    memory_gib: Annotated[float, typer.Option(help="device memory of a rank")] = 80.0,
) -> None:
    """Print batch arithmetic, schedule and memory of a training run."""
    tree = load(TrainConfig, config, overrides)
    from pipeline.planning.plan import describe
    from pipeline.planning.plan import plan_run as make_plan
    from pipeline.training.ds_config import load_ds_config, resolve_ds_config

    resolved = resolve_ds_config(load_ds_config(deepspeed), tree, world_size=world_size)
    available = memory_gib * 2**30
    print(describe(make_plan(tree, resolved, world_size=world_size, available=available), tree))


@app.command("loss")
def plan_loss(
    queries: Annotated[int, typer.Option(help="of the global batch")],
    documents: Annotated[int, typer.Option(help="of the global batch, with hard negatives")],
    width: Annotated[int, typer.Option(help="of the embeddings")] = 3584,
    world_size: Annotated[
        list[int] | None, typer.Option(help="ranks to plan for; may be repeated")
    ] = None,
) -> None:
    """Print what the loss costs each rank at a size that need not exist yet."""
    from pipeline.planning.plan import describe_loss

    for ranks in world_size or [1]:
        print(
            describe_loss(
                num_queries=queries, num_documents=documents, width=width, world_size=ranks
            )
        )
