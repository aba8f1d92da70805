"""Lay out the folder of a synthesis, and decide by hashes of inputs which of its parts are current.

OUTPUT_DIR/ledger/STAGE.jsonl    recorded calls
           stages/STAGE.jsonl    items, and STAGE.digest: what these lines depend on
           rows.jsonl            the training rows
           finished.json         what rows and card depend on
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.config.loading import as_tree
from pipeline.files import fingerprint_files, hash_file
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.prompts import Prompts
from ReasonAug.synthesis.stages import CLEAN, NAMES

# Raised when stages give other lines for the same answers.
_FORMAT = 2
# The sections of the config that a stage's lines depend on, in addition to the stages before it.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "concepts": ("seed", "model", "concepts", "domains"),
    "problems": ("problems",),
    "checked": ("checks",),
    "rewritten": ("rewrites", "negatives"),
    "clean": ("decontaminate",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """The files of a run."""

    root: Path

    @property
    def ledger(self) -> Path:
        """Recorded calls."""
        return self.root / "ledger"

    def stage(self, name: str) -> Path:
        """The items of a stage."""
        return self.root / "stages" / f"{name}.jsonl"

    @property
    def rows(self) -> Path:
        """The training rows."""
        return self.root / "rows.jsonl"

    @property
    def finished(self) -> Path:
        """The record of a finished run."""
        return self.root / "finished.json"


def inputs_digest(config: SynthesisConfig, prompts: Prompts) -> str:
    """Return a hash of what all stages depend on: prompts and files of concepts."""
    files = [hash_file(path) if path.is_file() else "" for path in config.concepts.files]
    return _digest(_FORMAT, prompts.versions(), files)


def stage_digest(config: SynthesisConfig, name: str, before: str, ledger: Path) -> str:
    """Return a hash of what the lines of a stage depend on; `before` is that of its input."""
    tree = as_tree(config)
    for key in ("servers", "licence"):
        del tree["model"][key]  # other servers give the same lines for the same answers
    sections = {section: tree[section] for section in _SECTIONS.get(name, ())}
    path = ledger / f"{name}.jsonl"
    # The ledger only grows, so its size tells whether there are more answers.
    size = path.stat().st_size if path.exists() else 0
    sets = config.decontaminate.sets if config.decontaminate and name == CLEAN else ()
    local = [Path(found.path) for found in sets]
    files = [fingerprint_files(path.parent, [path]) for path in local if path.is_file()]
    return _digest(before, name, sections, size, files)


def run_digest(config: SynthesisConfig, prompts: Prompts, ledger: Path) -> str:
    """Return a hash of everything that rows and card depend on."""
    digest = inputs_digest(config, prompts)
    for name in NAMES:
        digest = stage_digest(config, name, digest, ledger)
    tree = as_tree(config)
    parts = [tree[name] for name in ("rows", "prices", "quality", "strict")]
    return _digest(digest, *parts, tree["model"]["licence"])


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def outputs_of(folder: Folder) -> list[Path]:
    """Return the files of a finished run."""
    return [folder.rows, folder.root / "summary.json", folder.root / "README.md"]


def is_finished(config: SynthesisConfig, prompts: Prompts, folder: Folder) -> bool:
    """Return True if a run with these inputs is finished and its files are as it left them."""
    try:
        finished = json.loads(folder.finished.read_text())
        outputs = fingerprint_files(folder.root, outputs_of(folder))
    except (OSError, ValueError):
        return False
    same = run_digest(config, prompts, folder.ledger) == finished.get("inputs")
    return bool(same and outputs == finished.get("outputs"))
