"""Plans of arrays: hand arithmetic on three documents, published sizes, and wrong input."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_calibration import machine as calibrated
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import (
    CorpusConfig,
    EvaluateConfig,
    EvaluatedModel,
    MineConfig,
    OwnTask,
    RetrieverConfig,
    TeacherConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from pipeline.data.manifest import read_manifest
from pipeline.planning.arrays import (
    ArrayPlan,
    Work,
    describe_array,
    plan_evaluation,
    plan_mining,
)
from pipeline.planning.calibration import Machine, choose_machine
from pipeline.planning.memory import Target
from pipeline.planning.planned_model import PlannedModel
from pipeline.planning.text_sizes import Texts, task_sizes
from tests.planning.plan_table import MODELS
from tests.support import output_of_code

ROOT = Path(__file__).resolve().parents[2]
# 160 weights a layer: 20 + 10 + 10 + 16 of attention, 3 x 32 of the MLP, 2 x 4 of norms.
TINY = {
    "model_type": "qwen2",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}
H100 = choose_machine("h100", None, ranks_per_host=1)
SPEED = 989e12 * 0.5


def flops(tokens: int, squares: int) -> int:
    """2 a weight and token, 4 x 4 a pair of tokens and layer."""
    return 2 * 3 * 160 * tokens + 4 * 4 * 3 * squares


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """Two documents of 70 bytes, one of them twice, and two queries of 35 bytes."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(TINY))
    task = tmp_path / "task"
    (task / "qrels").mkdir(parents=True)
    texts = ["a" * 70, "b" * 70, "b" * 70]
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    (task / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": f"q{i}", "text": letter * 35} for i, letter in enumerate("xy")]
    (task / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "qrels/test.jsonl").write_text('{"query-id": "q0", "corpus-id": "d0", "score": 1}\n')
    return EvaluateConfig(
        output_dir=tmp_path / "out",
        models=tuple(EvaluatedModel(name=n, path=tmp_path / n) for n in ("one", "two")),
        tasks=(OwnTask(name="mine", path=task),),
        instructions={"mine": "Find it"},
        lengths={"mine": (16, 64)},
    )


def test_the_array_of_an_evaluation_takes_the_flops_of_its_elements(config: EvaluateConfig) -> None:
    """70 bytes are 20 tokens and a special one; 35 bytes 10, and 2 of the instruction."""
    plan = plan_evaluation(config, H100)
    tokens = {16: 3 * 16 + 2 * 13, 64: 3 * 21 + 2 * 13}
    squares = {16: 3 * 16**2 + 2 * 13**2, 64: 3 * 21**2 + 2 * 13**2}
    seconds = {length: flops(tokens[length], squares[length]) / SPEED for length in (16, 64)}

    assert [(work.model, work.length, work.tokens) for work in plan.work] == [
        (model, length, tokens[length]) for model in ("one", "two") for length in (16, 64)
    ]
    assert [work.seconds for work in plan.work] == pytest.approx(2 * list(seconds.values()))
    assert plan.seconds == pytest.approx(2 * sum(seconds.values()))
    # Queries fit 16 tokens, so that only the documents are embedded again at 64.
    once = flops(2 * 16 + 2 * 13 + 2 * 21, 2 * 16**2 + 2 * 13**2 + 2 * 21**2) / SPEED
    assert plan.shared == pytest.approx(2 * once)
    # In order: 16 and 64 start, 16 follows the first and 64 the second.
    assert plan.elapsed(2) == pytest.approx(2 * seconds[64])
    assert plan.elapsed(3) == pytest.approx(seconds[16] + seconds[64])
    assert plan.elapsed(4) == pytest.approx(seconds[64])
    assert plan.elapsed(1) == pytest.approx(plan.seconds)


def test_the_text_of_a_plan_has_its_sums_and_their_price() -> None:
    work = [
        Work(name=name, model="m", texts="-", tokens=10.0, seconds=hours * 3600.0, origin="here")
        for name, hours in (("a", 3), ("b", 1), ("c", 2))
    ]
    array = ArrayPlan(title="three", work=tuple(work), whole=True, shared=4.5 * 3600)
    text = describe_array(array, H100, gpus=2, price=2.5)
    assert "6 GPU-hours, 15.00 at 2.5 an hour; on 2 GPUs at a time 3 h" in text
    assert "the longest element 3 h (a of m)" in text
    assert "at most 4.5 GPU-hours, 11.25; on 2 GPUs 2.25 h" in text
    evenly = dataclasses.replace(array, whole=False, shared=None)
    assert evenly.elapsed(4) == pytest.approx(1.5 * 3600)


def test_published_sizes_have_the_texts_and_characters_of_the_statistics() -> None:
    """BRIGHT's biology: 57,359 documents of 18,882,181 characters, 103 queries of 53,873."""
    sizes = task_sizes("BrightBiologyRetrieval", None, None)
    assert sizes.documents.texts == pytest.approx(57_359)
    assert sizes.documents.tokens == pytest.approx(18_882_181 / 3.5 + 57_359, rel=1e-6)
    assert sizes.documents.lengths.max() <= 31_130 / 3.5 + 1
    assert sizes.queries.texts == pytest.approx(103)
    assert sizes.distinct == pytest.approx(49_434 / 57_359)
    # Eight splits of 50 queries and 100 documents.
    needle = task_sizes("LEMBNeedleRetrieval", None, None)
    assert (round(needle.documents.texts), round(needle.queries.texts)) == (800, 400)
    cut = sizes.documents.cut(256)
    assert cut.tokens < sizes.documents.tokens and cut.lengths.max() <= 256


def test_texts_around_a_mean_keep_it_below_their_longest() -> None:
    texts = Texts.around(1000, 300, 400)
    assert texts.tokens == pytest.approx(300_000) and texts.lengths.max() <= 400
    assert Texts.around(10, 50, 50).squares == pytest.approx(10 * 50**2)
    assert Texts.counted([3, 5, 3]).squares == 9 + 9 + 25


def test_a_calibrated_machine_takes_the_seconds_of_its_layers(config: EvaluateConfig) -> None:
    """All products at 1 PFLOP/s, and attention at half of it (see `test_calibration`)."""
    target = Target.gpu("h100", ranks_per_host=1)
    machine = Machine(target=target, name="h100", speed=calibrated())
    tree = {**TINY, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    tree |= {"num_key_value_heads": 16, "head_dim": 64}
    (config.models[0].path / "config.json").write_text(json.dumps(tree))
    model = PlannedModel.read(
        str(config.models[0].path), name="one", key="models.one", precision="auto", machine=machine
    )
    texts = Texts(lengths=np.array([512.0]), counts=np.array([64.0]))
    products = 2 * 3 * (4 * 1024**2 + 3 * 1024 * 4096) * 64 * 512
    attention = 4 * 1024 * 3 * 64 * 512**2
    assert model.seconds(texts) == pytest.approx((products + 2 * attention) / 1e15, rel=1e-3)


def mining(recipe: Path, folder: Path) -> MineConfig:
    """A retriever and a cross-encoder of the tiny sizes on the shards of a recipe."""
    train = load_config(TrainConfig, recipe)
    (folder / "config.json").write_text(json.dumps(TINY))
    return MineConfig(
        data=train.data.path,
        output=folder / "mined",
        retrievers=(
            RetrieverConfig(name="bm25", path="bm25"),
            RetrieverConfig(name="dense", path=str(folder), max_length=4),
        ),
        negatives=2,
        candidates=5,
        teacher=TeacherConfig(path=str(folder)),
    )


def test_a_mining_embeds_every_text_and_its_teacher_reads_every_candidate(
    recipe: Path, tmp_path: Path
) -> None:
    config = mining(recipe, tmp_path)
    manifest = read_manifest(config.data)
    queries, documents = manifest.query_lengths, manifest.document_lengths
    embed, search, score = plan_mining(config, H100).work

    assert embed.texts == f"{documents.texts} documents, {queries.texts} queries"
    assert embed.tokens <= 4 * (documents.texts + queries.texts)
    assert search.seconds == pytest.approx(2 * 4 * queries.texts * documents.texts / (67e12 * 0.5))
    measured = Machine(target=H100.target, name="h100", speed=calibrated())
    _, search, _ = plan_mining(config, measured).work
    pairs = queries.texts * documents.texts
    assert search.seconds == pytest.approx(queries.texts * 2e-6 + 2 * 4 * pairs * 1e-13)
    # A positive and five candidates for each of 16 queries.
    pairs = 16 * (1 + 5)
    assert score.texts == f"at most {pairs} pairs"
    mean = documents.tokens / documents.texts + queries.tokens / queries.texts
    assert score.tokens == pytest.approx(pairs * mean)
    endpoint = TeacherConfig(kind="endpoint", url="http://host/rerank", model="big")
    *_, asked = plan_mining(dataclasses.replace(config, teacher=endpoint), H100).work
    assert (asked.model, asked.texts, asked.seconds) == ("big", score.texts, None)
    both = TeacherConfig(path=str(tmp_path), kind="bi_encoder", max_length=4)
    *_, embedded = plan_mining(dataclasses.replace(config, teacher=both), H100).work
    assert (embedded.name, embedded.tokens) == ("embed", embed.tokens)
    words = dataclasses.replace(config, retrievers=config.retrievers[:1], teacher=None)
    assert describe_array(plan_mining(words, H100), H100, gpus=1).endswith("on GPUs: none")
    whole = dataclasses.replace(
        config, retrievers=(dataclasses.replace(config.retrievers[1], max_length=None),)
    )
    assert plan_mining(whole, H100).work[0].tokens == queries.tokens + documents.tokens


def test_a_corpus_adds_as_many_documents_as_its_bytes_hold(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mining(recipe, tmp_path)
    found = read_manifest(config.data).document_lengths
    mean = found.tokens / found.texts
    lines, folder = tmp_path / "more.txt", tmp_path / "beir"
    lines.write_text("x" * 35_000)
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("x" * 7_000)
    corpora = (
        CorpusConfig(name="lines", path=str(lines)),
        CorpusConfig(name="beir", format="mteb", path=str(folder)),
    )
    work = plan_mining(dataclasses.replace(config, corpora=corpora), H100).work
    # 3.5 bytes are a token; a document is as long as one of the shards.
    pairs = 16 * (found.texts + 12_000 / mean)
    assert work[1].texts == f"{pairs:,.0f} scores of pairs"
    assert "corpora by bytes" in work[0].origin
    few = (dataclasses.replace(corpora[0], max_rows=5),)
    work = plan_mining(dataclasses.replace(config, corpora=few), H100).work
    assert work[1].texts == f"{16 * (found.texts + 5)} scores of pairs"
    assert "compressed" not in capsys.readouterr().err
    packed = tmp_path / "more.txt.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    few = (CorpusConfig(name="packed", path=str(packed)),)
    plan_mining(dataclasses.replace(config, corpora=few), H100)
    assert "corpora.packed: compressed" in capsys.readouterr().err


def test_arrays_are_planned_without_torch(
    config: EvaluateConfig, recipe: Path, tmp_path: Path
) -> None:
    evaluate, mine = tmp_path / "evaluate.yaml", tmp_path / "mine.yaml"
    evaluate.write_text(dump_config(config))
    mine.write_text(dump_config(mining(recipe, tmp_path)))
    model, lines = str(tmp_path / "one"), tmp_path / "lines.jsonl"
    lines.write_text('{"text": "' + "a" * 34 + '"}\n' + '{"text": "b", "title": "c"}\n')
    calls = [
        ["plan", "evaluate", str(evaluate), "--gpus", "2"],
        ["plan", "mine", str(mine)],
        ["plan", "encode", model, "--input", str(lines)],
    ]
    code = (
        "import sys; from pipeline.cli import app\n"
        f"for words in {calls!r}: app(words, standalone_mode=False)\n"
        "sys.exit(int(bool({'torch', 'mteb'} & set(sys.modules))))"
    )
    printed = output_of_code(code)
    assert "2 models x 2 tasks and lengths = 4 elements" in printed
    assert "at most 96 pairs" in printed
    # 34 bytes are 10 tokens, `c b` is one, and each has a special token.
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("encode")]
    assert (row[3], row[5]) == ("2", "13")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "{config}", "--documents", "5"], "only some of the sizes .*--queries"),
        (["evaluate", "{config}", "--gpu", "24"], "--gpu 24: its speed is not known"),
        (["evaluate", "{config}", "tasks=[NoSuchTask]", "lengths={{}}", "instructions={{}}"],
         "NoSuchTask: no statistics of this task .*--count"),
        (["evaluate", "{config}", "models=[{{name: a, path: /nowhere}}]"],
         "models.a: /nowhere: no config.json .*--model FOLDER"),
        (["evaluate", "{config}", "--model", "{other}"], "--model: .*model_type 'own' .*qwen2"),
        (["evaluate", "{config}", "--model", "{large}"],
         "129.5 GiB of weights in bfloat16 .*71.2 GiB, 0.9 of h100"),
        (["evaluate", "{config}", "--documents", "5", "--document-tokens", "5", "--queries", "5",
          "--query-tokens", "5"], "the sizes of all tasks are known"),
        (["evaluate", "{config}", "--count", "--model", "{other}"], "--count with --model"),
        (["encode", "{folder}/one"], "what to encode .*--input, or --rows and --tokens"),
        (["encode", "{folder}/one", "--rows", "5"], "what to encode"),
        (["encode", "{folder}/one", "--input", "{folder}/none.jsonl"], "none.jsonl"),
        (["encode", "{folder}/one", "--input", "{folder}/task/queries.jsonl", "--field", "body"],
         "body: no text .*fields are _id, text"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(
    config: EvaluateConfig, tmp_path: Path, words: list[str], message: str
) -> None:
    path, other = tmp_path / "evaluate.yaml", tmp_path / "other"
    path.write_text(dump_config(config))
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**TINY, "model_type": "own"}))
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(MODELS["Llama-3.1-70B"]))
    named: dict[str, Any] = {"config": path, "folder": tmp_path, "other": other, "large": large}
    done = CliRunner().invoke(app, ["plan", *(word.format(**named) for word in words)])
    assert done.exception is not None and "\n" not in str(done.exception)
    with pytest.raises(type(done.exception), match=message):
        raise done.exception


def test_described_sizes_stand_in_for_data_that_does_not_exist(
    config: EvaluateConfig, recipe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(dump_config(dataclasses.replace(
        config, tasks=("NoSuchTask",), lengths={}, instructions={"NoSuchTask": ""}
    )))  # fmt: skip
    words = ["--documents", "1000", "--document-tokens", "300", "--queries", "10"]
    done = CliRunner().invoke(app, ["plan", "evaluate", str(path), *words, "--query-tokens", "20"])
    assert done.exit_code == 0, done.output
    assert "300,200" in done.output and "described" in done.output

    mine = dataclasses.replace(mining(recipe, tmp_path), data=tmp_path / "later", teacher=None)
    path.write_text(dump_config(mine))
    refused = CliRunner().invoke(app, ["plan", "mine", str(path)])
    assert "is not prepared yet | fix: describe the shards: --rows" in str(refused.exception)
    words = ["--rows", "1000", "--query-tokens", "20", "--document-tokens", "300"]
    done = CliRunner().invoke(app, ["plan", "mine", str(path), *words, "retrievers=[{name: d, "
                                    f"path: {tmp_path}}}]"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "1,000 documents, 1,000 queries" in done.output and "320,000" in done.output
