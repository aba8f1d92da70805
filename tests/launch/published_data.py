"""Small raw data in every published layout, with lengths like the published ones."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.config import PrepareConfig, load_config
from pipeline.data.prepare import prepare

Record = dict[str, Any]


class Writer:
    """Texts of words without meaning, all different; lengths are log-normal."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._count = 0

    def text(self, mean: float) -> str:
        """A text of about `mean` tokens."""
        self._count += 1
        length = int(self._rng.lognormvariate(0, 0.6) * mean / 1.2)
        return f"{self._count}" + " a" * length


def write_jsonl(path: Path, records: Iterable[Record]) -> Path:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def e5(writer: Writer, rows: int) -> Iterator[Record]:
    """`query, positive, negative`."""
    for _ in range(rows):
        query, positive, negative = (writer.text(mean) for mean in (39, 366, 366))
        yield {"query": query, "positive": positive, "negative": negative}


def msmarco(writer: Writer, rows: int) -> Iterator[Record]:
    """One positive, 12 negatives, 3 of the instruction."""
    for _ in range(rows):
        texts = [{"title": "", "text": writer.text(92)} for _ in range(16)]
        yield {
            "query": writer.text(83),
            "positive_passages": texts[:1],
            "negative_passages": texts[1:13],
            "new_negatives": texts[13:],
        }


def reasonaug(writer: Writer, rows: int) -> Iterator[Record]:
    """Triplets of 300 concepts under 8 instructions."""
    for row in range(rows):
        yield {
            "instance": f"concept {row % 300}",
            "task": f"Find what is solved alike, kind {row % 8}",
            "user_query": writer.text(230),
            "positive_document": writer.text(508),
            "hard_negative_document": writer.text(508),
        }


def reasonir(writer: Writer, rows: int, *, documents: int = 0) -> Iterator[Record]:
    """[instruction, text] everywhere; with `documents`, positives are ids of so many of BRIGHT."""
    for row in range(rows):
        positive = f"doc/{row % documents}" if documents else writer.text(281)
        yield {
            "query": [f"Given a question of kind {row % 3}, find its answer", writer.text(84)],
            "pos": [["", positive]],
            "neg": [["", writer.text(281)]],
        }


def write_raw(folder: Path, rows: int) -> None:
    """Every raw file that a recipe in launch/recipes/data names, with at least `rows` rows."""
    writer = Writer(0)
    files: dict[str, Iterator[Record]] = {
        "msmarco-w-instructions.jsonl": msmarco(writer, rows),
        "e5/nq.jsonl": e5(writer, rows),
        "e5/quora_duplicates.jsonl": e5(writer, rows),
        "ReasonAug.jsonl": reasonaug(writer, rows),
        "reasonir-data-hq.jsonl": reasonir(writer, rows, documents=50),
        "reasonir-data-vl.jsonl": reasonir(writer, rows),
        "BRIGHT/documents/biology.jsonl": (
            {"id": f"doc/{k}", "content": f"document {k} of an evaluation " + "b " * 40}
            for k in range(50)
        ),
        "BRIGHT/examples/biology.jsonl": ({"query": f"c {k} " * 9} for k in range(9)),
    }
    for name, records in files.items():
        write_jsonl(folder / name, records)
    articles = ({"text": writer.text(100) if k % 3 else ""} for k in range(3 * rows))
    write_jsonl(folder / "wikitext-wikitext-103-raw-v1.jsonl", articles)
    lines = (writer.text(20) for _ in range(2 * rows))
    (folder / "wiki1m_for_simcse.txt").write_text("\n".join(lines))


def word_tokenizer(folder: Path) -> str:
    """A tokenizer that knows two words."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def local_path(published: str, raw: Path) -> str:
    """Return the local path for a path below data/ or on the hub, as `write_raw` wrote it."""
    if published.startswith("hub:"):
        return str(raw / (published.split("/")[1].replace(":", "-") + ".jsonl"))
    assert published.startswith("data/"), published
    return str(raw / published.removeprefix("data/"))


def prepare_recipe(recipe: Path, *, raw: Path, tokenizer: str, output_dir: Path) -> Path:
    """Run a data recipe with other paths for input and output, and no other change."""
    config = load_config(PrepareConfig, recipe)
    sources = tuple(
        dataclasses.replace(
            source,
            path=local_path(source.path, raw),
            documents=source.documents and local_path(source.documents, raw),
        )
        for source in config.sources
    )
    rule = config.decontaminate
    if rule is not None:
        sets = tuple(dataclasses.replace(s, path=local_path(s.path, raw)) for s in rule.sets)
        rule = dataclasses.replace(rule, sets=sets)
    local = dataclasses.replace(
        config, sources=sources, decontaminate=rule, tokenizer=tokenizer, output_dir=output_dir
    )
    return prepare(local, num_workers=1)
