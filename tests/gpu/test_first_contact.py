"""The first contact with a GPU, rehearsed: the same code on the CPU and on the pretended device."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forks
from tests.gpu import first_contact
from tests.gpu.contact import Place, Report

# Packages that a machine with torch and transformers may lack, except the packages that
# `first_contact.sh wheels` brings along.
LACKING = ("datasets", "mteb", "polars", "tenacity", "bm25s", "pytrec_eval", "wandb")
NEEDED = (
    *("tests.gpu.first_contact", "tests.gpu.bench_gpu", "tests.gpu.drift_worker"),
    *(f"tests.gpu.part_{name}" for name in first_contact.PARTS),
    *("tests.gpu.test_step", "tests.gpu.test_packed_kernels", "tests.gpu.test_token_step_gpu"),
    *("pipeline.train", "pipeline.training.trainer", "pipeline.planning"),
)
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it in earnest")


def results_of(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    return {part["part"]: part for part in results["parts"]}


@needs_cpu
def test_every_part_passes_on_a_cpu_and_leaves_a_table(tmp_path: Path) -> None:
    code = first_contact.main(["--tiny", "--out", str(tmp_path)])

    results = results_of(tmp_path)
    assert {name: part["end"] for name, part in results.items()} == dict.fromkeys(
        first_contact.PARTS, "passed"
    )
    assert code == 0
    table = (tmp_path / "results.md").read_text()
    assert all(f["name"] in table for part in results.values() for f in part["figures"])


@needs_cpu
def test_parts_pass_on_the_pretended_device(tmp_path: Path) -> None:
    assert first_contact.main(["--pretend", "--out", str(tmp_path)]) == 0

    kernels = results_of(tmp_path)["kernels"]["figures"]
    # The kernel's definition was compared, forward and backward.
    assert sum("two-sided" in figure["name"] for figure in kernels) == 2


def part_that(behaviour: str) -> Any:
    """A stand-in for a part that does not pass."""

    def run(place: Place, report: Report) -> None:
        report("first", "was measured", "", True)
        if behaviour == "raises":
            raise RuntimeError("broken")
        if behaviour == "hangs":
            time.sleep(60)
        report("second", "1", "<= 0", False)

    return run


@needs_cpu
@pytest.mark.parametrize(
    ("behaviour", "end"),
    [
        ("raises", "FAILED: exit code 1"),
        ("hangs", "FAILED: not finished"),
        ("misses", "FAILED: second"),
    ],
)
def test_a_part_that_fails_leaves_its_figures_and_the_others(
    behaviour: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from tests.gpu import first_contact, part_loss, test_first_contact as t; "
        f"part_loss.run = t.part_that({behaviour!r}); "
        "sys.exit(first_contact.main(sys.argv[1:]))"
    )
    process = forks.Process

    def planted(words: list[str], **rest: Any) -> forks.Process:
        return process(["-c", code, *words[2:]] if "loss" in words else words, **rest)

    monkeypatch.setattr(forks, "Process", planted)
    monkeypatch.setattr(first_contact, "_FACTOR", 1 if behaviour == "hangs" else 6)
    monkeypatch.setitem(first_contact.PARTS, "loss", (10, "planted"))
    code_of_run = first_contact.main(["loss", "nccl", "--tiny", "--out", str(tmp_path)])

    results = results_of(tmp_path)
    assert code_of_run == 1
    assert results["loss"]["end"].startswith(end)
    if behaviour != "hangs":  # which a slow machine may end before its first figure
        assert results["loss"]["figures"][0]["name"] == "first"
    assert results["nccl"]["end"] == "passed"


def test_nothing_it_imports_is_lacking_on_a_machine_with_torch_and_transformers(
    tmp_path: Path,
) -> None:
    code = (
        "import importlib, sys\n"
        f"lacking = {LACKING!r}\n"
        # Loaded by the server that this process is forked from.
        "loaded = (*lacking, 'pipeline', 'ReasonAug')\n"
        "for name in [n for n in sys.modules if n.split('.')[0] in loaded]:\n"
        "    del sys.modules[name]\n"
        "sys.modules.update(dict.fromkeys(lacking))\n"
        f"for name in {NEEDED!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = forks.run(["-c", code], folder=forks.ROOT, timeout=300)

    assert done.returncode == 0, done.stderr[-2000:]
