"""Write data sets in the hub's layout: a README that names the files, one file per split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.files import write_text
from ReasonAug.files import write_jsonl

Rows = Sequence[Mapping[str, Any]]
Configs = Mapping[str, Mapping[str, Rows]]


def write_dataset(hub: Path, name: str, configs: Configs, *, about: str) -> int:
    """Write data set `name` below `hub`.

    Args:
        configs: Config name -> split name -> rows. All splits of a config need the same columns.
        about: Text of the README.

    Returns:
        The number of rows written.
    """
    folder = hub / name
    listing = []
    for config, splits in configs.items():
        files = []
        for split, rows in splits.items():
            write_jsonl(folder / config / f"{split}.jsonl", rows)
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        listing.append({"config_name": config, "data_files": files})
    head = yaml.safe_dump({"configs": listing}, sort_keys=False)
    write_text(
        folder / "README.md", f"---\n{head}---\n# {name}: a small local replica\n\n{about}\n"
    )
    return sum(len(rows) for splits in configs.values() for rows in splits.values())
