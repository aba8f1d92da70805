"""The elements, instructions and own tasks of an evaluation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mteb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_support import MtebEncoder, load_letters
from mteb.abstasks import AbsTaskRetrieval
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import (
    EvaluateConfig,
    OwnTask,
    build_config,
    dump_config,
)
from pipeline.errors import UserError
from pipeline.evaluation.datasets import (
    prefetch,
)
from pipeline.evaluation.report import write_report
from pipeline.evaluation.run import embed, num_elements, plan, run_all, run_element, score_all
from pipeline.evaluation.tasks import (
    BENCHMARKS,
    INSTRUCTIONS,
    benchmark_of,
    expand,
    instruction_for,
    list_elements,
    read_split,
)
from pipeline.watch.elements import describe_evaluation

AOPS, CORE = "BrightAopsRetrieval", "Core17InstructionRetrieval"


# As published with the paper, its spelling included.
PUBLISHED = {
    AOPS: "Given a problem, rretrieve the relevant problems that can be solved by the similar math "
    "theorems:",
    "BrightBiologyRetrieval": "Given a biology post, retrieve relevant passages that help answer "
    "the post:",
    "BrightEconomicsRetrieval": "Given a economics post, retrieve relevant passages that help "
    "answer the post:",
    "BrightLeetcodeRetrieval": "Given a coding problem, retrieve the relevant problems that can be "
    "solved by the similar algorithms or data structures:",
    "BrightPonyRetrieval": "Given a Pony question, retrieve relevant passages that help answer the "
    "question:",
    "BrightTheoremQATheoremsRetrieval": "Given a problem, retrieve the relevant theorems that help "
    "solve the given problem:",
    "BrightTheoremQAQuestionsRetrieval": "Given a problem, retrieve the relevant problems that can "
    "be solved by the similar theorems:",
    "BrightStackoverflowRetrieval": "Given a post, retrieve relevant passages that help answer the "
    "post:",
    "BrightRetrieval": "Given a problem, retrieve solutions to other problems that use the same "
    "method as the correct solution to the given question:",
    # The paper names no sentence for these.
    "BrightPsychologyRetrieval": "Retrieve text based on user query:",
    "LEMBNeedleRetrieval": "Retrieve text based on user query:",
    "Core17InstructionRetrieval": "Retrieve text based on user query:",
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_papers_model_gets_the_papers_sentence(task, config):
    model = dataclasses.replace(config.models[0], instruction_set="paper")
    assert instruction_for(task, model, config) == PUBLISHED[task]


def test_a_models_own_text_wins_over_the_configs_and_that_over_the_set(config):
    model = config.models[0]
    assert instruction_for(AOPS, model, config) == INSTRUCTIONS[AOPS]
    config = dataclasses.replace(config, instructions={AOPS: "for all"})
    assert instruction_for(AOPS, model, config) == "for all"
    model = dataclasses.replace(model, instructions={AOPS: ""})
    assert instruction_for(AOPS, model, config) == ""


def test_an_unknown_set_is_the_users_error():
    tree = {
        "output_dir": "out",
        "models": [{"name": "a", "path": "a", "instruction_set": "theirs"}],
        "tasks": [AOPS],
    }
    with pytest.raises(UserError, match="instruction_set"):
        build_config(EvaluateConfig, tree, origin="here")


@pytest.mark.parametrize("key", ["lengths", "instructions", "models.0.instructions"])
@pytest.mark.parametrize("name", ["BrightAop", CORE, "FollowIR"])
def test_a_key_of_a_task_that_is_not_evaluated_is_refused(
    key: str, name: str, one: EvaluateConfig
) -> None:
    if key == "models.0.instructions":
        model = dataclasses.replace(one.models[0], instructions={name: "x"})
        wrong = dataclasses.replace(one, models=(model,))
    else:
        wrong = dataclasses.replace(one, **{key: {name: (8,) if key == "lengths" else "x"}})
    fix = f"write {AOPS}" if name == "BrightAop" else f"remove it, or add {name} to tasks"
    with pytest.raises(UserError) as error:
        list_elements(wrong)
    expected = f"{key}: '{name}' is not evaluated | allowed: {AOPS}, BRIGHT | fix: {fix}"
    assert str(error.value) == expected


def test_lengths_and_instructions_may_be_given_by_benchmark(one: EvaluateConfig) -> None:
    given = dataclasses.replace(one, lengths={"BRIGHT": (8, 16)}, instructions={"BRIGHT": "Find"})
    assert [element.max_length for element in list_elements(given)] == [8, 16]
    assert instruction_for(AOPS, one.models[0], given) == "Find"
    closer = dataclasses.replace(given, instructions={"BRIGHT": "Find", AOPS: ""})
    assert instruction_for(AOPS, one.models[0], closer) == ""


def test_the_command_lists_benchmarks_with_their_tasks():
    lines = CliRunner().invoke(app, ["evaluate", "tasks"]).output.splitlines()
    start = lines.index("LongEmbed")
    assert tuple(line.strip() for line in lines[start + 1 : start + 7]) == BENCHMARKS["LongEmbed"]


def test_our_benchmarks_are_mtebs():
    def names(benchmark: str) -> set[str]:
        return {task.metadata.name for task in mteb.get_benchmark(benchmark).tasks}

    assert set(BENCHMARKS["FollowIR"]) == names("FollowIR")
    assert set(BENCHMARKS["LongEmbed"]) == names("LongEmbed")
    assert {*BENCHMARKS["BRIGHT"], *BENCHMARKS["BRIGHT-long"]} == names("BRIGHT(v1.1)")
    assert set(INSTRUCTIONS) == names("BRIGHT(v1.1)")
    assert set(BENCHMARKS["BRIGHT-v1"]) == names("BRIGHT")
    assert set(BENCHMARKS["BRIGHT-v1-long"]) == names("BRIGHT (long)")


def test_a_benchmark_expands_to_its_tasks_once():
    assert expand(("Core17InstructionRetrieval", "FollowIR", "NFCorpus")) == (
        "Core17InstructionRetrieval",
        "Robust04InstructionRetrieval",
        "News21InstructionRetrieval",
        "NFCorpus",
    )
    assert benchmark_of("BrightPonyLongRetrieval") == "BRIGHT-long"
    assert benchmark_of("NFCorpus") == "other"


def test_an_index_outside_the_array_is_the_users_error(config):
    assert num_elements(config) == 12
    with pytest.raises(UserError, match="0 to 11"):
        run_element(config, 12)


BUILT_IN = "BrightBiologyRetrieval"


def rows_of(snapshots: Path, part: str) -> list[dict]:
    lines = (snapshots / "mteb/BRIGHT" / part / "biology.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_beir(folder: Path, corpus: list[dict], queries: list[dict], qrels: list[dict]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row.values())) for row in qrels)]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder: Path, corpus: list[dict], queries: list[dict], qrels: list[dict]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels/test", qrels)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def write_task(folder: Path, snapshots: Path, write: Callable[..., Path] = write_beir) -> Path:
    """The data of the built-in task, with a title, a query and a document that must not count."""
    examples = rows_of(snapshots, "examples")
    corpus = [
        {"_id": row["id"], "title": row["content"][:9].strip(), "text": row["content"][9:].strip()}
        for row in rows_of(snapshots, "documents")
    ]
    queries = [{"_id": row["id"], "text": row["query"]} for row in examples]
    qrels = [
        {"query-id": row["id"], "corpus-id": gold, "score": 1}
        for row in examples
        for gold in row["gold_ids"]
    ]
    return write(folder, corpus, [*queries, {"_id": "unasked", "text": "Why?"}], qrels)


@pytest.fixture
def both(config: EvaluateConfig, snapshots: Path, tmp_path: Path) -> EvaluateConfig:
    """One weak model on the built-in task and on the same data as an own task."""
    own = OwnTask(name="mine", path=write_task(tmp_path / "mine", snapshots))
    return dataclasses.replace(
        config,
        models=config.models[:1],
        tasks=(BUILT_IN, own),
        instructions={BUILT_IN: "Find it", "mine": "Find it"},
    )


def test_an_own_task_scores_like_mtebs_on_the_same_data_and_stands_beside_it_in_the_report(
    both: EvaluateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    built_in, own = run_all(both, load=load_letters)
    assert "mine: queries without judgements, left out: 1" in capsys.readouterr().out
    assert own["metric"] == "ndcg_at_10"
    assert 0 < own["score"] < 1
    for key in ("metric", "score", "chance", "other_scores", "instruction"):
        assert own[key] == pytest.approx(built_in[key]), key
    assert list(own["per_query"].values()) == [*built_in["per_query"].values()]
    report = json.loads((write_report(both) / "report.json").read_text())
    assert [task["name"] for task in report["tasks"]] == [BUILT_IN, "mine"]
    assert report["tasks"][1]["benchmark"] == "other"
    assert report["tasks"][1]["published"] == {}


def test_an_evaluation_without_slurm_shows_all_of_its_elements_from_the_first_one_on(
    both: EvaluateConfig,
) -> None:
    run_element(both, 0, load=load_letters)
    first = describe_evaluation(both.output_dir)
    assert (first.fact("elements"), first.state) == ("1 scored, 1 waiting", "not finished")
    run_all(both, load=load_letters)
    assert describe_evaluation(both.output_dir).state == "finished"


def test_stored_vectors_and_another_container_give_an_own_task_the_same_score(
    both: EvaluateConfig, snapshots: Path, tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "parquet", snapshots, write_parquet)
    own = OwnTask(name="mine", path=folder)
    prefetch(dataclasses.replace(both, tasks=(own,), instructions={}))  # it is only proved complete
    stored = dataclasses.replace(both, tasks=(BUILT_IN, own))
    plan(stored)
    embed(stored, 0, 1, load=load_letters, num_processes=1)
    (built_in, found) = score_all(stored)
    assert list(found["per_query"].values()) == list(built_in["per_query"].values())


def test_a_changed_folder_is_noticed_and_a_moved_one_is_no_change(
    both: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = dataclasses.replace(both, tasks=both.tasks[1:], instructions={})
    first = run_element(alone, 0, load=load_letters)
    (tmp_path / "mine").rename(tmp_path / "moved")
    moved = dataclasses.replace(alone, tasks=(OwnTask(name="mine", path=tmp_path / "moved"),))
    assert run_element(moved, 0, load=load_letters) == first
    corpus = tmp_path / "moved/corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("history", "zzzzzzz"))
    capsys.readouterr()
    run_element(moved, 0, load=load_letters)
    assert "scored again, changed since: data\n" in capsys.readouterr().out


FAULTS = {
    "null text": (
        lambda rows: rows["corpus"].append({"_id": "x", "text": None}),
        r"corpus.jsonl:49: no text",
    ),
    "two texts": (
        lambda rows: rows["corpus"].append({**rows["corpus"][0], "text": "other"}),
        r"corpus.jsonl:\d+: an earlier document has the id",
    ),
    "two queries": (
        lambda rows: rows["queries"].append({**rows["queries"][0], "text": "other"}),
        r"queries.jsonl:\d+: an earlier query has the id",
    ),
    "no query": (lambda rows: rows["queries"].clear(), "no query of .* has judgements"),
    "a query without text": (
        lambda rows: rows["queries"][0].pop("text"),
        r"queries.jsonl:1: no text",
    ),
    "half a surrogate pair in a document": (
        lambda rows: rows["corpus"][3].update(text="cut \ud83d"),
        r"corpus.jsonl:4: a text with half a surrogate pair",
    ),
    "half a surrogate pair in a query": (
        lambda rows: rows["queries"][0].update(text="cut \ud83d"),
        r"queries.jsonl:1: a text with half a surrogate pair",
    ),
    "a part of a grade": (
        lambda rows: rows["qrels"][0].update(score=0.5),
        "score 0.5 .*allowed: a whole number",
    ),
    "two grades": (
        lambda rows: rows["qrels"].append({**rows["qrels"][0], "score": 2}),
        r"qrels/test.tsv:\d+: query .* have another score before .*one score per pair",
    ),
    "no relevant document": (
        lambda rows: [judged.update(score=0) for judged in rows["qrels"]],
        "mine default/test: no query has a relevant document",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_data_of_an_own_task_are_one_line_before_the_model_is_loaded(
    fault: str, both: EvaluateConfig, tmp_path: Path, snapshots: Path
) -> None:
    change, message = FAULTS[fault]
    rows: dict[str, list[dict]] = {}
    write_task(
        tmp_path / "unused",
        snapshots,
        lambda folder, *parts: rows.update(zip(("corpus", "queries", "qrels"), parts, strict=True)),
    )
    change(rows)
    own = OwnTask(name="mine", path=write_beir(tmp_path / "wrong", **rows))
    with pytest.raises(UserError, match=message):
        plan(dataclasses.replace(both, tasks=(own,), instructions={}))


def test_bad_rows_of_all_files_of_an_own_task_are_told_at_once(
    snapshots: Path, tmp_path: Path
) -> None:
    rows: dict[str, list[dict]] = {}
    write_task(
        tmp_path / "unused",
        snapshots,
        lambda folder, *parts: rows.update(zip(("corpus", "queries", "qrels"), parts, strict=True)),
    )
    for fault in ("null text", "two texts", "two queries", "a query without text"):
        FAULTS[fault][0](rows)
    rows["queries"].append({"text": "no id"})
    rows["qrels"][0].update(score=float("nan"))
    path = write_beir(tmp_path / "wrong", **rows)
    with (path / "corpus.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError) as error:
        read_split(OwnTask(name="mine", path=path))
    found = error.value.found
    assert found.startswith("tasks.mine: 7 rows cannot be used: ")
    assert found.endswith("; and 2 more")
    for reason in ("no text", "an earlier document", "not JSON", "an earlier query", "no id"):
        assert reason in found


def test_own_tasks_are_written_in_the_config_beside_names(tmp_path: Path) -> None:
    tree = {
        "output_dir": "out",
        "models": [{"name": "a", "path": "a"}],
        "tasks": ["BRIGHT", {"name": "mine", "path": str(tmp_path), "split": "dev"}],
        "lengths": {"BRIGHT": [16], "mine": [8, 16]},
    }
    config = build_config(EvaluateConfig, tree, origin="here")
    last = list_elements(config)[-1]
    assert (last.task, last.max_length, last.own) == ("mine", 16, config.tasks[1])
    assert build_config(EvaluateConfig, json.loads(json.dumps(tree)), origin="here") == config
    assert "split: dev" in dump_config(config)
    for task, message in (
        (
            {"name": "mine", "path": "x", "spilt": "dev"},
            "here: tasks: unknown key 'spilt' .*name, path, split",
        ),
        ({"name": "mine"}, "tasks: key 'path' is missing"),
        ({"name": "../x", "path": "x"}, "letters, digits"),
    ):
        with pytest.raises(UserError, match=message):
            build_config(EvaluateConfig, {**tree, "tasks": [task]}, origin="here")
    for name in ("BRIGHT", BUILT_IN):
        own = dataclasses.replace(config.tasks[1], name=name)  # type: ignore[type-var]
        with pytest.raises(UserError, match="is a name of mteb"):
            list_elements(dataclasses.replace(config, tasks=(own,), lengths={}))


def as_mteb_loads_it(folder: Path, split: str) -> mteb.AbsTask:
    """A task whose data mteb's own loader reads from a folder."""

    class Reference(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="Reference",
            description="The reference.",
            dataset={"path": str(folder), "revision": "local"},
            type="Retrieval",
            category="t2t",
            eval_splits=[split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

    return Reference()


@pytest.mark.parametrize(
    ("repository", "split"),
    [
        # Candidates and instructions of single queries; documents of other splits.
        (f"mteb/{CORE}", "test"),
        ("mteb/LEMBPasskeyRetrieval", "test_256"),
    ],
)
def test_a_folder_of_the_hub_scores_as_mteb_loads_it(
    repository: str, split: str, config: EvaluateConfig, snapshots: Path
) -> None:
    folder = snapshots / repository
    own = OwnTask(name="mine", path=folder, split=split)
    alone = dataclasses.replace(
        config, models=config.models[:1], tasks=(own,), instructions={"mine": "Find it"}
    )
    ours = run_element(alone, 0, load=load_letters)
    reference = as_mteb_loads_it(folder, split)
    reference.load_data()
    found, wanted = read_split(own), reference.dataset["default"][split]
    assert set(found["corpus"]["id"]) == set(wanted["corpus"]["id"])
    assert found["top_ranked"] == wanted["top_ranked"]
    theirs = mteb.evaluate(
        MtebEncoder(load_letters(alone, list_elements(alone)[0]), "Find it"),
        reference,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )[0]
    assert ours["score"] == pytest.approx(theirs.get_score(), abs=1e-6)
    plan(alone)
    embed(alone, 0, 1, load=load_letters, num_processes=1)
    list_elements(alone)[0].result_path.unlink()
    assert score_all(alone)[0]["score"] == pytest.approx(ours["score"], abs=1e-3)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("top_ranked", lambda row: row.update({"corpus-ids": ["x"]}), r"corpus-ids: \['x'\] .*ids"),
        ("top_ranked", lambda row: row.update({"corpus-ids": None}), "corpus-ids: None .*a list"),
        ("instruction", lambda row: row.update(instruction=3), "instruction: 3 .*allowed: a text"),
        ("instruction", lambda row: row.update(instruction="\ud83d"), "half a surrogate pair"),
        ("instruction", lambda row: row.pop("query-id"), "no query-id .*found: instruction"),
        ("instruction", lambda row: row.update({"query-id": "1-og"}), "another instruction for"),
    ],
)
def test_a_wrong_row_of_an_optional_part_is_named(
    part: str, change: Callable[[dict], object], message: str, snapshots: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(snapshots / "mteb" / CORE, tmp_path / "mine"))
    path = folder / part / f"{part}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[0])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"{part}.jsonl:\d+: .*{message}"):
        read_split(OwnTask(name="mine", path=folder))
