"""Small inputs of every kind that the package reads, the same bytes on every call."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pyarrow.parquet as pq

WORDS = ("river", "stone", "cloud", "amber", "forest", "signal", "copper", "meadow", "reed", "bay")
Rows = list[dict[str, Any]]


def rows(count: int, first: int = 0) -> Rows:
    """Queries, each with a positive and a hard negative."""
    found = []
    for i in range(first, first + count):
        a, b = WORDS[i % 10], WORDS[(3 * i + 1) % 10]
        found.append(
            {
                "query": f"where is the {a} {b} number {i}",
                "positive": f"the {a} {b} lies at place {i} " * (1 + i % 4),
                "negative": f"the {b} {a} of number {i} lies elsewhere",
            }
        )
    return found


def write_jsonl(path: Path, records: Sequence[Any]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write_tables(data: Path) -> None:
    """Write rows in every kind of file that holds a table or one record per line."""
    for number, kind in enumerate(("jsonl", "ndjson", "json")):
        write_jsonl(data / f"rows.{kind}", rows(6, 10 * number))
    for number, (kind, mark) in enumerate((("csv", ";"), ("tsv", "\t"))):
        lines = [list(rows(1)[0]), *(list(row.values()) for row in rows(6, 30 + 10 * number))]
        (data / f"rows.{kind}").write_text("".join(mark.join(line) + "\n" for line in lines))
    pq.write_table(pa.Table.from_pylist(rows(6, 50)), data / "rows.parquet", row_group_size=3)
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows(6, 60)), str(data / "rows.feather"))
    table = pa.Table.from_pylist(rows(6, 70))
    with pa.ipc.new_file(str(data / "rows.arrow"), table.schema) as file:
        file.write_table(table)
    text = (data / "rows.csv").read_bytes()
    (data / "packed").mkdir()
    (data / "packed/rows.csv.gz").write_bytes(gzip.compress(text, mtime=0))
    (data / "packed/rows.csv.bz2").write_bytes(bz2.compress(text.replace(b"place", b"spot")))
    (data / "packed/rows.csv.xz").write_bytes(lzma.compress(text.replace(b"place", b"point")))
    zstd = pa.Codec("zstd").compress(text.replace(b"place", b"bend"), asbytes=True)
    (data / "packed/rows.csv.zst").write_bytes(zstd)
    for split, first in (("train", 80), ("test", 90)):
        write_jsonl(data / f"folder/{split}.jsonl", rows(6, first))
    (data / "texts.txt").write_text("\n".join(row["positive"] for row in rows(40, 100)) + "\n")
    write_jsonl(data / "texts.jsonl", [{"id": f"t{i}", "text": w} for i, w in enumerate(WORDS)])


def _write_layouts(data: Path) -> None:
    """Write rows in every published layout and with every kind of column."""
    triplets = [
        {"anchor": r["query"], "positive": r["positive"], "negative_1": r["negative"],
         "negative_2": None} for r in rows(6, 150)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(triplets), data / "triplets.parquet")
    write_jsonl(
        data / "labels.jsonl",
        [{"q": {"text": r["query"]}, "docs": [r["positive"], r["negative"]], "labels": [1, 0],
          "of": WORDS[i % 3], "prompt": f"Find {i % 2}", "lang": "de" if i % 2 else "en"}
         for i, r in enumerate(rows(12, 160))],
    )  # fmt: skip
    write_jsonl(
        data / "chats.jsonl",
        [{"messages": [{"role": "user", "content": r["query"]}],
          "answers": [[{"role": "user", "content": r["positive"]}]]} for r in rows(6, 180)],
    )  # fmt: skip
    write_jsonl(
        data / "scored.jsonl",
        [{**r, "scores": [0.9, 0.1 + i / 50]} for i, r in enumerate(rows(32, 500))],
    )
    near = rows(8, 600)
    for i, row in enumerate(near):
        words = random.Random(i // 2).choices(WORDS, k=60)
        row["positive"] = " ".join([*words, str(i)])
    write_jsonl(data / "near.jsonl", near)
    datasets.Dataset.from_list(rows(6, 620)).save_to_disk(str(data / "saved"))
    state = data / "saved/state.json"  # whose fingerprint is drawn at random
    state.write_text(json.dumps({**json.loads(state.read_text()), "_fingerprint": "0"}))
    bad = [*rows(5, 190), {"query": None}, {"query": "", "positive": "x"}, "text"]
    write_jsonl(data / "bad.jsonl", [*bad, {"query": "twice", "positive": "a", "negative": "a"}])
    for name in ("nq", "allnli", "quora_duplicates"):
        write_jsonl(data / f"e5/{name}.jsonl", rows(6, 200 + 10 * len(name)))
    msmarco = [
        {"query": r["query"], "positive_passages": [{"title": "T", "text": r["positive"]}],
         "negative_passages": [{"title": "", "text": r["negative"]}],
         "new_negatives": [{"title": "", "text": "no " + r["negative"]}]} for r in rows(6, 400)
    ]  # fmt: skip
    write_jsonl(data / "msmarco.jsonl", msmarco)
    vl = [{"query": [f"Find {i % 2}", r["query"]], "pos": [["", r["positive"]]],
           "neg": [["", r["negative"]]]} for i, r in enumerate(rows(6, 420))]  # fmt: skip
    write_jsonl(data / "vl.jsonl", vl)
    write_jsonl(data / "hq.jsonl", [{**r, "pos": [["", f"d{i}"]]} for i, r in enumerate(vl)])
    documents = [{"id": f"d{i}", "content": f"On {w}: {w} is heavy"} for i, w in enumerate(WORDS)]
    write_jsonl(data / "bright/documents/biology.jsonl", documents)


def _write_retrieval_sets(data: Path) -> None:
    """Write the same set with JSON lines and TSV, and in Parquet; own tasks read them too."""
    found = rows(24, 440)
    corpus = [{"_id": f"d{i}", "title": r["query"][9:15], "text": r["positive"]}
              for i, r in enumerate(found)]  # fmt: skip
    queries = [{"_id": f"q{i}", "text": r["query"]} for i, r in enumerate(found)]
    judged = [{"query-id": f"q{i}", "corpus-id": f"d{k % 24}", "score": int(k == i)}
              for i in range(24) for k in (i, i + 1)]  # fmt: skip
    write_jsonl(data / "beir/corpus.jsonl", corpus)
    write_jsonl(data / "beir/queries.jsonl", queries)
    for split in ("train", "test"):
        path = data / f"beir/qrels/{split}.tsv"
        path.parent.mkdir(exist_ok=True)
        lines = ["\t".join(map(str, row.values())) for row in judged[24 * (split == "test") :][:24]]
        path.write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    for name, records in (("corpus", corpus), ("queries", queries), ("qrels", judged)):
        (data / "tables" / name).mkdir(parents=True)
        table = pa.Table.from_pylist(records)
        if name == "corpus":
            spoken = pc.replace_substring(table["text"], "place", "site")
            table = table.set_column(2, "text", spoken)
        pq.write_table(table, data / f"tables/{name}/train-00000-of-00001.parquet")


def _write_hub(hub: Path) -> None:
    """One subset of BRIGHT in the hub's layout."""
    documents = [{"id": f"d{i}", "content": f"On {w}: {w} is heavy"} for i, w in enumerate(WORDS)]
    examples = [
        {"id": str(i), "query": f"Why is {w} heavy?", "excluded_ids": ["N/A"],
         "gold_ids": [f"d{i}"], "gold_ids_long": [f"d{i}"]} for i, w in enumerate(WORDS[:4])
    ]  # fmt: skip
    for repository in ("mteb/BRIGHT", "xlangai/BRIGHT"):
        declared = []
        for config, records in {"documents": documents, "examples": examples}.items():
            write_jsonl(hub / repository / config / "biology.jsonl", records)
            files = [{"split": "biology", "path": f"{config}/biology.jsonl"}]
            declared.append({"config_name": config, "data_files": files})
        text = "---\n" + json.dumps({"configs": declared}) + "\n---\n"
        (hub / repository / "README.md").write_text(text)


def _write_words(data: Path) -> None:
    rng = random.Random(0)
    sentences = [rng.choices(WORDS, k=4) for _ in range(24)]
    tagged = [
        "".join(f"{w} X T{WORDS.index(w) % 2} O\n" for w in sentence) for sentence in sentences
    ]
    (data / "words.txt").write_text("\n".join(tagged))


def write_inputs(folder: Path) -> None:
    """Write everything that no command makes, below `folder`."""
    data = folder / "data"
    write_jsonl(data / "bench.jsonl", [{"text": rows(1, i)[0]["query"]} for i in range(0, 600, 7)])
    _write_tables(data)
    _write_layouts(data)
    _write_retrieval_sets(data)
    _write_hub(folder / "hub")
    _write_words(data)
    write_jsonl(data / "corpus.jsonl", rows(100))
    # As many rows as the largest recipe's global batch, of one instruction.
    write_jsonl(data / "many.jsonl", rows(8192))
