"""Watch: the numbers of a folder's files, at any moment of their writing, in terminal and page."""

from __future__ import annotations

import html
import io
import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import EvaluateConfig, EvaluatedModel, OwnTask, dump_config
from pipeline.errors import UserError
from pipeline.evaluation.tasks import Element, list_elements
from pipeline.files import write_sealed
from pipeline.run_folder import OWN_CONFIG, RunDir, partial_folder, publish_checkpoint
from pipeline.submission.restart import History
from pipeline.submission.slurm import JobRecord
from pipeline.training.metrics import JsonLines
from pipeline.watch import recognise, render
from pipeline.watch.chains import STAGES
from pipeline.watch.logs import read_log
from pipeline.watch.runs import Metrics, describe_run
from pipeline.watch.view import View, duration, oldest_first, page, thin
from ReasonAug.synthesis.stages import NAMES

ROOT = Path(__file__).resolve().parents[1]


def look(path: Path) -> View:
    (one,) = recognise(path)
    return one()


def values(step: int, **more: float) -> dict[str, float]:
    given = {"loss": 4.0 - 0.1 * step, "accuracy@1": 0.5, "lr": 1e-3, "grad_norm": 2.0}
    timed = {"tokens": 1000.0, "seconds": 0.5, "tokens_per_second": 2000.0}
    return {**given, **timed, "chunks": 3, "peak_memory_gib": 1.0 + step, **more}


def make_run(root: Path, *, steps: int, num_steps: int = 20) -> Path:
    """A run's folder as training writes it, without the training."""
    root.mkdir(parents=True)
    config = {"num_steps": num_steps, "data": {"global_batch_size": 8}}
    (root / "config.yaml").write_text(OWN_CONFIG + json.dumps(config))
    kinds = {"news#1": ("news", ["Find it"]), "web": ("web", [""])}
    described = {
        kind: {"source": source, "instructions": texts, "examples": 9, "share": 0.5}
        for kind, (source, texts) in kinds.items()
    }
    (root / "kinds.json").write_text(json.dumps(described))
    log = JsonLines(root / "metrics.jsonl", 0)
    for step in range(steps):
        log.log(step, values(step), ("news#1", "web")[step % 2])
    return root


def save(root: Path, step: int) -> None:
    path = RunDir(root).checkpoints / f"step-{step:06d}"
    partial_folder(path).mkdir(parents=True)
    state = {"step": step, "optimizer_steps": step, "world_size": 1, "parameters": [], "extra": {}}
    publish_checkpoint(path, {**state, "identity": {}}, {})


def rows(view: View, title: str) -> list[dict[str, str]]:
    grid = next(grid for grid in view.grids if grid.title == title)
    return [dict(zip(grid.header, row, strict=True)) for row in grid.rows]


# --- training runs ---------------------------------------------------------------------------


def test_the_bar_of_a_terminal_ends_its_line(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)
    console.print(render([look(make_run(tmp_path / "run", steps=10))], console))
    lines = console.file.getvalue().splitlines()
    assert any(line.startswith("step ") for line in lines), lines


def test_a_run_shows_step_pace_losses_by_source_and_the_age_of_its_checkpoint(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", steps=10)
    save(run, 4)
    save(run, 8)

    view = look(run)

    assert view.fact("step") == "10 of 20 (50%)"
    assert view.fact("time left").startswith("5 s, at 0.5 s a step")
    assert view.fact("throughput") == "2,000 tokens/s, 16.0 examples/s"
    assert view.fact("memory") == "10.00 GiB at most, on rank 0"
    assert view.fact("checkpoint").startswith("step-000008, 2 steps behind")
    losses = {row["source"]: row for row in rows(view, "loss")}
    assert losses["news#1: Find it"]["steps"] == "5"
    assert losses["news#1: Find it"]["mean of last 50"] == "3.6000"  # of 4.0, 3.8, ..., 3.2
    assert losses["web"]["last"] == "3.1000"


def test_half_a_last_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    metrics = Metrics(run / "metrics.jsonl")
    line = json.dumps({"step": 2, **values(2)}) + "\n"
    with (run / "metrics.jsonl").open("a") as file:
        for part, steps in ((line[:40], 2), (line[40:-1], 2), (line[-1], 3)):
            file.write(part)
            file.flush()
            metrics.read()
            assert [one["step"] for one in metrics.lines] == list(range(steps))
    assert metrics.num_damaged == 0


def test_a_run_that_is_resumed_while_it_is_watched_goes_back_and_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=9)
    metrics = Metrics(run / "metrics.jsonl")
    assert describe_run(run, metrics).fact("step") == "9 of 20 (45%)"
    for first, last in ((4, 6), (2, 3)):  # twice, each time from an older checkpoint
        log = JsonLines(run / "metrics.jsonl", first)
        for step in range(first, last + 1):
            log.log(step, values(step, loss=1.0))
        view = describe_run(run, metrics)
        assert view.fact("step").startswith(f"{last + 1} of 20")
        assert not view.fact("repeated")
    assert [line["loss"] for line in metrics.lines] == [4.0, 3.9, 1.0, 1.0]


def test_of_two_runs_lines_in_one_file_the_later_ones_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("not JSON\n[1]\n\n")
        file.writelines(
            json.dumps({"step": step, **values(step, loss=9.0)}) + "\n" for step in (0, 1)
        )

    view = look(run)

    assert view.fact("step").startswith("2 of 20")
    assert view.fact("repeated").startswith("5 lines")
    assert view.fact("damaged").startswith("2 lines")
    assert rows(view, "loss")[0]["first"] == "9.0000"


def test_a_run_without_a_step_and_a_run_that_is_over_say_so(tmp_path: Path) -> None:
    empty = RunDir(tmp_path / "empty")
    empty.claim()
    del empty  # closes the lock, as the end of its process does
    assert look(tmp_path / "empty").state == "no step yet"
    held = RunDir(tmp_path / "held")
    held.claim()
    assert look(tmp_path / "held").state == "starting"
    run = make_run(tmp_path / "run", steps=20)
    assert (look(run).state, look(run).done) == ("finished", 1.0)
    old = time.time() - 7200
    other = make_run(tmp_path / "other", steps=3)
    os.utime(other / "metrics.jsonl", (old, old))
    assert look(other).state == "not running: last step 2:00 h ago"


def test_a_run_that_logs_few_of_its_steps_is_not_late_between_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0, num_steps=1000)
    held = RunDir(run)
    held.claim()
    ten_minutes_ago = time.time() - 600
    for every, state in ((1, "running, no step for 10 min"), (100, "running")):
        log = JsonLines(run / "metrics.jsonl", 0)
        for step in (every - 1, 2 * every - 1):
            log.log(step, values(step, seconds=3.0))
        os.utime(run / "metrics.jsonl", (ten_minutes_ago, ten_minutes_ago))
        assert look(run).state == state
        assert look(run).fact("step").startswith(f"{2 * every} of 1,000")


def test_a_step_without_a_finite_loss_is_counted_and_breaks_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    log = JsonLines(run / "metrics.jsonl", 3)
    log.log(3, {"loss": float("nan"), "lr": 0.0, "skipped": 1, "tokens_per_second": 0.0})
    (run / "non-finite-step-5-rank-0.json").write_text('{"what": "loss is nan"}')

    view = look(run)

    assert view.fact("step").startswith("4 of 20")
    assert view.fact("skipped steps").startswith("1")
    assert view.fact("not finite").startswith("loss is nan (non-finite-step-5")
    assert page([view], refresh_seconds=None)


def test_restarts_and_their_reasons_come_from_the_jobs_own_records(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    history = History(run, "7")
    history.start(0, "node[1-2]")
    history.end("exit code 1")
    history.start(2, "node1")
    history.hand_over("9")  # a successor has a copy
    log = run / "jobs" / "diffembed-train-7.out"
    error = "RuntimeError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"
    failed = (
        f"3: Traceback (most recent call last):\n3: {error}\nsrun: error: node1: task 3: Exited\n"
    )
    log.write_text("start: 2 nodes\n" + failed)

    view = look(run)

    starts = rows(view, "2 starts")
    assert [(row["from step"], row["nodes"]) for row in starts] == [
        ("0", "node[1-2]"),
        ("2", "node1"),
    ]
    assert starts[0]["end"] == "exit code 1"
    assert starts[1]["end"].startswith("running")
    assert view.fact("last error") == f"{error} ({log.name})"
    with log.open("a") as file:
        file.write("0: step 3/20  loss 3.8\n")
    assert look(run).fact("last error").startswith("before the present start: RuntimeError")


OOM = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0"


@pytest.mark.parametrize(
    ("lines", "error", "failed"),
    [
        (["step 1/9", "UserError: lr | fix: x", "step 2/9"], "UserError: lr | fix: x", False),
        (["0: torch.OutOfMemoryError: CUDA", "x 12 end: exit code 1", "not requeued: no"],
         "torch.OutOfMemoryError: CUDA", True),
        ([OOM, "srun: error: n1: task 0: Out Of Memory"], OOM, True),
        (["1: RuntimeError: a", "srun: error: n1: task 1", "requeued: it crashed"],
         "RuntimeError: a", False),
        (["Stopped: stop file after step 3 of 9; saved c", "not requeued: stopped on request"],
         "", False),
        (["warnings: 3 errors were mended", "an Error in a sentence"], "", False),
        (["bar 10%\rbar 20%\rValueError: b"], "ValueError: b", True),
        ([""], "", False),
    ],
    ids=str,
)  # fmt: skip
def test_the_error_that_ended_a_log_is_told_from_earlier_ones(
    lines: list[str], error: str, failed: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(lines) + "\n")

    end = read_log(log)

    assert end is not None and (end.error, end.failed) == (error, failed)


# --- evaluations -----------------------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path: Path) -> EvaluateConfig:
    """Two models on three tasks, of which the third has two lengths."""
    return EvaluateConfig(
        output_dir=tmp_path / "scores",
        models=tuple(EvaluatedModel(name=name, path=tmp_path / name) for name in ("old", "new")),
        tasks=tuple(OwnTask(name=name, path=tmp_path / name) for name in ("faq", "law", "long")),
        lengths={"long": (512, 1024)},
        max_length=256,
    )


def finish(element: Element, score: float) -> None:
    element.folder.mkdir(parents=True)
    result = {"metric": "ndcg_at_10", "score": score}
    element.result_path.write_text(json.dumps(result))


def test_an_array_shows_what_is_scored_runs_and_failed_with_the_failing_line(
    evaluation: EvaluateConfig,
) -> None:
    elements = list_elements(evaluation)
    jobs = evaluation.output_dir / "jobs"
    jobs.mkdir(parents=True)
    (jobs / "evaluate-0123.yaml").write_text(dump_config(evaluation))
    record = JobRecord(jobs, "cluster")
    record.add("evaluate-0123", "41")
    finish(elements[0], 0.25)
    finish(elements[5], 0.5)
    fault = "UserError: law: no folder | fix: correct snapshots"
    (jobs / "diffembed-evaluate-41_1.out").write_text(f"loading\n{fault}\n")
    cancelled = "slurmstepd: error: *** JOB 43 ON n1 CANCELLED AT 2026-11-29 DUE TO TIME LIMIT ***"
    (jobs / "diffembed-evaluate-41_2.out").write_text(f"{fault}\nloading again\n{cancelled}\n")
    (jobs / "diffembed-evaluate-41_3.out").write_text("element 4/8 old long\n")

    view = look(evaluation.output_dir)

    assert view.fact("elements") == "2 scored, 1 running, 2 failed, 3 waiting"
    assert view.done == 2 / 8
    tasks = {row["task"]: row for row in rows(view, "tasks")}
    assert (tasks["faq"]["scored"], tasks["law"]["scored"], tasks["law"]["failed"]) == (
        "1",
        "1",
        "1",
    )
    open_elements = rows(view, "failed and running elements")
    assert [(row["element"], row["state"]) for row in open_elements] == [
        *(("1", "failed"), ("2", "failed"), ("3", "running"))
    ]
    assert open_elements[0]["line of its log"] == fault
    assert open_elements[1]["line of its log"] == cancelled
    assert {row["task"]: (row.get("old"), row.get("new")) for row in rows(view, "scores")} == {
        **{"faq": ("0.2500", ""), "law": ("", "0.5000")}
    }
    assert rows(view, "Slurm jobs")[0]["last line of its log"].startswith("2 failed: slurmstepd")


def test_scores_without_any_config_are_not_taken_for_all_of_an_evaluation(
    evaluation: EvaluateConfig, tmp_path: Path
) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(dump_config(evaluation))
    elements = list_elements(evaluation)
    for element in elements[:7]:
        finish(element, 0.1)

    assert look(evaluation.output_dir).state == "every element found is scored"
    assert look(config).fact("elements") == "7 scored, 1 waiting"
    assert look(config).state == "not finished"
    finish(elements[7], 0.1)
    assert look(config).state == "finished"


@pytest.mark.parametrize("key", ["output_dir", "output", "store"])
def test_a_path_with_an_unset_variable_is_one_line(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    config = tmp_path / "mine.yaml"
    tree = {"data": "a", "retrievers": [{"name": "a", "path": "bm25"}], "output": "b"}
    if key == "output_dir":
        tree = {"num_steps": 1, "model": {"path": "a"}, "data": {"path": "b"}}
    config.write_text(json.dumps({**tree, key: "$NOT_SET/run"}))

    with pytest.raises(UserError, match=rf"{key}: '\$NOT_SET/run' .*a path without \$NOT_SET"):
        recognise(config)


def test_files_of_one_time_keep_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("first", "second", "third", "gone")]
    for number, path in enumerate(paths[:3]):
        path.touch()
        os.utime(path, (0, 1_000 if number < 2 else 500))

    assert [path.name for path in oldest_first(paths)] == ["third", "first", "second", "gone"]


def test_scores_made_during_training_are_in_the_runs_own_view(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=10)
    for step, score in ((5, 0.25), (10, 0.75)):
        folder = RunDir(run).evaluations / "results" / f"step-{step:06d}" / "faq" / "256"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"score": score}))

    view = look(run)

    assert rows(view, "scores during training")[0]["its score"] == "0.7500"
    plot = next(plot for plot in view.plots if plot.title == "scores of checkpoints")
    assert plot.lines == {"faq@256": [(5, 0.25), (10, 0.75)]}


# --- chains, syntheses, several --------------------------------------------------------------


def test_a_chain_shows_each_of_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    chain = Path("launch/recipes/quickstart/chain.yaml")

    def states(path: Path) -> dict[str, str]:
        return {row["stage"]: row["state"] for row in rows(look(path), "stages")}

    stages = ["prepare", "train", "export-latest", "export-init", "evaluate", "report"]
    fresh = states(chain)
    assert set(fresh) <= set(stages) and set(fresh.values()) == {"waiting"}
    shards = Path("runs/quickstart/shards")
    shards.mkdir(parents=True)
    manifest = {"num_examples": 5, "num_documents": 6, "sources": []}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    make_run(Path("runs/quickstart/run"), steps=2)
    log = Path("runs/quickstart/run/jobs/diffembed-train-3.out")
    log.parent.mkdir()
    log.write_text("UserError: data.path: damaged | fix: prepare it again\n")
    now = states(chain.parent)  # the folder of the chain's config
    assert (now["prepare"], now["train"], now["evaluate"]) == ("finished", "failed", "waiting")
    train = next(row for row in rows(look(chain), "stages") if row["stage"] == "train")
    assert train["detail"].startswith("UserError: data.path: damaged")


def test_a_synthesis_counts_answers_failures_and_items_of_each_stage(tmp_path: Path) -> None:
    assert STAGES == NAMES
    for part in ("ledger", "stages"):
        (tmp_path / part).mkdir()
    answers = [json.dumps({"status": status}) for status in ("ok", "failed", "ok")]
    # The last answer is being written.
    (tmp_path / "ledger" / "problems.jsonl").write_text("\n".join(answers) + '\n{"status": "fa')
    (tmp_path / "stages" / "problems.jsonl").write_text("{}\n")

    view = look(tmp_path)

    (stage,) = rows(view, "stages")
    assert tuple(stage.values()) == ("problems", "3", "1", "1")
    assert view.state == "running"
    (tmp_path / "finished.json").write_text('{"rows": 7}')
    assert (look(tmp_path).state, look(tmp_path).fact("rows")) == ("finished", "7")


def test_shards_that_are_mined_show_the_parts_of_each_step_until_they_are_there(
    tmp_path: Path,
) -> None:
    config = tmp_path / "mine.yaml"
    tree = {"data": "a", "output": str(tmp_path / "mined"), "retrievers": [{"name": "b"}]}
    config.write_text(json.dumps(tree))
    assert look(config).state == "no task yet"
    for name in ("texts-0a/documents/0", "texts-0a/documents/1", "found-1b/0"):
        (tmp_path / "mining" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mining" / name).touch()

    view = look(config)

    assert view.state == "running"
    assert sorted(re.findall(r"\w+ \d", view.fact("tasks"))) == ["found 1", "texts 2"]
    (tmp_path / "mined").mkdir()
    (tmp_path / "mined" / "manifest.json").write_text('{"num_examples": 9, "num_documents": 8}')
    assert look(config).fact("rows") == "9 examples, 8 documents"


def test_a_damaged_manifest_is_a_fault_of_the_shards(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "manifest.json"
    path.parent.mkdir()
    write_sealed(path, {"num_examples": 9, "num_documents": 8})
    assert look(path.parent).fact("rows") == "9 examples, 8 documents"
    path.write_text(path.read_text().replace("9", "7", 1))

    view = look(path.parent)

    assert (view.state, view.tone) == ("damaged", "fail")
    assert "manifest.json: damaged" in view.fact("last error")


def test_a_number_that_no_float_holds_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, **values(2), "loss": 10**400}) + "\n")
    (row,) = [row for row in rows(look(run), "loss") if row["source"] == "news#1: Find it"]
    assert row["last"] == "4.0000"


def test_a_folder_of_several_runs_shows_one_line_for_each(tmp_path: Path) -> None:
    make_run(tmp_path / "a", steps=20)
    make_run(tmp_path / "b", steps=5)
    (tmp_path / "notes").mkdir()

    found = {row["folder"]: row for row in rows(look(tmp_path), "found")}

    assert {name: row["progress"].partition(",")[0] for name, row in found.items()} == {
        **{"a": "20 of 20 (100%)", "b": "5 of 20 (25%)"}
    }
    assert found["a"]["kind"] == "training run"


def test_a_folder_that_cannot_be_read_is_one_line_among_the_others(tmp_path: Path) -> None:
    make_run(tmp_path / "a", steps=5)
    for name, text in (("b", "train: [\n"), ("c", "train: nowhere.yaml\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chain.yaml").write_text(text)
    # Not a chain.
    run = make_run(tmp_path / "supplies", steps=10)
    (run / "supply-chain.yaml").write_text("output_dir: x\ncorpus: [y]\n")
    (run / "blockchain.yaml").write_text("train: [\n")

    found = {row["folder"]: row for row in rows(look(tmp_path), "found")}

    assert found["a"]["progress"].startswith("5 of 20")
    for name, fault in (("b", "not a YAML file"), ("c", "nowhere.yaml")):
        assert found[name]["state"] == "cannot be read"
        assert fault in found[name]["progress"]
    assert found["supplies"]["progress"].startswith("10 of 20")
    with pytest.raises(UserError, match="nowhere"):
        recognise(tmp_path / "c")


@pytest.mark.parametrize("name", ["nowhere", "empty", "notes.yaml", "starter.yaml"])
def test_anything_else_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.yaml").write_text("- a list\n")
    (tmp_path / "starter.yaml").write_text("output_dir: x\ncorpus: [y]\nvocab_size: 300\n")

    with pytest.raises(UserError) as error:
        recognise(tmp_path / name)

    assert name in str(error.value) and "\n" not in str(error.value)


# --- terminal and page -----------------------------------------------------------------------


def test_in_a_pipe_the_command_prints_once_without_colours_or_broken_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4)
    (run / "jobs").mkdir()
    error = "ValueError: " + "a long message [with brackets] " * 20
    (run / "jobs" / "diffembed-train-5.out").write_text(error + "\n")

    shown = CliRunner().invoke(app, ["watch", str(run)], env={"FORCE_COLOR": None})

    assert shown.exit_code == 0, shown.output
    assert error.strip() in shown.output
    assert "\x1b" not in shown.output
    for fact in look(run).facts:
        assert fact.name in shown.output


class _Page(HTMLParser):
    """The texts of a page, and everything in it that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [tag] if tag in ("script", "link", "img", "iframe", "object") else []
        self.loaded += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_one_file_with_the_same_numbers_and_plots_and_loads_nothing(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "a <run>", steps=6)
    target = tmp_path / "page.html"

    shown = CliRunner().invoke(app, ["watch", str(run), "--once", "--html", str(target)])

    assert shown.exit_code == 0, shown.output
    assert f"written: {target}" in shown.output
    text = target.read_text()
    parsed = _Page(text)
    assert parsed.loaded == []
    assert "url(http" not in text and "@import" not in text and "http-equiv" not in text
    view = look(run)
    for fact in view.facts:
        # Ages may have gone on.
        assert fact.name == "checkpoint" or fact.value in parsed.texts, fact
    for grid in view.grids:
        assert {cell for row in grid.rows for cell in row if cell} <= set(parsed.texts)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 1 + len(view.plots) >= 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "news#1: Find it" in parsed.texts and f"training run {run}" in "".join(parsed.texts)
    assert 'http-equiv="refresh"' in page([view], refresh_seconds=5)


def test_names_of_sources_and_tasks_are_drawn_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0)
    names = ("price_$5_to_$9", "_hidden", "<b>bold & more")
    log = JsonLines(run / "metrics.jsonl", 0)
    for step in range(9):
        log.log(step, values(step), names[step % 3])
        result = run / f"evaluations/results/step-{step + 1:06d}/$x_$y/64/result.json"
        result.parent.mkdir(parents=True)
        result.write_text(json.dumps({"score": 0.5}))

    text = page([look(run)], refresh_seconds=None)

    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert {*names, "$x_$y@64"} <= {html.unescape(t).strip() for t in _Page(drawn).texts}


def test_a_long_run_stays_a_small_page() -> None:
    kept = thin(range(250_000))

    assert (kept[0], kept[-1], len(kept)) == (0, 249_999, 1000)
    assert thin(range(7)) == list(range(7))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (45.4, "45 s"), (600, "10 min"), (11_100, "3:05 h"), (187_200, "2 days 4 h")],
)
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words
