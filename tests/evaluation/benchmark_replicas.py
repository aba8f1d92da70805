"""Tiny data sets in the hub's layout, so that unmodified mteb tasks load them from a folder.

Every subset has different texts, so that a task that reads another's gets another score.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

Rows = list[dict[str, Any]]

TOPICS = {
    "glaciers": "Ice flows downhill under its own weight and carves wide valleys.",
    "sourdough": "Wild yeast and bacteria in the starter raise the bread slowly.",
    "suspension bridges": "Cables carry the deck and pass its load to tall towers.",
    "chess openings": "Early moves fight for the centre and bring pieces into play.",
    "honey bees": "Foragers dance in the hive to point others to flowers.",
    "tides": "The pull of the moon raises the sea twice a day.",
    "lighthouses": "A turning lamp and lens warn ships off the rocks at night.",
    "violins": "A bow of horsehair makes the string stick and slip.",
}
WORDS = sorted(set(" ".join(TOPICS.values()).split()))
ASPECTS = ("history", "mechanism", "measurement", "accidents", "economics", "teaching")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def write_dataset(root: Path, repository: str, configs: dict[str, dict[str, Rows]]) -> None:
    """configs: config name -> split -> rows, written as JSONL with a README that declares them."""
    folder = root / repository
    declared = []
    for config, splits in configs.items():
        files = []
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        declared.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"configs": declared}) + "---\n")


def write_all(root: Path) -> Path:
    for name in ("Core17", "News21", "Robust04"):
        write_follow_ir(root, name=f"{name}InstructionRetrieval")
    write_long_embed(root)
    write_bright(root, "mteb/BRIGHT")
    write_bright(root, "xlangai/BRIGHT")
    return root


def documents_of(subset: str) -> list[tuple[str, str, str]]:
    """(id, topic, text) of one document per topic and aspect; a few words of each are random."""
    generator = random.Random(subset)
    return [
        (
            f"{subset}/{topic}-{aspect}".replace(" ", "_"),
            topic,
            f"On the {aspect}: {text} {' '.join(generator.sample(WORDS, 8))}",
        )
        for topic, text in TOPICS.items()
        for aspect in ASPECTS
    ]


def write_follow_ir(
    root: Path, *, name: str = "Core17InstructionRetrieval", without: tuple[str, ...] = ()
) -> None:
    generator = random.Random(name)
    documents = documents_of(name)
    queries, instructions, judgements, candidates, changed = [], [], [], [], []
    for number, topic in enumerate(TOPICS):
        own = [name for name, its_topic, _ in documents if its_topic == topic]
        others = [name for name, its_topic, _ in documents if its_topic != topic]
        listed = own + generator.sample(others, 10)
        generator.shuffle(listed)
        dropped = own[3:]
        for kind, relevant in (("og", own), ("changed", own[:3])):
            query = f"{number}-{kind}"
            wish = "Any report will do." if kind == "og" else f"Leave out {', '.join(ASPECTS[3:])}."
            queries.append({"_id": query, "text": f"What does {name} know about {topic}?"})
            instructions.append({"query-id": query, "instruction": f"Find {topic}. {wish}"})
            candidates.append({"query-id": query, "corpus-ids": listed})
            judgements += [
                {"query-id": query, "corpus-id": name, "score": int(name in relevant)}
                for name in listed
            ]
        changed.append({"query-id": str(number), "corpus-ids": dropped})
    corpus = [
        {"_id": name, "title": topic.title() if i % 2 else "", "text": text}
        for i, (name, topic, text) in enumerate(documents)
    ]
    configs = {
        "corpus": {"corpus": corpus},
        "default": {"test": judgements},
        "queries": {"queries": queries},
        "instruction": {"instruction": instructions},
        "top_ranked": {"top_ranked": candidates},
        "qrel_diff": {"qrel_diff": changed},
    }
    kept = {name: splits for name, splits in configs.items() if name not in without}
    write_dataset(root, f"mteb/{name}", kept)


def write_multilingual_follow_ir(root: Path, repository: str) -> None:
    """One set of configs per language, named CONFIG-LANGUAGE, with texts of their own."""
    configs: dict[str, dict[str, Rows]] = {}
    for language in ("fas", "rus", "zho"):
        write_follow_ir(root / "parts", name=language)
        for path in (root / "parts/mteb" / language).glob("*/*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            configs[f"{path.parent.name}-{language}"] = {path.stem: rows}
    write_dataset(root, repository, configs)


def write_long_embed(root: Path, *, num_documents: int = 6, num_queries: int = 4) -> None:
    generator = random.Random(1)
    names = ["Ada", "Boris", "Chidi", "Dana", "Emeka", "Freya"][:num_documents]
    needle: dict[str, Rows] = {"queries": [], "corpus": [], "qrels": []}
    passkey: dict[str, dict[str, Rows]] = {"corpus": {}, "queries": {}, "default": {}}
    for length in LENGTHS:
        rows: dict[str, Rows] = {config: [] for config in passkey}
        for i, name in enumerate(names):
            filler = "The road went on and on. " * (min(length, 512) // 32)
            number = generator.randint(1000, 9999)
            # Documents that are cut before the answer must not tie.
            head = " ".join(generator.sample(WORDS, 6))
            text = f"{head}. {filler}{name} keeps a needle in drawer {number}. {filler}"
            needle["corpus"].append(
                {"doc_id": f"n{length}_{i}", "qid": "", "text": text, "context_length": length}
            )
            text = f"{head}. {filler}The pass key of {name} is {number}. {filler}"
            rows["corpus"].append({"_id": f"p{length}_{i}", "title": "", "text": text})
            if i >= num_queries:
                continue
            query, document = f"q{length}_{i}", f"n{length}_{i}"
            ask = f"Where does {name} keep a needle?"
            needle["queries"].append(
                {"doc_id": "", "qid": query, "text": ask, "context_length": length}
            )
            needle["qrels"].append(
                {"doc_id": document, "qid": query, "text": "", "context_length": length}
            )
            rows["queries"].append({"_id": query, "text": f"What is the pass key of {name}?"})
            rows["default"].append({"query-id": query, "corpus-id": f"p{length}_{i}", "score": 1})
        for config in passkey:
            passkey[config][f"test_{length}"] = rows[config]
    real = {
        name: _long_rows(name) for name in ("narrativeqa", "qmsum", "summ_screen_fd", "2wikimqa")
    }
    write_dataset(root, "dwzhu/LongEmbed", {"needle": needle, **real})
    write_dataset(root, "mteb/LEMBPasskeyRetrieval", passkey)


def _long_rows(name: str) -> dict[str, Rows]:
    """One long document per topic, one query about each."""
    long = {topic: " ".join(t for _, o, t in documents_of(name) if o == topic) for topic in TOPICS}
    return {
        "queries": [{"qid": t, "doc_id": "", "text": f"{name}: {t}?"} for t in TOPICS],
        "corpus": [{"qid": "", "doc_id": f"{name}/{t}", "text": long[t]} for t in TOPICS],
        "qrels": [{"qid": t, "doc_id": f"{name}/{t}", "text": ""} for t in TOPICS],
    }


SUBSETS = (
    "biology", "earth_science", "economics", "psychology", "robotics", "stackoverflow",
    "sustainable_living", "pony", "leetcode", "aops", "theoremqa_theorems", "theoremqa_questions",
)  # fmt: skip


def write_bright(root: Path, repository: str) -> None:
    configs: dict[str, dict[str, Rows]] = {"documents": {}, "examples": {}, "long_documents": {}}
    for split in SUBSETS:
        excludes = split in ("leetcode", "aops", "theoremqa_questions")
        # Two subsets of BRIGHT share their documents.
        documents = documents_of("aops" if split == "theoremqa_questions" else split)
        configs["documents"][split] = [{"id": name, "content": t} for name, _, t in documents]
        configs["examples"][split] = []
        for number, topic in enumerate(TOPICS):
            own = [name for name, its_topic, _ in documents if its_topic == topic]
            configs["examples"][split].append(
                {
                    "id": str(number),
                    "query": f"Why do {topic} behave as they do, asks {split.replace('_', ' ')}?",
                    "excluded_ids": own[:2] if excludes else ["N/A"],
                    "gold_ids": own[2:5],
                    "gold_ids_long": [f"{split}/{topic}"],
                }
            )
        configs["long_documents"][split] = [
            {
                "id": f"{split}/{topic}",
                "content": " ".join(text for _, its_topic, text in documents if its_topic == topic),
            }
            for topic in TOPICS
        ]
    write_dataset(root, repository, configs)
