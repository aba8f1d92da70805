"""The wheel, installed in a folder far from any checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pipeline.shipped_files import SHIPPED
from tests.tiny_models import tiny_starter

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"question": f"where is place {n}", "answer": f"place {n} is here"} for n in range(40)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where pip has installed the wheel that was built from the source archive."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target"]
    subprocess.run([*build, "sdist", "--directory", folder], cwd=ROOT, check=True)
    (source,) = folder.glob("diffembed-*.tar.gz")
    subprocess.run(["tar", "-xf", source, "-C", folder], check=True)
    unpacked = folder / source.name.removesuffix(".tar.gz")
    subprocess.run([*build, "wheel", "--directory", folder], cwd=unpacked, check=True)
    (wheel,) = folder.glob("diffembed-*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(site: Path, folder: Path, *words: str) -> str:
    """Run the wheel's `diffembed` in a folder; return what it printed."""
    done = subprocess.run(
        [sys.executable, site / "bin/diffembed", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_init_prepare_and_train_need_nothing_but_the_wheel(site: Path, tmp_path: Path) -> None:
    data = tmp_path / "faq.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = tiny_starter(tmp_path / "model", data, num_layers=1)
    words = ["--model", str(model), "--data", str(data), "--gpus", "0", "--goal", "search"]

    assert run(site, tmp_path, "--version") == f"diffembed {metadata.version('diffembed')}\n"
    run(site, tmp_path, "init", "run", *words)
    run(site, tmp_path, "prepare", "run/data.yaml")
    small = ["num_steps=1", "optimizer.warmup_steps=0", "data.global_batch_size=8"]
    run(site, tmp_path, "train", "run/train.yaml", "--ranks", "1", *small)

    (environment,) = tmp_path.rglob("environment.json")
    # The project in whose repository a package is installed is not the package's.
    assert json.loads(environment.read_text())["git_commit"] is None


def test_files_writes_what_the_repository_holds_and_keeps_edited_ones(
    site: Path, tmp_path: Path
) -> None:
    edited = tmp_path / "slurm/cluster.env"
    edited.parent.mkdir()
    edited.write_text("SITE_FLAGS=(--partition=mine)\n")

    run(site, tmp_path, "files")

    assert edited.read_text() == "SITE_FLAGS=(--partition=mine)\n"
    edited.write_bytes((ROOT / "slurm/cluster.env").read_bytes())
    tracked = subprocess.run(
        ["git", "ls-files", *map(str, SHIPPED)], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    written = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
    assert written == sorted(tracked)
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in tracked)
