"""Show that a refactoring changed nothing: take what the package makes, and compare.

python -m tests.goldens take BEFORE.json        on the commit before
python -m tests.goldens compare BEFORE.json     on the commit after
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.goldens.processes import ROOT, import_libraries

DIFF_LINES = 12


def git(*words: str) -> str:
    """Return what git prints about this checkout."""
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def take(folder: Path | None) -> dict[str, Any]:
    """Run everything; in a temporary folder, or in a new one that stays."""
    import_libraries()
    from tests.goldens.take import take_all

    commit = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    if folder is not None:
        folder.mkdir(parents=True)
        return {"commit": commit, "sections": take_all(folder.resolve())}
    # Of one name: manifests hold paths, and their seals would differ between two folders.
    temporary = Path(tempfile.gettempdir()).resolve() / "diffembed-goldens"
    temporary.mkdir()
    try:
        return {"commit": commit, "sections": take_all(temporary)}
    finally:
        shutil.rmtree(temporary)


def show_differences(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print each section's counts and short diffs; returns how many values differ."""
    different = 0
    for section in before.keys() | after.keys():
        old, new = before.get(section, {}), after.get(section, {})
        names = sorted(old.keys() | new.keys())
        changed = [name for name in names if old.get(name) != new.get(name)]
        different += len(changed)
        print(f"{section}: {len(names) - len(changed)} equal, {len(changed)} different")
        for name in changed:
            if name not in old or name not in new:
                print(f"  {'+' if name in new else '-'} {name}")
                continue
            lines = difflib.unified_diff(_lines(old[name]), _lines(new[name]), n=0, lineterm="")
            shown = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
            print(f"  {name}")
            print("".join(f"    {line[:200]}\n" for line in shown[:DIFF_LINES]), end="")
            if len(shown) > DIFF_LINES:
                print(f"    ... {len(shown) - DIFF_LINES} more lines")
    return different


def _lines(value: Any) -> list[str]:
    return (value if isinstance(value, str) else json.dumps(value, indent=1)).splitlines()


def main() -> int:
    """Take, or take and compare; returns 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__)
    parser.add_argument("what", choices=("take", "compare"))
    parser.add_argument("file", type=Path, help="the goldens, a JSON file")
    parser.add_argument("--with", type=Path, dest="other", help="compare: with this file instead")
    parser.add_argument("--folder", type=Path, help="work in this new folder, and leave it there")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # an adapter's config lists a set
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.goldens", *sys.argv[1:]])
    if options.what == "take":
        text = json.dumps(take(options.folder), indent=1, ensure_ascii=False)
        options.file.write_text(text + "\n")
        return 0
    before = json.loads(options.file.read_text())
    after = json.loads(options.other.read_text()) if options.other else take(options.folder)
    print(f"{before['commit']} -> {after['commit']}")
    return int(show_differences(before["sections"], after["sections"]) > 0)


if __name__ == "__main__":
    sys.exit(main())
