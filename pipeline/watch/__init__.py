"""Show how far a run, an evaluation, a synthesis, shards or a chain is, from its files alone.

    folder or config ──recognise──> functions that look ──> View ──> terminal, page (view.py)

Nothing here imports torch or asks Slurm: it works wherever the folder is mounted, also while other
processes write to it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.config import read_tree
from pipeline.config.explain import kind_of, output_dir
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.run_folder import OWN_CONFIG
from pipeline.watch.chains import (
    building,
    describe_chain,
    describe_several,
    describe_shards,
    describe_synthesis,
    mining_store,
    unreadable,
)
from pipeline.watch.elements import describe_evaluation
from pipeline.watch.runs import Metrics, describe_run
from pipeline.watch.view import Fact, Grid, Tone, View, page

Look = Callable[[], View]
# Runs, evaluations and so on that a folder of several shows: each look reads the files of all.
_MAX_PARTS = 200
_STYLES: dict[Tone, str] = {"": "", "ok": "green", "warn": "yellow", "fail": "red"}
# In a pipe, no line is cut or wrapped: programs search them.
_PIPE_WIDTH = 10_000


def watch(path: Path, *, once: bool, html: Path | None, every: float) -> None:
    """Show a folder until it is finished or Ctrl-C is pressed; once where there is no terminal.

    Args:
        path: the folder, or the config of what writes it.
        once: show it once.
        html: also write the page here, each time.
        every: seconds between two looks.

    Raises:
        UserError: the path is nothing that can be watched, or the page cannot be written.
    """
    looks = recognise(path)
    console = make_console()
    live = console.is_terminal and not once
    views = _look(looks, html, every if live else None)
    if not live:
        console.print(render(views, console))
    else:
        # Nothing changes between two looks: rich's thread, which draws four times a second, is off.
        screen = Live(render(views, console), console=console, auto_refresh=False)
        with contextlib.suppress(KeyboardInterrupt), screen:
            # The state of a chain counts its stages, and is never `finished`.
            while not all(view.state == "finished" or view.done == 1.0 for view in views):
                time.sleep(every)
                views = _look(looks, html, every)
                screen.update(render(views, console), refresh=True)
    if html is not None:
        if live:  # the page that stays must not reload itself
            _look(looks, html, None)
        console.print(f"written: {html}")


def _look(looks: Sequence[Look], html: Path | None, every: float | None) -> list[View]:
    views = [look() for look in looks]
    if html is not None:
        write_text(html, page(views, refresh_seconds=every))
    return views


def recognise(path: Path) -> list[Look]:
    """Return the functions that describe a folder, by the files in it, or the config of one.

    Raises:
        UserError: it is nothing that this package writes.
    """
    path = path.expanduser()
    if path.is_file():
        return [_of_config(path)]
    looks = _of_folder(path) if path.is_dir() else []
    # The folder of shards need not exist yet.
    if not looks and building(path).is_dir():
        looks = [functools.partial(describe_shards, path)]
    if not looks and path.is_dir():
        parts = [
            (child.name, look)
            for child in sorted(path.iterdir())
            if child.is_dir() and not child.name.startswith(".")
            for look in _of_part(child)
        ][:_MAX_PARTS]
        looks = [functools.partial(describe_several, path, parts)] if parts else []
    if looks:
        return looks
    raise UserError(
        f"{path}: {'no files of a run in it' if path.is_dir() else 'no such folder'}",
        allowed="the folder of a training run, an evaluation, a synthesis or shards, one that "
        "holds a chain.yaml or several of these, or the config of one",
        fix="give the output_dir of its config",
    )


def _of_part(path: Path) -> list[Look]:
    """Return the functions that describe one of several folders; a fault is that folder's own."""
    try:
        return _of_folder(path)
    except (UserError, OSError) as error:
        return [functools.partial(unreadable, path, error)]


def _of_folder(path: Path) -> list[Look]:
    chains = [chain for chain in sorted(path.glob("*chain*.yaml")) if _is_chain(chain)]
    if chains:
        return [functools.partial(describe_chain, chain, _metrics_of(chain)) for chain in chains]
    looks: list[Look] = []
    # A job that still waits in the queue has left only its frozen config, in jobs/.
    jobs = path / "jobs"
    if (path / "ledger").is_dir() or any(jobs.glob("synthesize-*.yaml")):
        looks.append(functools.partial(describe_synthesis, path))
    elif _is_run(path):
        looks.append(functools.partial(describe_run, path, Metrics(path / "metrics.jsonl")))
    # A folder may be several things: an evaluation may have the `output_dir` of a run.
    if (path / "manifest.json").is_file():
        looks.append(functools.partial(describe_shards, path))
    scored = any(path.glob("results/*/*/*/result.json")) or any(path.glob("plan/*/plan.json"))
    if scored or any(jobs.glob("evaluate-*.yaml")) or any(path.glob("step-*/evaluate.yaml")):
        looks.append(functools.partial(describe_evaluation, path))
    return looks


def _is_chain(path: Path) -> bool:
    """Return True for the config of a chain, whole or not; supply-chain.yaml may be anything."""
    if path.name == "chain.yaml":
        return True
    with contextlib.suppress(UserError, OSError):
        return "train" in read_tree(path)
    return False


def _is_run(path: Path) -> bool:
    """Return True for the folder of a training run, from its first second on."""
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        return True
    if (path / "lock").is_file() or any((path / "jobs").glob("train-*.yaml")):
        return True
    # A user's folder may have a file of this name.
    config = path / "config.yaml"
    return config.is_file() and config.read_text(errors="replace").startswith(OWN_CONFIG)


def _metrics_of(chain: Path) -> Metrics:
    """Return the metrics of the training run of a chain's config."""
    train = read_tree(chain).get("train")
    if not isinstance(train, str):
        raise UserError(f"{chain}: key 'train' is missing", fix="give the config of a chain")
    return Metrics(output_dir(Path(train)) / "metrics.jsonl")


def _of_config(path: Path) -> Look:
    tree = read_tree(path)
    kind = kind_of(path)
    if kind == "chain":
        return functools.partial(describe_chain, path, _metrics_of(path))
    root = output_dir(path)
    # A synthesis has other keys, which this package does not know.
    if "concepts" in tree and "problems" in tree:
        return functools.partial(describe_synthesis, root)
    if kind == "train":
        return functools.partial(describe_run, root, Metrics(root / "metrics.jsonl"))
    if kind == "evaluate":
        return functools.partial(describe_evaluation, root, path)
    if kind in ("prepare", "mine"):
        return functools.partial(describe_shards, root, mining_store(path))
    raise UserError(
        f"{path}: a config of `diffembed {kind}`",
        allowed="a config of prepare, mine, train, evaluate, a synthesis or a chain",
    )


# --- the terminal ----------------------------------------------------------------------------


def make_console() -> Console:
    """Return a console for standard output, without colours and line breaks in a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def render(views: Sequence[View], console: Console) -> RenderableType:
    """Return everything as one block for rich."""
    return Group(*(part for view in views for part in _view(view, console)))


def _view(view: View, console: Console) -> Iterator[RenderableType]:
    yield Text.assemble((view.title, "bold"), "  ", (view.state, _STYLES[view.tone] or "bold"))
    if view.done is not None and console.is_terminal:
        table = Table.grid()  # a bar alone does not end its line
        table.add_row(ProgressBar(total=1.0, completed=view.done, width=min(60, console.width)))
        yield table
    if view.facts:
        yield _facts(view.facts)
        if console.is_terminal and any(grid.rows for grid in view.grids):
            yield Text()
    yield from (_grid(grid) for grid in view.grids if grid.rows)


def _facts(facts: Sequence[Fact]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    # Folded, not cut: the end of a path or of an error is often what matters.
    table.add_column(overflow="fold")
    for fact in facts:
        # As `Text`, because errors hold brackets, which rich would take for styles.
        table.add_row(Text(fact.name), Text(fact.value, style=_STYLES[fact.tone]))
    return table


def _grid(grid: Grid) -> Table:
    table = Table(
        title=Text(grid.title, style="bold"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1)
    )
    for number, name in enumerate(grid.header):
        side: JustifyMethod = "right" if grid.is_numeric(number) else "left"
        table.add_column(name, justify=side, overflow="fold")
    for number, row in enumerate(grid.rows):
        table.add_row(*map(Text, row), style=_STYLES[grid.tone_of(number)] or None)
    return table
