"""Describe a chain by its stages, a synthesis, prepared shards, and a folder of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import run_folder
from pipeline.config import ChainConfig, ExportStep, load_config, read_tree
from pipeline.config.explain import expand_key, output_dir
from pipeline.errors import UserError, explain_os_error
from pipeline.files import read_record
from pipeline.run_folder import RunDir
from pipeline.watch.elements import describe_evaluation
from pipeline.watch.logs import jobs_grid, newest_log, read_json_or_none
from pipeline.watch.runs import Metrics, describe_run
from pipeline.watch.view import Fact, Grid, Tone, View, age, duration, oldest_first

# Stage, state, detail, folder; and the tone of the row.
_Row = tuple[tuple[str, str, str, str], Tone]


def describe_chain(path: Path, metrics: Metrics) -> View:
    """Describe the stages of a chain's config; `metrics` are the training run's."""
    chain = load_config(ChainConfig, path)
    rows = list(_stages(chain, metrics))
    finished = sum(tone == "ok" for _, tone in rows)
    failed = [cells[0] for cells, tone in rows if tone == "fail"]
    state = f"{finished} of {len(rows)} stages finished"
    return View(
        title=f"chain {path}",
        state=f"{state}, failed: {', '.join(failed)}" if failed else state,
        tone="fail" if failed else "ok" if finished == len(rows) else "",
        done=finished / len(rows),
        grids=(
            Grid(
                "stages",
                ("stage", "state", "detail", "folder"),
                tuple(cells for cells, _ in rows),
                tuple(tone for _, tone in rows),
            ),
        ),
    )


def _stages(chain: ChainConfig, metrics: Metrics) -> Iterator[_Row]:
    if chain.synthesize:
        folder = output_dir(chain.synthesize)
        yield _stage("synthesize", describe_synthesis(folder), folder, folder / "jobs")
    for name, config in (("prepare", chain.prepare), ("mine", chain.mine)):
        if config:
            folder = output_dir(config)
            # Next to the folder, which appears by a rename and holds nothing but shards.
            jobs = folder.with_name(f"{folder.name}-jobs")
            yield _stage(name, describe_shards(folder, mining_store(config)), folder, jobs)
    run = output_dir(chain.train)
    yield _stage("train", describe_run(run, metrics), run, run / "jobs")
    for step in chain.exports:
        yield _export(step, run)
    if chain.evaluate:
        folder = output_dir(chain.evaluate)
        jobs = folder / "jobs"
        yield _stage("evaluate", describe_evaluation(folder, chain.evaluate), folder, jobs)
        report = folder / "report"
        written = age(report / "report.json")
        if fault := _fault(jobs, "report"):
            yield ("report", "failed", fault, str(report)), "fail"
        elif written is not None:
            detail = f"written {duration(written)} ago"
            yield ("report", "finished", detail, str(report)), "ok"
        else:
            yield ("report", "waiting", "", str(report)), ""


def _stage(name: str, view: View, folder: Path, jobs: Path) -> _Row:
    # Each kind of view has one of these: a run, an evaluation, shards, unfinished shards.
    detail = view.fact("step") or view.fact("elements") or view.fact("rows") or view.fact("tasks")
    if view.state == "finished":
        return (name, "finished", detail, str(folder)), "ok"
    fault = _fault(jobs, name) or view.fact("last error")
    # The newest log may be of an earlier start: what runs now may run without Slurm.
    if view.tone == "fail" or (fault and not view.state.startswith("running")):
        return (name, "failed", fault or detail, str(folder)), "fail"
    left = view.fact("time left")
    detail = ", ".join(part for part in (detail, left and f"{left} left") if part)
    # The folder of shards does not exist while they are made.
    started = folder.exists() or view.state.startswith("running")
    return (name, view.state if started else "waiting", detail, str(folder)), ""


def _export(step: ExportStep, run: Path) -> _Row:
    folder = step.output or RunDir(run).export
    name = f"export-{step.checkpoint}"
    if fault := _fault(run / "jobs", name):
        return (name, "failed", fault, str(folder)), "fail"
    if not any(folder.glob("*.safetensors")):
        return (name, "waiting", "", str(folder)), ""
    # Seconds ago, both: the older file has the larger age.
    saved = age(RunDir(run).checkpoints / run_folder.LATEST)
    written = age(folder / "config.json") or 0.0
    if step.checkpoint == "latest" and saved is not None and saved < written:
        return (name, "older than the newest checkpoint", "", str(folder)), "warn"
    return (name, "finished", f"written {duration(written)} ago", str(folder)), "ok"


def _fault(jobs: Path, name: str) -> str:
    """Return the error with which the newest job of a name ended; empty if it did not fail."""
    end = newest_log(jobs, name)
    return end.cited_error if end and end.failed else ""


# --- synthesis -------------------------------------------------------------------------------

# In order; `ReasonAug` defines them, and is not imported here because it is built on this package.
STAGES = ("concepts", "definitions", "problems", "checked", "solved", "rewritten", "clean")
# Bytes of a ledger that are read at a time; ledgers have gigabytes.
_BLOCK = 2**22
# Work that writes no file for so long has ended, or hangs.
_PATIENCE_SECONDS = 300.0


def describe_synthesis(root: Path) -> View:
    """Describe a synthesis: answers and items of each stage, and its rows."""
    finished = read_json_or_none(root / "finished.json")
    rows = finished.get("rows") if isinstance(finished, dict) else None
    newest = min((age(path) or 0.0 for path in root.glob("ledger/*.jsonl")), default=None)
    stages = []
    for name in STAGES:
        ledger, items = root / "ledger" / f"{name}.jsonl", root / "stages" / f"{name}.jsonl"
        if not ledger.exists() and not items.exists():
            continue
        # In the text of an answer, JSON would escape the mark's quotes.
        answers, failed = _count_lines(ledger, b'"status": "failed"')
        stages.append((name, f"{answers:,}", f"{failed:,}", f"{_count_lines(items)[0]:,}"))
    facts = [Fact("rows", f"{rows:,}" if isinstance(rows, int) else "not written yet")]
    if newest is not None:
        facts.append(Fact("last answer", f"{duration(newest)} ago"))
    if (end := newest_log(root / "jobs", "synthesize")) and end.error:
        facts.append(Fact("last error", end.cited_error, "fail" if end.failed else "warn"))
    header = ("stage", "answers", "failed for good", "items")
    done: tuple[str, Tone] = ("finished", "ok")
    state, tone = done if isinstance(rows, int) else _activity(newest, "answer")
    return View(
        title=f"synthesis {root}",
        state=state,
        tone=tone,
        facts=tuple(facts),
        grids=(Grid("stages", header, tuple(stages)), jobs_grid(root / "jobs")),
    )


def _activity(newest: float | None, what: str) -> tuple[str, Tone]:
    """Return the state of work that shows in new files; `newest` is the age of the last one."""
    if newest is None:
        return f"no {what} yet", ""
    if newest < _PATIENCE_SECONDS:
        return "running", "ok"
    return f"not running: last {what} {duration(newest)} ago", "warn"


def _count_lines(path: Path, mark: bytes = b"") -> tuple[int, int]:
    """Return the number of whole lines of a file, and of lines with a mark; 0 without the file."""
    lines = marked = 0
    rest = b""
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                # `rest` is half a line; at the end of the file, a line that is being written.
                whole, end, rest = (rest + block).rpartition(b"\n")
                # `whole` lacks its last line's end, which is in `end`.
                lines += whole.count(b"\n") + bool(end)
                marked += whole.count(mark) if mark else 0
    except OSError:
        return 0, 0
    return lines, marked


# --- shards ----------------------------------------------------------------------------------


def building(root: Path) -> Path:
    """Return the folder in which `prepare` works before the shards appear."""
    return root.with_name(f".{root.name}.building")


def mining_store(config: Path) -> Path | None:
    """Return the folder in which a mining keeps its work; None for a config of another kind."""
    tree = read_tree(config)
    if "retrievers" not in tree:
        return None
    given = tree.get("store")
    if isinstance(given, str):
        return expand_key(config, "store", given)
    return output_dir(config).parent / "mining"


def describe_shards(root: Path, store: Path | None = None) -> View:
    """Describe prepared or mined shards, or how far they are.

    Args:
        root: the dataset's folder.
        store: see `mining_store`.
    """
    path = root / "manifest.json"
    fix = "remove the folder, and make the shards again"
    try:
        if not path.exists() and not any(root.glob("*.arrow")):
            return _describe_building(root, store)
        # Shards get their name by a rename, with the manifest: without it, a file was lost.
        if not path.exists():
            raise UserError(f"{path} is missing", fix=fix)
        manifest = read_record(path, dict[str, Any], fix=fix)
    except UserError as error:
        fault = Fact("last error", str(error), "fail")
        return View(title=f"shards {root}", state="damaged", tone="fail", facts=(fault,))
    number, documents = (manifest.get(key, 0) for key in ("num_examples", "num_documents"))
    sources = tuple(
        (
            str(source.get("name")),
            f"{source.get('rows', 0):,}",
            f"{source.get('examples', 0):,}",
            f"{sum(source.get('dropped', {}).values()):,}",
        )
        for source in manifest.get("sources", ())
    )
    header = ("source", "rows", "examples", "dropped")
    return View(
        title=f"shards {root}",
        state="finished",
        tone="ok",
        done=1.0,
        facts=(Fact("rows", f"{number:,} examples, {documents:,} documents"),),
        grids=(Grid("sources", header, sources),),
    )


def _describe_building(root: Path, store: Path | None) -> View:
    # Of `prepare`: the last file of a task is its summary, STEP/TASK.json.
    done = _parts_by_step(building(root).glob("*/*.json"))
    files = list(building(root).glob("*/*"))
    if store is not None:
        # Of `mine`: every file, STORE/STEP-KEY/...; steps of other settings may be there too.
        found = [path for path in store.glob("*-*/**/*") if path.is_file()]
        done, files = _parts_by_step(found, store), [*files, *found]
    quiet = min((age(path) or 0.0 for path in files), default=None)
    state, tone = _activity(quiet, "task")
    names = ", ".join(f"{name} {count}" for name, count in done.items())
    jobs = jobs_grid(root.with_name(f"{root.name}-jobs"))
    return View(
        title=f"shards {root}",
        state=state,
        tone=tone,
        facts=(Fact("tasks", f"done by step: {names}" if names else "none yet"),),
        grids=(jobs,),
    )


def _parts_by_step(paths: Iterable[Path], store: Path | None = None) -> Counter[str]:
    """Count the finished parts of each step, in the order in which the steps began."""
    return Counter(
        path.parent.name if store is None else path.relative_to(store).parts[0].rpartition("-")[0]
        for path in oldest_first(paths)
    )


# --- several ---------------------------------------------------------------------------------


def unreadable(root: Path, error: UserError | OSError) -> View:
    """Describe a folder whose files cannot be read, such as another user's."""
    fault = Fact("fault", str(explain_os_error(error) or error), "fail")
    return View(title=f"folder {root}", state="cannot be read", tone="fail", facts=(fault,))


def describe_several(root: Path, parts: Sequence[tuple[str, Callable[[], View]]]) -> View:
    """Describe a folder of runs, evaluations and so on in one line each."""
    rows, tones = [], []
    for name, look in parts:
        try:
            view = look()
        except (UserError, OSError) as error:
            view = unreadable(root / name, error)
        # A title is a kind and a path, here one below `root`.
        kind = view.title.partition(f" {root}")[0]
        facts = map(view.fact, ("step", "elements", "rows", "tasks", "time left", "fault"))
        rows.append((name, kind, view.state, ", ".join(filter(None, facts))))
        tones.append(view.tone)
    return View(
        title=f"folder {root}",
        state=f"{len(rows)} found",
        tone="fail" if "fail" in tones else "",
        grids=(Grid("found", ("folder", "kind", "state", "progress"), tuple(rows), tuple(tones)),),
    )
