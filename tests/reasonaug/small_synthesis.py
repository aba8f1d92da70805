"""Small syntheses against a local server, for the tests of `ReasonAug.synthesis`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config.loading import build_config
from ReasonAug.synthesis.config import SynthesisConfig

Rows = list[dict[str, Any]]

# Numeric concepts of ours, so that the server can write about them and no program is run.
NUMERIC = {
    "math theorem": ["Vieta's Formulas", "Chinese Remainder Theorem", "Bayes' Theorem"],
    "physics theorem": ["Snell's Law", "Ideal Gas Law"],
}


def tree_of(folder: Path, *urls: str, **sections: Any) -> dict[str, Any]:
    """A config as plain values; sections are merged into it key by key."""
    listed = folder.parent / "concepts.yaml"
    listed.write_text(json.dumps(NUMERIC))
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"name": "template", "servers": [{"url": url} for url in urls]},
        "concepts": {"files": [str(listed)]},
        "problems": {"per_concept": 3},
        # A timeout that no request reaches on a busy machine: it would be asked twice.
        "limits": {"timeout": 120, "concurrency": 8, "patience": 300},
        "batch": {"poll": 0.01},
    }
    for name, section in sections.items():
        merges = isinstance(section, dict) and isinstance(tree.get(name), dict)
        tree[name] = {**tree[name], **section} if merges else section
    return tree


def config_of(folder: Path, *urls: str, **sections: Any) -> SynthesisConfig:
    """The config of a small synthesis."""
    return build_config(SynthesisConfig, tree_of(folder, *urls, **sections), origin="test")


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def records(folder: Path) -> Rows:
    """All records of a ledger but the programs that were run."""
    found = [
        record
        for path in sorted((folder / "ledger").glob("*.jsonl"))
        if path.stem != "batches"
        for record in read(path)
    ]
    return [record for record in found if record["model"] != "sandbox"]
