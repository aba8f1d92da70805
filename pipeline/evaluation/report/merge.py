"""Brings the result files of finished elements together in mteb's cache layout.

One process does this after the array: elements that wrote to one cache at the same time lost lines
of `run_settings.jsonl`.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.score.results import read_result
from pipeline.evaluation.tasks.elements import list_elements
from pipeline.files import hash_files
from pipeline.run_dir import write_text

_SETTINGS = "run_settings.jsonl"


def merge_results(config: EvaluateConfig) -> Path:
    """Write `output_dir/mteb/results/MODEL/REVISION/TASK.json` for every finished element.

    Returns:
        The folder that `mteb.ResultCache` takes.
    """
    target = config.output_dir / "mteb"
    settings: dict[Path, list[str]] = {}
    for element in list_elements(config):
        source, result = element.folder / "mteb", read_result(element)
        if result is None:
            continue
        _check_files(source, result.get("mteb_files"))
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            place = target / path.relative_to(source)
            if path.name == _SETTINGS:
                settings.setdefault(place, []).extend(path.read_text().splitlines())
            else:
                write_text(place, path.read_text())
    for place, lines in settings.items():
        kept = sorted(set(lines), key=lambda line: str(json.loads(line)["task"]))
        write_text(place, "\n".join(kept) + "\n")
    return target


def _check_files(folder: Path, recorded: dict[str, str] | None) -> None:
    """Refuse mteb's files where they are not what the element wrote.

    Args:
        folder: the element's.
        recorded: hashes by path; None for a result from before they were noted.
    """
    found = hash_files(folder)
    for name in sorted({*found, *recorded} if recorded is not None else ()):
        if recorded is not None and found.get(name) != recorded.get(name):
            raise UserError(
                f"{folder / name}: damaged (not the file that was written with result.json)",
                fix=f"delete {folder.parent} and evaluate again: only what is missing is done",
            )
