"""The commands that are tried on damaged inputs: what each one reads, writes and concludes."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tests import forks
from tests.damage import results
from tests.damage.results import Result


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command in the undamaged world.

    Attributes:
        argv: program and arguments, relative to the world's folder.
        config: the YAML (or DeepSpeed JSON) whose keys are damaged.
        reads: globs of the files that it reads.
        needs: what must lie in the folder, in addition to what `reads` names.
        result: what it concluded, from its folder and its output; compared with the undamaged one.
        code: exit code where nothing is damaged.
        weight: how often it is drawn, relative to the others.
        replaces: globs of earlier files that it may replace.
        fewer: its result lists what need not be done again, which may be less after damage.
        any_text: it takes every string of a JSON-lines file, whatever the fields.
        lists: it prints a line `fail ...` for each fault, and exits with 1 if there is one.
    """

    argv: tuple[str, ...]
    reads: tuple[str, ...]
    result: Callable[[Path, str], Result]
    config: str = ""
    needs: tuple[str, ...] = ()
    code: int = 0
    weight: float = 1.0
    replaces: tuple[str, ...] = ()
    fewer: bool = False
    any_text: bool = False
    lists: bool = False


_BASE = ("base/config.json", "base/tokenizer.json", "base/tokenizer_config.json")
_WEIGHTS = "base/model.safetensors"
_SHARDS = ("shards/manifest.json", "shards/*.arrow")
_ZERO = ("train", "train.yaml", "--deepspeed", "zero.json")
_CHECKPOINT = ("run/checkpoints/latest", "run/checkpoints/step-*/*")
_EXPORTED = ("export/*.json", "export/*/*.json", "export/*.safetensors")
_MADE_TRAINING = ("run/*", "run/checkpoints/*", "run/checkpoints/*/*")
_HUB = ("hub/mteb/*/README.md", "hub/mteb/*/*/*.jsonl")
_EVALUATION_NEEDS = ("export", "hub", "base")
_EVALUATION_WRITES = ("eval/**/*",)
_MINED = ("mined/manifest.json", "mined/*.arrow", "mined/vectors/*")
_PLANNED = ("train.yaml", "--deepspeed", "zero.json", "--gpu", "h100")
_CHAIN = ("again.yaml", "mined.yaml", "taught.yaml", "evaluate.yaml", "zero.json")

COMMANDS: dict[str, Command] = {
    "starter": Command(
        argv=("diffembed", "starter", "starter.yaml"),
        config="starter.yaml",
        reads=("data/rows.jsonl",),
        result=results.files("made/*.safetensors", "made/*.json"),
        weight=1.5,
        any_text=True,
    ),
    "prepare": Command(
        argv=("diffembed", "prepare", "prepare.yaml"),
        config="prepare.yaml",
        reads=(
            *("data/rows.jsonl", "data/rows.parquet", "data/bench.jsonl"),
            *("data/beir/*.jsonl", "data/beir/qrels/*.tsv", *_BASE, *_SHARDS),
        ),
        result=results.shards,
        weight=3,
    ),
    "prepare again": Command(
        argv=("diffembed", "prepare", "again.yaml"),
        reads=_SHARDS,
        needs=("data", "base", "again.yaml"),
        result=results.files("shards/*"),
        weight=0.5,
    ),
    "data inspect": Command(
        argv=("diffembed", "data", "inspect", "shards"),
        reads=(*_SHARDS, *_BASE),
        needs=("base",),
        result=results.text,
        replaces=("shards/*.png",),
    ),
    "data verify": Command(
        argv=("diffembed", "data", "verify", "shards"), reads=_SHARDS, result=results.text
    ),
    "mine": Command(
        argv=("diffembed", "mine", "mine.yaml", "--workers", "1"),
        config="mine.yaml",
        reads=(*_SHARDS, *_EXPORTED, "data/texts.jsonl", "data/bench.jsonl"),
        needs=("base",),
        result=results.files("made/*.arrow", "made/vectors/*"),
        weight=2,
    ),
    "mine on": Command(
        argv=("diffembed", "mine", "mine.yaml", "store=store", "--workers", "1"),
        reads=("store/**/*",),
        needs=("base", "shards", "export", "data", "mine.yaml"),
        result=results.files("made/*.arrow", "made/vectors/*"),
        replaces=("store/**/*",),
    ),
    "mine again": Command(
        argv=("diffembed", "mine", "mined.yaml", "--workers", "1"),
        reads=_MINED,
        needs=("base", "shards", "export", "data", "mined.yaml"),
        result=results.files("mined/*.arrow", "mined/vectors/*"),
        weight=0.7,
    ),
    "train mined": Command(
        argv=("train", "taught.yaml", "--deepspeed", "zero.json"),
        config="taught.yaml",
        reads=_MINED,
        needs=("base", "zero.json"),
        result=results.training("taught"),
        weight=1.5,
    ),
    "train --dry-run": Command(
        argv=(*_ZERO, "--dry-run"),
        config="train.yaml",
        reads=(*_SHARDS, *_BASE, "zero.json"),
        needs=("base", "shards", "train.yaml"),
        result=results.text,
        weight=3,
    ),
    "train": Command(
        argv=(*_ZERO, "output_dir=made", "num_steps=1", "optimizer.warmup_steps=0"),
        reads=(*_SHARDS, *_BASE, _WEIGHTS, "zero.json"),
        needs=("train.yaml",),
        result=results.training("made"),
        weight=1.5,
    ),
    "resume": Command(
        argv=_ZERO,
        reads=(
            *_CHECKPOINT,
            *("run/metrics.jsonl", "run/config.yaml", "run/ds_config.json", "run/environment.json"),
            *(*_SHARDS, _WEIGHTS),
        ),
        needs=("base", "shards", "train.yaml", "zero.json", "run"),
        result=results.training("run"),
        weight=2,
        replaces=_MADE_TRAINING,
    ),
    "export": Command(
        argv=("diffembed", "export", "train.yaml", "--output", "made", "--no-check"),
        reads=(*_CHECKPOINT, *_SHARDS, *_BASE, _WEIGHTS, "run/config.yaml"),
        needs=("base", "shards", "train.yaml", "run"),
        result=results.export,
        weight=1.5,
    ),
    "export init": Command(
        argv=(
            *("diffembed", "export", "train.yaml", "model.path=pieces"),
            *("--checkpoint", "init", "--output", "made", "--no-check"),
        ),
        reads=("pieces/*.json", "pieces/*.safetensors"),
        needs=("pieces", "shards", "train.yaml", "base"),
        result=results.export,
    ),
    "export adapter": Command(
        argv=(
            *("diffembed", "export", "train.yaml", "model.adapter=adapter"),
            *("--checkpoint", "init", "--output", "made", "--no-check"),
        ),
        reads=("adapter/*",),
        needs=("base", "shards", "train.yaml"),
        result=results.export,
    ),
    "encode": Command(
        argv=(
            *("diffembed", "encode", "export", "--input", "data/texts.jsonl"),
            *("--output", "vectors.arrow"),
        ),
        reads=(*_EXPORTED, "data/texts.jsonl"),
        result=results.vectors("vectors.arrow"),
        weight=2,
    ),
    "encode foreign": Command(
        argv=(
            *("diffembed", "encode", "foreign", "--input", "data/texts.parquet"),
            *("--output", "vectors.arrow"),
        ),
        reads=("foreign/*.json", "foreign/*/*.json", "foreign/*.safetensors", "data/texts.parquet"),
        result=results.vectors("vectors.arrow"),
    ),
    "encode on": Command(
        argv=(
            *("diffembed", "encode", "export", "--input", "data/texts.jsonl"),
            *("--output", "begun.arrow"),
        ),
        reads=(".begun.arrow.parts/*",),
        needs=("export", "data"),
        result=results.vectors("begun.arrow"),
        replaces=(".begun.arrow.parts/*",),
        weight=0.7,
    ),
    "evaluate run": Command(
        argv=("diffembed", "evaluate", "run", "evaluate.yaml", "output_dir=eval"),
        config="evaluate.yaml",
        reads=(*_HUB, *_EXPORTED),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml"),
        result=results.scores,
        replaces=_EVALUATION_WRITES,
    ),
    "evaluate run again": Command(
        argv=("diffembed", "evaluate", "run", "evaluate.yaml"),
        reads=("eval/**/result.json", "eval/**/mteb/**/*.json"),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml", "eval"),
        result=results.scores,
        replaces=_EVALUATION_WRITES,
    ),
    "evaluate plan": Command(
        argv=("diffembed", "evaluate", "plan", "evaluate.yaml"),
        config="evaluate.yaml",
        reads=("eval/plan/**/*", *_HUB),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml", "eval"),
        result=results.plan,
        replaces=_EVALUATION_WRITES,
    ),
    "evaluate embed": Command(
        argv=("diffembed", "evaluate", "embed", "evaluate.yaml"),
        reads=("eval/plan/**/*", "eval/store/**/*.json"),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml", "eval"),
        result=results.blocks,
        replaces=_EVALUATION_WRITES,
    ),
    "evaluate score": Command(
        argv=("diffembed", "evaluate", "score", "scored.yaml"),
        reads=("scored/plan/**/*", "scored/store/**/*"),
        needs=(*_EVALUATION_NEEDS, "scored.yaml", "scored"),
        result=results.stored_scores,
        replaces=("scored/**/*",),
    ),
    "report": Command(
        argv=("diffembed", "report", "evaluate.yaml"),
        config="evaluate.yaml",
        reads=(
            *("eval/**/result.json", "eval/**/mteb/**/*.json", "eval/**/*.jsonl"),
            *("run/metrics.jsonl", "export/README.md", "export/diffembed.json"),
        ),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml", "eval", "run"),
        result=results.report,
        weight=2,
        replaces=("eval/report/*", "eval/mteb/**/*", "export/README.md", "eval/**/*.jsonl"),
    ),
    "probe": Command(
        argv=("diffembed", "probe", "probe.yaml"),
        config="probe.yaml",
        reads=("data/words.txt", "data/words.jsonl"),
        needs=("export", "data"),
        result=results.probe,
    ),
    "rewind": Command(
        argv=("diffembed", "rewind", "run", "step-000001"),
        reads=_CHECKPOINT,
        needs=("run",),
        result=results.pointer,
        replaces=("run/checkpoints/latest",),
    ),
    "stop": Command(
        argv=("diffembed", "stop", "run"),
        reads=("run/config.yaml",),
        needs=("run",),
        result=results.text,
    ),
    "submit --dry-run": Command(
        argv=("diffembed", "submit", "all", "chain.yaml", "--dry-run"),
        config="chain.yaml",
        reads=(
            *("eval/**/result.json", "run/checkpoints/latest", "run/checkpoints/*/state.json"),
            *("shards/manifest.json", "export/diffembed.json", "slurm/cluster.env"),
        ),
        needs=(
            *("run", "shards", "export", "eval", "hub", "prepare.yaml", "train.yaml", "zero.json"),
            *("evaluate.yaml", "slurm", "base", "data"),
        ),
        result=results.finished,
        weight=2,
        fewer=True,
    ),
    "doctor": Command(
        argv=("doctor", "mined-chain.yaml"),
        config="mined-chain.yaml",
        reads=(
            *(*_BASE, _WEIGHTS, *_SHARDS, *_EXPORTED, *_HUB, "pieces/*.json"),
            *("data/rows.jsonl", "data/beir/*.jsonl", "mined/manifest.json"),
        ),
        needs=("data", "run", *_CHAIN),
        result=results.checked,
        lists=True,
    ),
    "doctor train": Command(
        argv=("doctor", "pieced.yaml"),
        config="pieced.yaml",
        reads=("pieces/*.json", *_SHARDS),
        needs=("pieces", "base", "run"),
        result=results.checked,
        lists=True,
    ),
    "watch run": Command(
        argv=("diffembed", "watch", "run", "--once"),  # the chain writes a page, in a second
        reads=("run/metrics.jsonl", "run/*.yaml", "run/*.json", "run/checkpoints/latest"),
        needs=("run",),
        result=results.watched,
    ),
    "watch chain": Command(
        argv=("diffembed", "watch", "mined-chain.yaml", "--once", "--html", "page.html"),
        config="mined-chain.yaml",
        reads=(
            *("eval/**/*.json", "eval/**/*.jsonl", "shards/manifest.json", "mined/manifest.json"),
            *("export/diffembed.json", "run/metrics.jsonl", "run/checkpoints/*/state.json"),
        ),
        needs=(*_EVALUATION_NEEDS, "run", *_CHAIN),
        result=results.watched,
    ),
    "plan run": Command(
        argv=("diffembed", "plan", "run", *_PLANNED),
        config="train.yaml",
        reads=("base/config.json", "shards/manifest.json", "zero.json"),
        needs=("base", "shards"),
        result=results.text,
    ),
    "plan scale": Command(
        argv=("diffembed", "plan", "scale", *_PLANNED),
        config="train.yaml",
        reads=("base/config.json", "shards/manifest.json", "zero.json"),
        needs=("base", "shards"),
        result=results.text,
        weight=0.7,
    ),
    "submit mined --dry-run": Command(
        argv=("diffembed", "submit", "all", "mined-chain.yaml", "--dry-run"),
        config="mined-chain.yaml",
        reads=(*_MINED, "shards/manifest.json", "data/texts.jsonl"),
        needs=(*_EVALUATION_NEEDS, "run", "shards", "data", "slurm", "eval", *_CHAIN),
        result=results.finished,
        fewer=True,
    ),
    "rows": Command(
        argv=(
            *("ReasonAug", "rows", "--generations", "data/generations.jsonl"),
            *("--definitions", "data/definitions.jsonl", "--out", "made/rows.jsonl"),
        ),
        reads=("data/generations.jsonl", "data/definitions.jsonl"),
        result=results.files("made/*"),
    ),
    "replicas": Command(
        argv=(
            *("ReasonAug", "replicas", "--data", "problems", "--out", "made"),
            *("--max-tokens", "256", "--long-queries", "10"),
        ),
        reads=("problems/*",),
        result=results.files("made/**/*.jsonl"),
        weight=0.3,
    ),
}


def run(argv: tuple[str, ...]) -> int:
    """Run a command in this process; its exit code, 1 after a traceback."""
    sys.argv[:] = list(argv)
    try:
        if argv[0] == "train":
            from pipeline.train import main as train

            train()
        elif argv[0] == "doctor":
            return check_config(Path(argv[1]))
        elif argv[0] == "ReasonAug":
            from ReasonAug.__main__ import main as reason

            reason()
        else:
            from pipeline.cli import main as command

            command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def check_config(config: Path) -> int:
    """Run `doctor` without the checks of the machine, which take seconds and read no input."""
    from pipeline.doctor import readiness, run_checks

    findings = list(run_checks({"config": lambda: readiness.check_config(config)}))
    for finding in findings:
        print(f"{finding.level}  {finding.check}: {finding.found} | fix: {finding.fix}")
    return int(any(finding.level == "fail" for finding in findings))


def preload() -> None:
    """Import everything that the commands import, once for all trials."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    forks.import_libraries()


def draw(rng: random.Random) -> str:
    """The name of a command."""
    return rng.choices(list(COMMANDS), [command.weight for command in COMMANDS.values()])[0]
