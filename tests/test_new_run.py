"""A first run's configs: written from four answers, accepted by the commands that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import EvaluateConfig, OwnTask, PrepareConfig, TrainConfig, load_config
from pipeline.data.manifest import read_manifest
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.new_run import Answers, find_columns, write_run
from pipeline.tokenizer import load_tokenizer
from tests.tiny_models import tiny_starter

ROWS = [
    {"question": f"where is place {n}", "answer": f"place {n} is here", "hard_negatives": ["no"]}
    for n in range(70)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "faq.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return tiny_starter(tmp_path_factory.mktemp("model") / "model", data)


def answers(model: Path, data: Path, /, **changes: object) -> Answers:
    given = {"model": str(model), "data": str(data), "num_gpus": 0, "goal": "search", **changes}
    return Answers(**given)  # type: ignore[arg-type]


def test_prepare_takes_the_config_and_keeps_every_row(
    tmp_path: Path, model: Path, data: Path
) -> None:
    prepare_path, train_path = write_run(tmp_path / "my run", answers(model, data))
    config = load_config(PrepareConfig, prepare_path)
    assert config.sources[0].columns == {
        **{"query": "question", "positives": "answer", "negatives": "hard_negatives"}
    }
    prepare(config, num_workers=1)
    assert read_manifest(config.output_dir).num_examples == len(ROWS)

    train = load_config(TrainConfig, train_path)
    assert train.data.path == config.output_dir
    assert train.num_steps * train.data.global_batch_size >= 3 * len(ROWS)
    assert (train.model.dtype, train.model.lora) == ("float32", None)


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        (["query", "positives"], {"query": "query", "positives": "positives"}),
        (["anchor", "positive"], {"query": "anchor", "positives": "positive"}),
        (["sentence1", "sentence2"], {"query": "sentence1", "positives": "sentence2"}),
        (["Question", "Answer"], {"query": "Question", "positives": "Answer"}),
        (["title", "text"], {"query": "title", "positives": "text"}),
        (
            ["id", "anchor", "positive", "negative_1", "negative_2"],
            {"query": "anchor", "positives": "positive", "negatives": "negative_*"},
        ),
        (
            ["query", "pos", "neg", "instruction"],
            {"query": "query", "positives": "pos", "negatives": "neg"}
            | {"instruction": "instruction"},
        ),
    ],
)
def test_fields_are_recognised_by_common_names(fields: list[str], columns: dict[str, str]) -> None:
    assert find_columns(fields, {}) == columns


def test_the_users_choice_of_a_field_wins() -> None:
    fields = ["query", "question", "answer"]
    assert find_columns(fields, {"query": "question"})["query"] == "question"
    with pytest.raises(UserError, match="--query: no field 'frage'"):
        find_columns(fields, {"query": "frage"})


def test_fields_that_nobody_knows_are_asked_for() -> None:
    with pytest.raises(UserError, match="no field looks like a query") as error:
        find_columns(["frage", "antwort"], {})
    assert "frage, antwort" in error.value.allowed
    assert "--query FIELD" in error.value.fix


def test_a_table_is_read_like_json_lines(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    write_run(tmp_path / "run", answers(model, path))
    assert load_config(PrepareConfig, tmp_path / "run" / "data.yaml").sources[0].columns


def test_a_large_model_on_gpus_trains_an_adapter(tmp_path: Path, data: Path) -> None:
    large = {"hidden_size": 3584, "num_hidden_layers": 28, "vocab_size": 152064}
    (tmp_path / "config.json").write_text(
        json.dumps({**large, "intermediate_size": 18944, "max_position_embeddings": 4096})
    )
    paths = write_run(tmp_path / "run", answers(tmp_path, data, num_gpus=8, goal="long"))
    train = load_config(TrainConfig, paths[1])
    assert train.model.lora is not None
    assert train.model.dtype == "bfloat16"
    assert load_config(PrepareConfig, paths[0]).max_document_length == 4096


def test_instructions_keep_the_template(tmp_path: Path, model: Path, data: Path) -> None:
    paths = write_run(tmp_path / "run", answers(model, data, goal="instructions"))
    config = load_config(PrepareConfig, paths[0])
    assert "{instruction}" in config.template.query
    assert config.sources[0].instruction


@pytest.mark.parametrize("goal", ["search", "instructions"])
def test_the_rows_held_out_are_the_task_of_the_evaluation(
    tmp_path: Path, model: Path, goal: str
) -> None:
    path = tmp_path / "faq.jsonl"
    rows = [{"question": f"where is {n}", "answer": f"{n} is at place {n}"} for n in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_path, train_path, evaluate_path = write_run(
        tmp_path / "run", answers(model, path, goal=goal)
    )
    prepare(load_config(PrepareConfig, prepare_path), num_workers=1)
    evaluation = load_config(EvaluateConfig, evaluate_path)
    # The task and its instruction as `prepare` states them.
    written = yaml.safe_load((tmp_path / "run/shards/holdout/evaluate.yaml").read_text())
    (task,) = evaluation.tasks
    assert isinstance(task, OwnTask) and str(task.path) == written["tasks"][0]["path"]
    assert evaluation.instructions == written["instructions"]
    assert evaluation.max_length == written["max_length"]
    assert evaluation.models[1].path == load_config(TrainConfig, train_path).output_dir / "export"


def test_few_rows_are_all_trained_on_and_a_share_may_be_given(
    tmp_path: Path, model: Path, data: Path
) -> None:
    assert len(write_run(tmp_path / "few", answers(model, data))) == 2
    given = write_run(tmp_path / "given", answers(model, data, holdout=0.2))
    assert load_config(PrepareConfig, given[0]).holdout == 0.2


def test_nothing_is_overwritten(tmp_path: Path, model: Path, data: Path) -> None:
    write_run(tmp_path, answers(model, data))
    before = (tmp_path / "train.yaml").read_text()
    with pytest.raises(UserError, match=r"data\.yaml exists"):
        write_run(tmp_path, answers(model, data, goal="long"))
    assert (tmp_path / "train.yaml").read_text() == before


def test_wrong_answers_are_refused_before_anything_is_written(
    tmp_path: Path, model: Path, data: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for wrong, message in (
        ({"model": str(tmp_path / "none")}, "--model"),
        ({"model": str(data.parent)}, "no config.json"),
        ({"data": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({"data": str(empty)}, "no rows"),
    ):
        with pytest.raises(UserError, match=message):
            write_run(tmp_path / "run", answers(model, data, **wrong))
    assert not (tmp_path / "run").exists()


def test_an_adapter_on_gpus_is_trained_by_zero_2(tmp_path: Path, data: Path) -> None:
    large = {"hidden_size": 3584, "num_hidden_layers": 28, "vocab_size": 152064}
    (tmp_path / "config.json").write_text(json.dumps({**large, "intermediate_size": 18944}))
    words = ["init", str(tmp_path / "run"), "--data", str(data), "--model", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, "--gpus", "8", "--goal", "search"])
    train = tmp_path / "run" / "train.yaml"
    assert f"train {train} --ranks 8 --deepspeed ds_configs/zero2.json\n" in done.output


def test_the_command_asks_for_what_is_missing(tmp_path: Path, model: Path, data: Path) -> None:
    words = ["init", str(tmp_path / "run"), "--data", str(data), "--goal", "search"]
    done = CliRunner().invoke(app, words, input=f"{model}\n0\n")
    assert done.exit_code == 0, done.output
    assert f"diffembed prepare {tmp_path / 'run' / 'data.yaml'}" in done.output


def test_commands_end_by_saying_what_they_wrote_and_what_to_run_next(
    tmp_path: Path, model: Path, data: Path
) -> None:
    def last_lines(*words: str) -> list[str]:
        shown = CliRunner().invoke(app, list(words))
        assert shown.exit_code == 0, shown.output
        return shown.output.splitlines()[-2:]

    starter = tmp_path / "starter.yaml"
    made = tmp_path / "model"
    small = {"vocab_size": 300, "hidden_size": 32, "num_layers": 1, "intermediate_size": 32}
    starter.write_text(json.dumps({"output_dir": str(made), "corpus": [str(data)], **small}))
    written, following = last_lines("starter", str(starter))
    assert written == f"written: {made}"
    assert following.startswith("next: ")
    prepare_path, _ = write_run(tmp_path / "run", answers(model, data))
    shards = prepare(load_config(PrepareConfig, prepare_path), num_workers=1)
    assert last_lines("prepare", str(prepare_path))[-1] == (
        f"next: diffembed train CONFIG, with data.path: {shards}"
    )


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["numbers", "booleans", "table of text", "lists"])
def test_pairs_that_do_not_match_are_no_positives(tmp_path: Path, model: Path, kind: str) -> None:
    """Two of three pairs of a classification set do not match."""
    rows: list[dict[str, object]] = [
        {"sentence1": f"a{k}", "sentence2": f"b{k}", "label": int(k % 3 == 0)} for k in range(30)
    ]
    path = tmp_path / ("rows.csv" if kind == "table of text" else "rows.jsonl")
    if kind == "booleans":
        rows = [{**row, "label": bool(row["label"])} for row in rows]
    if kind == "lists":
        rows = [
            {"query": f"a{k}", "answers": [f"b{k}", f"c{k}", f"d{k}"], "labels": [0, 1, 0]}
            for k in range(10)
        ]
    if kind == "table of text":
        cells = (",".join(str(value) for value in row.values()) for row in rows)
        path.write_text("\n".join(["sentence1,sentence2,label", *cells]))
    else:
        lines(path, rows)
    prepare_path, train_path = write_run(tmp_path / "run", answers(model, path))
    config = load_config(PrepareConfig, prepare_path)
    dataset = Dataset.open(prepare(config, num_workers=1))
    assert dataset.num_examples == 10
    tokenizer = load_tokenizer(model)
    found = {
        tokenizer.decode(dataset.documents.views("tokens", row)[0]).strip()
        for row in dataset.examples.views("positives", np.arange(10))
    }
    wanted = range(10) if kind == "lists" else range(0, 30, 3)
    assert found == {f"{'c' if kind == 'lists' else 'b'}{k}" for k in wanted}
    train = load_config(TrainConfig, train_path)
    assert train.data.num_hard_negatives == (kind == "lists")
    assert "3 x 10 rows" in train_path.read_text()


@pytest.mark.parametrize(
    "label", [lambda k: k / 10, lambda k: k % 3, lambda k: "yes", lambda k: 1, lambda k: None]
)
def test_fields_that_no_column_reads_are_named(
    tmp_path: Path,
    model: Path,
    label: Callable[[int], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Degrees of similarity, classes and topics: what they mean for a pair, only the user knows."""
    rows = [
        {"id": k, "sentence1": f"a{k}", "sentence2": f"b{k}", "label": label(k)} for k in range(20)
    ]
    path = lines(tmp_path / "rows.jsonl", rows)
    prepare_path, _ = write_run(tmp_path / "run", answers(model, path))
    assert "init: fields that are not read: id, label\n" in capsys.readouterr().err
    assert "# Fields that are not read: id, label\n" in prepare_path.read_text()
    assert "labels" not in load_config(PrepareConfig, prepare_path).sources[0].columns


def test_a_field_that_the_first_row_lacks_is_read(tmp_path: Path, model: Path) -> None:
    rows = [
        {"question": f"q{k}", "answer": f"a{k}", **({"hard_negatives": [f"n{k}"]} if k > 9 else {})}
        for k in range(40)
    ]
    path = lines(tmp_path / "rows.jsonl", rows)
    prepare_path, train_path = write_run(tmp_path / "run", answers(model, path))
    dataset = Dataset.open(prepare(load_config(PrepareConfig, prepare_path), num_workers=1))
    assert dataset.examples.lengths("negatives", np.arange(40)).sum() == 30
    assert load_config(TrainConfig, train_path).data.num_hard_negatives == 1


def test_a_path_into_a_field_may_be_given(tmp_path: Path, model: Path) -> None:
    rows = [{"id": k, "data": {"question": f"q{k}", "answer": f"a{k}"}} for k in range(5)]
    path = lines(tmp_path / "rows.jsonl", rows)
    columns = {"query": "data.question", "positives": "data.answer"}
    prepare_path, _ = write_run(tmp_path / "run", answers(model, path, columns=columns))
    assert "# Fields that are not read: id\n" in prepare_path.read_text()
    folder = prepare(load_config(PrepareConfig, prepare_path), num_workers=1)
    assert read_manifest(folder).num_examples == 5


def test_columns_joined_by_a_glob_keep_their_letters(tmp_path: Path, model: Path) -> None:
    rows = [{"Anchor": "q", "Positive": f"p{k}", "Negative_1": f"n{k}"} for k in range(5)]
    path = lines(tmp_path / "rows.jsonl", rows)
    prepare_path, _ = write_run(tmp_path / "run", answers(model, path))
    dataset = Dataset.open(prepare(load_config(PrepareConfig, prepare_path), num_workers=1))
    assert dataset.examples.lengths("negatives", np.arange(5)).sum() == 5


def test_a_wrong_field_is_named_with_its_option() -> None:
    for column, option in (("positives", "--positive"), ("negatives", "--negative")):
        with pytest.raises(UserError, match=f"{option}: no field 'x'"):
            find_columns(["query", "text"], {column: "x"})
