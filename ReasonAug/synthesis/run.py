"""Run the stages of a synthesis, one after another, each over a window of items."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import signal
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.loading import dump_config, require
from pipeline.errors import Stopped, UserError, say_warning
from pipeline.files import (
    atomic_path,
    fingerprint_files,
    remove_unfinished,
    require_writable,
    write_json,
    write_text,
)
from ReasonAug.generations import read_generations
from ReasonAug.replicas.generated import write_generated_bright
from ReasonAug.synthesis import card, concepts
from ReasonAug.synthesis.calls import (
    IMPORTED,
    Calls,
    Halt,
    Interrupted,
    Item,
    NotAskedError,
    Secrets,
    Transport,
    Unanswered,
    asked_prompts,
)
from ReasonAug.synthesis.clean import Clean
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.execution import RecordedExecution
from ReasonAug.synthesis.folder import (
    Folder,
    inputs_digest,
    is_finished,
    outputs_of,
    run_digest,
    stage_digest,
)
from ReasonAug.synthesis.ledger import SANDBOX, Ledger
from ReasonAug.synthesis.limits import Budget, total
from ReasonAug.synthesis.lines import Lines, alive, encode, iterate, write_shuffled
from ReasonAug.synthesis.plan import Plan
from ReasonAug.synthesis.prompts import Prompts
from ReasonAug.synthesis.rows import RowCounts, as_problem, counts_by_stage, training_rows
from ReasonAug.synthesis.stages import CLEAN, NAMES, STAGES, Context, Stage

_WINDOW = 32  # items in progress for each request in flight: one slow item holds up no others


def synthesize(
    config: SynthesisConfig,
    *,
    dry_run: bool = False,
    limit: int | None = None,
    retry_failed: bool = False,
) -> None:
    """Run all stages, or count what is left of them.

    Args:
        config: the config.
        dry_run: print calls, tokens and price per stage; send nothing.
        limit: write this many problems only, and a page with them instead of rows.
        retry_failed: ask again what failed for good.

    Raises:
        UserError: the config or an input is wrong, or no call can succeed.
        Stopped: the budget is used up, no server answers, or a signal came.
    """
    require(
        bool(config.model.servers) or dry_run,
        "model.servers",
        [],
        "at least one server",
        "name one, or start one in a job: `diffembed submit synthesize`",
    )
    folder = Folder(root=config.output_dir)
    require_writable(folder.root, key="output_dir")
    if config.quality.reference:
        read_generations(config.quality.reference)  # before any money is spent
    prompts = Prompts(config.prompts)
    if not dry_run and limit is None and not retry_failed and is_finished(config, prompts, folder):
        finished = json.loads(folder.finished.read_text())
        print(f"finished already: {finished['rows']:,} rows in {folder.rows}")
        return
    with Ledger.open(folder.ledger) as ledger:
        run = Run(config, prompts, ledger, folder, limit=limit, retry_failed=retry_failed)
        if dry_run:
            run.print_plan(asyncio.run(run.plan()))
            return
        # A killed run may have left them; under the ledger's lock, no other run writes here.
        for path in (folder.rows, *map(folder.stage, NAMES)):
            remove_unfinished(path)
        write_text(folder.root / "config.yaml", dump_config(config))
        try:
            asyncio.run(run.all_stages())
        except Interrupted as stopped:
            # Whoever sent the signal does not wait for a plan.
            raise Interrupted(f"{stopped} | the same command continues") from None
        except Stopped as stopped:
            plan = asyncio.run(run.plan())
            run.print_plan(plan)
            left = sum(stage.calls for stage in plan.stages())
            raise type(stopped)(
                f"{stopped} | about {left:,} calls are left; the same command continues"
            ) from None
        if limit is not None:
            run.write_sample()
        else:
            run.finish()


def describe_state(config: SynthesisConfig) -> dict[str, Any]:
    """Return what a Slurm job must know: folder, model, key, rows if finished, resolved config."""
    folder = Folder(root=config.output_dir)
    rows = None
    if is_finished(config, Prompts(config.prompts), folder):
        rows = json.loads(folder.finished.read_text())["rows"]
    return {
        "output_dir": str(config.output_dir),
        "model": config.model.name,
        "api_key_env": config.model.servers[0].api_key_env if config.model.servers else None,
        "rows": rows,
        "config": dump_config(config),
    }


class Run:
    """One run over a ledger."""

    def __init__(
        self,
        config: SynthesisConfig,
        prompts: Prompts,
        ledger: Ledger,
        folder: Folder,
        *,
        limit: int | None,
        retry_failed: bool,
    ) -> None:
        self._config, self._prompts, self._ledger = config, prompts, ledger
        self._limit, self._retry_failed = limit, retry_failed
        self._folder = folder
        self._work = folder if limit is None else Folder(root=folder.root / "sample")
        self._halt = Halt()
        self._plan: Plan | None = None

    async def plan(self) -> Plan:
        """Count the calls that the ledger does not answer."""
        self._plan = plan = Plan(self._config, self._prompts, self._ledger)
        work, halt = self._work, self._halt
        self._halt = Halt()
        try:
            with tempfile.TemporaryDirectory(dir=self._folder.root, prefix=".plan.") as temporary:
                self._work = Folder(root=Path(temporary))
                await self._run(plan)
        finally:
            self._plan, self._work, self._halt = None, work, halt
        return plan

    async def all_stages(self) -> None:
        """Run every stage that is not finished yet, until a signal comes."""
        # Imported here: everything else of ReasonAug works without the client.
        with _needs_extra():
            from ReasonAug.synthesis.batches import BatchTransport
            from ReasonAug.synthesis.servers import LiveTransport
        tokens, cost = total(self._config, self._ledger.usage())
        self._budget = Budget(self._config, tokens, cost)
        shared = (self._config, Secrets(self._config), self._budget, self._halt)
        transport: LiveTransport | BatchTransport
        if self._config.api == "batch":
            transport = BatchTransport(*shared, self._folder.ledger)
        else:
            transport = LiveTransport(*shared)
        with self._signals():
            try:
                await self._run(transport)
            finally:
                await transport.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Halt at the first SIGINT or SIGTERM; a second one ends the process as usual."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)

        def on_signal() -> None:
            for number in numbers:
                loop.remove_signal_handler(number)
            self._halt.set(Interrupted("stopped by a signal"))

        for number in numbers:
            loop.add_signal_handler(number, on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def _run(self, transport: Transport) -> None:
        config = self._config
        calls = Calls(
            config,
            self._prompts,
            self._ledger,
            transport,
            self._halt,
            retry_failed=self._retry_failed,
        )
        execution = None
        if config.checks.solution and config.checks.execution == "sandbox":
            execution = RecordedExecution(
                self._ledger, self._halt, limits=config.checks.sandbox, dry_run=bool(self._plan)
            )
        context = Context(config=config, calls=calls, execution=execution, limit=self._limit)
        stages: list[Stage] = [*STAGES, Clean(config, self._work.root).stage()]
        digest = inputs_digest(config, self._prompts)
        digest = await self._once(
            "concepts", digest, calls, lambda: self._concepts(context, execution)
        )
        before = "concepts"
        for stage in stages:
            digest = await self._once(
                stage.name, digest, calls, functools.partial(self._stage, stage, context, before)
            )
            before = stage.name
        calls.end()

    async def _once(
        self, name: str, before: str, calls: Calls, work: Callable[[], Awaitable[None]]
    ) -> str:
        """Run a stage unless its lines are there already; return the digest of what they are of."""
        digest = stage_digest(self._config, name, before, self._folder.ledger)
        if self._is_current(name, digest):
            return digest
        if self._plan:
            self._plan.stage = name
        self._say_other_answers(name)
        await work()
        if self._plan:
            self._plan.recorded[name] = self._ledger.stage(name).num_answers()
            return digest
        calls.end_stage(name)
        self._ledger.stage(name).sync()
        digest = stage_digest(self._config, name, before, self._folder.ledger)
        write_text(self._mark(name), self._signature(name, digest))
        return digest

    # --- which stages are finished -----------------------------------------------------------

    def _mark(self, name: str) -> Path:
        return self._work.stage(name).with_suffix(".digest")

    def _is_current(self, name: str, digest: str) -> bool:
        if self._plan or self._limit is not None or self._retry_failed:
            return False
        try:
            return self._mark(name).read_text() == self._signature(name, digest)
        except OSError:
            return False

    def _signature(self, name: str, digest: str) -> str:
        path = self._work.stage(name)
        return f"{digest} {fingerprint_files(path.parent, [path])}"

    # --- one stage ---------------------------------------------------------------------------

    async def _concepts(self, context: Context, execution: RecordedExecution | None) -> None:
        unknown: list[str] = []
        listed = list(concepts.listed_concepts(self._config))
        kinds = {item["kind"] for item in listed}
        kinds |= {self._config.kind(wanted.domain) for wanted in self._config.concepts.propose}
        if execution and "coding" in kinds and not self._plan:
            execution.require()  # before any money is spent
        found = await concepts.all_concepts(
            self._config, context.calls, limit=self._limit, unknown=unknown
        )
        if self._limit is not None:
            found = _choose(found, self._config.seed, self._limit)
        path = self._work.stage("concepts")
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for item in found:
                file.write(encode(item))
            for number, domain in enumerate(unknown[: self._limit]):
                file.write(encode(_unknown_concept(self._config, domain, number)))
        if not self._plan:
            kept = sum(item["dropped"] is None for item in found)
            repeated = f", {len(found) - kept} repeated" if kept < len(found) else ""
            print(f"concepts: {kept:,}{repeated}")

    async def _stage(self, stage: Stage, context: Context, before: str) -> None:
        source = self._work.stage(before)
        items = stage.feed(context, alive(source))
        sift = stage.make_sift(self._config)
        window = self._config.limits.concurrency * _WINDOW
        if self._config.api == "batch":
            window = self._config.batch.max_requests
        path = self._work.stage(stage.name)
        progress = self._progress(stage, context, source)
        with progress.shown(), atomic_path(path) as temporary, temporary.open("wb") as file:
            async for item in in_order(items, self._one(stage, context), window):
                item = sift(item)
                progress.advance(item["dropped"])
                file.write(encode(item))

    def _one(self, stage: Stage, context: Context) -> Callable[[Item], Awaitable[Item]]:
        async def complete(item: Item) -> Item:
            if item.get("unknown"):
                assert self._plan
                self._plan.add(stage.prompts(self._config, item))
                return item
            asked: list[str] = []
            asked_prompts.set(asked)
            try:
                return await stage.work(context, item)
            except Unanswered as failed:
                return {**item, **stage.blank, "dropped": failed.reason}
            except NotAskedError:
                assert self._plan
                left = list(stage.prompts(self._config, item))
                for name in asked:
                    if name in left:
                        left.remove(name)
                self._plan.add(left)
                return {**item, "unknown": True}
            except Exception as error:
                # Otherwise the items in progress would still ask all their questions.
                self._halt.set(error)
                raise

        return complete

    def _progress(self, stage: Stage, context: Context, source: Path) -> Any:
        if self._plan:
            return _Silent()
        with _needs_extra():
            from ReasonAug.synthesis.progress import StageProgress

        total_items = sum(1 for _ in stage.feed(context, alive(source)))
        return StageProgress(
            stage.name, total_items, sent=lambda: context.calls.sent, spent=self._spent
        )

    def _spent(self) -> str:
        prices = self._config.prices
        if not (prices.prompt or prices.completion):
            return f"{self._budget.tokens:,} tokens"
        return f"{self._budget.cost:.2f} {prices.currency}"

    def _say_other_answers(self, stage: str) -> None:
        """Say how many recorded answers were asked with another model, prompt or parameters."""
        if self._plan:
            return
        current = set(self._prompts.labels())
        model = self._config.model
        others: dict[str, int] = {}
        for (name, prompt, _), count in self._ledger.stage(stage).asked_with.items():
            if name in (SANDBOX, IMPORTED):
                continue
            if prompt not in current:
                cause = f"another version of the prompt {prompt.partition('@')[0]!r}"
            elif name not in (model.name, model.judge):
                cause = f"the model {name!r}"
            else:
                continue
            others[cause] = others.get(cause, 0) + count
        for cause, count in others.items():
            say_warning(f"{stage}: {count:,} recorded answers of {cause} are not used")

    # --- the end -----------------------------------------------------------------------------

    def finish(self) -> None:
        """Write rows, summary and card."""
        folder = self._folder
        counts = RowCounts()
        lines = Lines(folder.stage(CLEAN))
        with contextlib.closing(lines), atomic_path(folder.rows) as temporary:
            rows = training_rows(self._config, lines, counts)
            number = write_shuffled(
                temporary,
                rows,
                seed=f"{self._config.seed}/order of rows",
                scratch=folder.root / ".rows.unshuffled",
            )
            self._require_quality(temporary)
            stages = counts_by_stage({name: iterate(folder.stage(name)) for name in NAMES})
            summary = card.summarise(self._config, stages, self._ledger.usage(), counts)
        if (hub := self._config.rows.hub) is not None:
            accepted = [as_problem(item) for item in alive(folder.stage(CLEAN))]
            write_generated_bright(hub, accepted, held_out=set(counts.held_out))
        write_json(folder.root / "summary.json", summary)
        sample = card.sample_page(itertools.islice(alive(folder.stage(CLEAN)), 3))
        write_text(folder.root / "README.md", card.card(self._config, summary, sample))
        digest = run_digest(self._config, self._prompts, folder.ledger)
        outputs = fingerprint_files(folder.root, outputs_of(folder))
        write_json(folder.finished, {"inputs": digest, "outputs": outputs, "rows": number})
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary["rows"].items())
        print(f"training rows: {number:,} ({kinds})")
        print(f"written: {folder.rows}")

    def _require_quality(self, rows: Path) -> None:
        """Write the report on the data, and refuse rows that miss a threshold.

        Raises:
            UserError: names the thresholds; no rows are written.
        """
        # Slow to import, as are a few others that a finished run does without.
        from ReasonAug import quality
        from ReasonAug.quality_report import write_quality

        config = self._config
        files = {name: iterate(self._folder.stage(name)) for name in NAMES[2:]}
        figures = quality.measure(
            files, iterate(rows), reference=config.quality.reference, seed=config.seed
        )
        page = write_quality(figures, config.strict, self._folder.root)
        quality.require_quality(figures, config.strict, page)

    def write_sample(self) -> None:
        """Write a page with the problems of a sample."""
        items: dict[str, Item] = {}
        # The last line of an item has the most information.
        for name in NAMES[2:]:
            items |= {item["id"]: item for item in iterate(self._work.stage(name))}
        page = self._folder.root / "sample.md"
        kept = sum(item["dropped"] is None for item in items.values())
        head = f"# Sample: {len(items)} problems, {kept} kept\n\n"
        write_text(page, head + card.sample_page(items.values()) + "\n")
        print(f"written: {page} ({len(items)} problems, {kept} kept); read it before the whole run")

    def print_plan(self, plan: Plan) -> None:
        """Print what is left as a table."""
        found = {stage.stage: stage for stage in plan.stages()}
        shown = [found[name] for name in NAMES if name in found]
        unit = self._config.prices.currency
        head = ("stage", "recorded", "calls left", "prompt tokens", "completion tokens", unit)
        rows: list[tuple[Any, ...]] = [
            (s.stage, s.recorded, s.calls, s.prompt_tokens, s.completion_tokens, f"{s.cost:.2f}")
            for s in shown
        ]
        sums = [sum(row[column] for row in rows) for column in range(1, 5)]
        rows.append(("in all", *sums, f"{sum(s.cost for s in shown):.2f}"))
        print("\n".join(card.table(head, rows)))
        print("Estimated as if every item were kept; tokens from earlier answers if there are any.")


async def in_order(
    items: Iterator[Item], work: Callable[[Item], Awaitable[Item]], window: int
) -> AsyncIterator[Item]:
    """Yield the finished items in their order, with at most `window` of them in progress.

    After an error the items in progress are finished first, so that no paid answer is lost.
    """
    waiting: deque[asyncio.Future[Item]] = deque()
    try:
        for item in items:
            waiting.append(asyncio.ensure_future(work(item)))
            if len(waiting) >= window:
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    except Exception:
        await asyncio.gather(*waiting, return_exceptions=True)
        raise


class _Silent:
    """The progress of a dry run."""

    def advance(self, dropped: str | None) -> None:
        """Count nothing."""

    def shown(self) -> contextlib.nullcontext[None]:
        """Show nothing."""
        return contextlib.nullcontext()


def _choose(found: Sequence[Item], seed: int, limit: int) -> list[Item]:
    """Return the concepts of a sample, drawn by the hash of their ids."""
    kept = [item for item in found if item["dropped"] is None]
    kept.sort(key=lambda item: concepts.digest(f"{seed}/sample/{item['id']}"))
    return kept[:limit]


def _unknown_concept(config: SynthesisConfig, domain: str, number: int) -> Item:
    return {
        "id": f"unknown-{number}",
        "domain": domain,
        "kind": config.kind(domain),
        "concept": "",
        "origin": "model",
        "definition": "",
        "dropped": None,
        "unknown": True,
    }


@contextlib.contextmanager
def _needs_extra() -> Iterator[None]:
    """Name the extra whose package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"synthesize needs the package {error.name!r}",
            fix="pip install 'diffembed[synthesize]'",
        ) from error
