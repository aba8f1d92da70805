"""Brings the result files of finished elements together in mteb's cache layout.

One process does this after the array: elements that wrote to one cache at the same time lost lines
of `run_settings.jsonl`.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import EvaluateConfig
from pipeline.evaluation.tasks.elements import list_elements
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
        source = element.folder / "mteb"
        if not element.result_path.is_file():
            continue
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            place = target / path.relative_to(source)
            if path.name == _SETTINGS:
                settings.setdefault(place, []).extend(path.read_text().splitlines())
            else:
                write_text(place, path.read_text())
    for place, lines in settings.items():
        kept = sorted(set(lines), key=lambda line: json.loads(line)["task"])
        write_text(place, "\n".join(kept) + "\n")
    return target
