"""The commands of launch/compare_negatives.sh, which stand-ins record instead of running them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import EvaluateConfig, MineConfig, TrainConfig, load_config
from tests.fake_slurm import put_command

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "minilm"
# The scripts that run an experiment on this machine.
TRIALS = [
    path
    for path in sorted((ROOT / "launch").glob("*.sh"))
    if re.search(r"source .*(trial|minilm)\.sh", path.read_text())
]
OUT = Path("runs/minilm/negatives")
# One line of JSON for each command: its name and its arguments.
RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
"""
# Only the last step, whose program comes from standard input, really runs.
PYTHON = f"""#!/bin/bash
case "$1" in
  -) exec {sys.executable} "$@" ;;
  -c)
    if [[ $2 == *socket* ]]; then echo 29512; else echo weights; fi ;;
esac
"""


class Comparison:
    """A checkout with the scripts alone, in which the comparison is started from another folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.record, self.home = (folder / name for name in ("root", "record", "home"))
        shutil.copytree(ROOT / "launch", self.root / "launch")
        (self.root / "launch" / "install.sh").write_text("")
        for name in ("diffembed", "deepspeed"):
            put_command(folder / "bin" / name, RECORD)
        put_command(folder / "bin" / "python", PYTHON)
        self.path = f"{folder / 'bin'}:{os.environ['PATH']}"
        for name in ("generations", "definitions"):
            generated = self.home / "generated" / f"{name}.jsonl"
            generated.parent.mkdir(parents=True, exist_ok=True)
            generated.touch()

    def run(self, *words: str) -> str:
        """Start the script in `home`; return its output."""
        done = subprocess.run(
            [str(self.root / "launch" / "compare_negatives.sh"), "generated", *words],
            cwd=self.home,
            env={**os.environ, "PATH": self.path, "RECORD": str(self.record)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def configs(self, kind: type[Any], *command: str) -> list[Any]:
        """Return the config that each recorded call of a command reads, with its changes."""
        calls = [json.loads(line) for line in self.record.read_text().splitlines()]
        found = [call[len(command) :] for call in calls if call[: len(command)] == [*command]]
        return [load_config(kind, self.root / config, tuple(changes)) for config, *changes in found]


RANKS = ("deepspeed", "--num_accelerators", "2", "--master_port", "29512")
TRAINER = (*RANKS, "pipeline/train.py", "--deepspeed", "ds_configs/zero2.json")


def report() -> dict[str, Any]:
    """A report of four models, as `diffembed report` writes it."""
    scores = {"untouched": 0.5, "bm25": 0.6, "mined": 0.625, "margin": 0.575}
    names = list(scores)
    pairs = [
        {
            "model": over,
            "minus": under,
            "difference": scores[over] - scores[under],
            "ci_low": scores[over] - scores[under] - 0.01,
            "ci_high": scores[over] - scores[under] + 0.01,
        }
        for number, under in enumerate(names)
        for over in names[number + 1 :]
    ]
    task = {"name": "Task", "metric": "ndcg", "num_queries": 7, "pairs": pairs, **scores}
    return {"models": names, "tasks": [task]}


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    made = Comparison(tmp_path)
    target = made.root / OUT / "report" / "report.json"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(report()))
    return made


def test_every_training_reads_shards_that_were_made_before_and_is_scored(
    comparison: Comparison,
) -> None:
    comparison.run("teacher=org/teacher", "num_steps=7")

    mined = {config.output for config in comparison.configs(MineConfig, "diffembed", "mine")}
    trainings = comparison.configs(TrainConfig, *TRAINER)
    assert [config.output_dir.name for config in trainings] == [
        "bm25",
        "mined",
        "margin",
        "guide",
        "distilled",
    ]
    assert {config.num_steps for config in trainings} == {7}
    # The shards of `diffembed prepare`, and all mined ones: none is made for nothing.
    assert {config.data.path for config in trainings} == {Path("runs/minilm/shards"), *mined}
    assert comparison.configs(TrainConfig, "diffembed", "export") == trainings
    exports = [config.output_dir / "export" for config in trainings]
    for command in (("diffembed", "evaluate", "run"), ("diffembed", "report")):
        (scored,) = comparison.configs(EvaluateConfig, *command)
        assert [Path(model.path) for model in scored.models][1:] == exports


def test_trainings_with_a_teacher_differ_from_each_other_by_one_loss(
    comparison: Comparison,
) -> None:
    comparison.run("teacher=org/teacher")

    *_, margin, guide, distilled = comparison.configs(TrainConfig, *TRAINER)
    assert (margin.loss.guide, margin.loss.distillation) == (None, None)
    assert guide.loss.guide is not None and guide.loss.distillation is None
    assert distilled.loss.guide is None and distilled.loss.distillation.documents == "batch"
    assert guide.data == distilled.data
    *_, taught = comparison.configs(MineConfig, "diffembed", "mine")
    # Both losses read vectors of the teacher.
    assert taught.teacher.vectors


@pytest.mark.parametrize("local", [True, False], ids=["folder", "name"])
def test_a_teacher_is_a_folder_where_the_script_was_started_or_a_name(
    comparison: Comparison, local: bool
) -> None:
    folder = comparison.home / "org" / "teacher"
    if local:
        folder.mkdir(parents=True)

    comparison.run("teacher=org/teacher")

    *others, taught = comparison.configs(MineConfig, "diffembed", "mine")
    assert taught.teacher.path == (str(folder) if local else "org/teacher")
    assert [config.teacher for config in others] == [None, None]


def test_without_a_teacher_its_trainings_are_left_out(comparison: Comparison) -> None:
    comparison.run()

    trained = [config.output_dir.name for config in comparison.configs(TrainConfig, *TRAINER)]
    assert trained == ["bm25", "mined", "margin"]
    assert len(comparison.configs(MineConfig, "diffembed", "mine")) == 2


def test_the_last_table_has_the_gain_of_each_model_over_bm25(comparison: Comparison) -> None:
    table = comparison.run().splitlines()[-6:]

    assert table == [
        "| 7 queries | ndcg | gain over bm25, 95 % interval |",
        "|---|---|---|",
        "| untouched | 0.5000 |  |",
        "| bm25 | 0.6000 |  |",
        "| mined | 0.6250 | +0.0250 [+0.0150, +0.0350] |",
        "| margin | 0.5750 | -0.0250 [-0.0350, -0.0150] |",
    ]


@pytest.mark.parametrize("script", TRIALS, ids=lambda path: path.stem)
def test_ranks_of_a_script_leave_the_default_port_to_other_runs(script: Path) -> None:
    text = script.read_text()

    # Started without a port, two runs on one machine would meet at 29500.
    assert "deepspeed --num_accelerators" not in text
