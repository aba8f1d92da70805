"""Find and copy the files of the repository that are not Python: recipes, DeepSpeed JSON, Slurm.

    checkout    ROOT/ds_configs, ROOT/slurm, ROOT/launch/recipes, ROOT/docs/schema
    wheel       the same below pipeline/shipped (`force-include` in pyproject.toml)

Copies keep these paths, so the commands of the documentation work in a folder of copies too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.files import require_writable

# The first line of a recipe leads an editor to its schema.
SHIPPED = tuple(map(Path, ("launch/recipes", "ds_configs", "slurm", "docs/schema")))


def shipped_root() -> Path:
    """Return the folder that holds the shipped files of this installation."""
    package = Path(__file__).resolve().parent
    installed = package / "shipped"
    return installed if installed.is_dir() else package.parent


def find_shipped(path: Path) -> Path:
    """Return the path if it exists, otherwise the shipped file of that path if there is one."""
    shipped = shipped_root() / path
    return shipped if not path.exists() and shipped.exists() else path


def copy_shipped(folder: Path) -> list[Path]:
    """Copy all shipped files into a folder; return the paths of the new ones.

    A file that exists is kept: it may have been edited, as `slurm/cluster.env` is meant to be.

    Raises:
        UserError: the folder cannot be written.
        MachineError: the disk is full or broken.
    """
    root = shipped_root()
    require_writable(folder, key="DIR")
    copied = []
    for tree in SHIPPED:
        for source in sorted(path for path in (root / tree).rglob("*") if path.is_file()):
            target = folder / source.relative_to(root)
            # Logs of this checkout's own jobs are not part of what is shipped.
            if target.exists() or source.suffix == ".out":
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            copied.append(target)
    return copied
