"""The commands that are tried on damaged inputs: what each one reads, writes and concludes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


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
        replaces: globs of earlier files that it may write anew.
        fewer: its result lists what need not be done again, which may be less after damage.
        any_text: it takes every string of a JSON-lines file, whatever the fields.
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


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _text(folder: Path, output: str) -> Result:
    return {"output": output}


def _finished(folder: Path, output: str) -> Result:
    """What `submit` need not submit any more."""
    lines = [line for line in output.splitlines() if line.startswith("# finished")]
    return {"finished": lines}


def _files(*globs: str) -> Callable[[Path, str], Result]:
    """The bytes of the files that the globs find."""

    def result(folder: Path, output: str) -> Result:
        found = sorted(path for glob in globs for path in folder.glob(glob) if path.is_file())
        return {str(path.relative_to(folder)): digest(path) for path in found}

    return result


def _shards(folder: Path, output: str) -> Result:
    """The manifest without what names the inputs, and every shard."""
    tree = json.loads((folder / "made/manifest.json").read_text())
    kept = {k: tree.get(k) for k in ("num_examples", "num_documents", "groups", "query_lengths")}
    counts = [[s["name"], s["rows"], s["examples"], s["dropped"]] for s in tree["sources"]]
    return {**kept, "sources": counts, **_files("made/*.arrow")(folder, output)}


def _training(run: str) -> Callable[[Path, str], Result]:
    """The numbers of each step and the newest checkpoint's tensors."""

    def result(folder: Path, output: str) -> Result:
        lines = (folder / run / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        machine = ("seconds", "tokens_per_second", "peak_memory_gib")
        timeless = [{k: v for k, v in row.items() if k not in machine} for row in rows]
        newest = (folder / run / "checkpoints/latest").read_text().strip()
        tensors = _files(f"{run}/checkpoints/{newest}/*.safetensors")(folder, output)
        return {"steps": timeless, "newest": newest, **tensors}

    return result


def _export(folder: Path, output: str) -> Result:
    """Weights and settings; the model card holds the config's text as well."""
    files = _files("made/*.safetensors", "made/*.json", "made/1_Pooling/*")(folder, output)
    # What no vector depends on is handed on as it was published.
    published = json.loads((folder / "made/config.json").read_text())
    kept = {key: value for key, value in published.items() if not key.endswith("_token_id")}
    return {**files, "made/config.json": kept}


def _vectors(name: str) -> Callable[[Path, str], Result]:
    """What an Arrow file of vectors holds; its bytes name the input's place."""

    def result(folder: Path, output: str) -> Result:
        import pyarrow as pa

        with pa.OSFile(str(folder / name)) as file:
            table = pa.ipc.open_file(file).read_all()
        values = hashlib.sha256(table["vector"].combine_chunks().flatten().to_numpy().tobytes())
        return {"ids": table["id"].to_pylist(), "vectors": values.hexdigest()[:16]}

    return result


def _scores(folder: Path, output: str) -> Result:
    found = {}
    for path in sorted(folder.glob("eval/**/result.json")):
        tree = json.loads(path.read_text())
        found[str(path.relative_to(folder))] = {k: tree.get(k) for k in ("score", "per_query")}
    return found


def _blocks(folder: Path, output: str) -> Result:
    return _files("eval/**/*.npy")(folder, output)


def _plan(folder: Path, output: str) -> Result:
    found = {}
    for path in folder.glob("eval/plan/*/plan.json"):
        tree = json.loads(path.read_text())
        found[path.parent.name] = {k: tree.get(k) for k in ("num_texts", "num_occurrences")}
    return found


def _report(folder: Path, output: str) -> Result:
    tree = json.loads((folder / "eval/report/report.json").read_text())
    return {key: tree.get(key) for key in ("models", "tasks", "training")}


def _probe(folder: Path, output: str) -> Result:
    tree = json.loads((folder / "probed/probe.json").read_text())
    return {key: value for key, value in tree.items() if key != "config"}


def _pointer(folder: Path, output: str) -> Result:
    return {"latest": (folder / "run/checkpoints/latest").read_text()}


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

COMMANDS: dict[str, Command] = {
    "starter": Command(
        argv=("diffembed", "starter", "starter.yaml"),
        config="starter.yaml",
        reads=("data/rows.jsonl",),
        result=_files("made/*.safetensors", "made/*.json"),
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
        result=_shards,
        weight=3,
    ),
    "prepare again": Command(
        argv=("diffembed", "prepare", "again.yaml"),
        reads=_SHARDS,
        needs=("data", "base", "again.yaml"),
        result=_files("shards/*"),
        weight=0.5,
    ),
    "data inspect": Command(
        argv=("diffembed", "data", "inspect", "shards"),
        reads=(*_SHARDS, *_BASE),
        needs=("base",),
        result=_text,
        replaces=("shards/*.png",),
    ),
    "data verify": Command(
        argv=("diffembed", "data", "verify", "shards"), reads=_SHARDS, result=_text
    ),
    "train --dry-run": Command(
        argv=(*_ZERO, "--dry-run"),
        config="train.yaml",
        reads=(*_SHARDS, *_BASE, "zero.json"),
        needs=("base", "shards", "train.yaml"),
        result=_text,
        weight=3,
    ),
    "train": Command(
        argv=(*_ZERO, "output_dir=made", "num_steps=1", "optimizer.warmup_steps=0"),
        reads=(*_SHARDS, *_BASE, _WEIGHTS, "zero.json"),
        needs=("train.yaml",),
        result=_training("made"),
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
        result=_training("run"),
        weight=2,
        replaces=_MADE_TRAINING,
    ),
    "export": Command(
        argv=("diffembed", "export", "train.yaml", "--output", "made", "--no-check"),
        reads=(*_CHECKPOINT, *_SHARDS, *_BASE, _WEIGHTS, "run/config.yaml"),
        needs=("base", "shards", "train.yaml", "run"),
        result=_export,
        weight=1.5,
    ),
    "export init": Command(
        argv=(
            *("diffembed", "export", "train.yaml", "model.path=pieces"),
            *("--checkpoint", "init", "--output", "made", "--no-check"),
        ),
        reads=("pieces/*.json", "pieces/*.safetensors"),
        needs=("pieces", "shards", "train.yaml", "base"),
        result=_export,
    ),
    "export adapter": Command(
        argv=(
            *("diffembed", "export", "train.yaml", "model.adapter=adapter"),
            *("--checkpoint", "init", "--output", "made", "--no-check"),
        ),
        reads=("adapter/*",),
        needs=("base", "shards", "train.yaml"),
        result=_export,
    ),
    "encode": Command(
        argv=(
            *("diffembed", "encode", "export", "--input", "data/texts.jsonl"),
            *("--output", "vectors.arrow"),
        ),
        reads=(*_EXPORTED, "data/texts.jsonl"),
        result=_vectors("vectors.arrow"),
        weight=2,
    ),
    "encode foreign": Command(
        argv=(
            *("diffembed", "encode", "foreign", "--input", "data/texts.parquet"),
            *("--output", "vectors.arrow"),
        ),
        reads=("foreign/*.json", "foreign/*/*.json", "foreign/*.safetensors", "data/texts.parquet"),
        result=_vectors("vectors.arrow"),
    ),
    "encode on": Command(
        argv=(
            *("diffembed", "encode", "export", "--input", "data/texts.jsonl"),
            *("--output", "begun.arrow"),
        ),
        reads=(".begun.arrow.parts/*",),
        needs=("export", "data"),
        result=_vectors("begun.arrow"),
        replaces=(".begun.arrow.parts/*",),
        weight=0.7,
    ),
    "evaluate run": Command(
        argv=("diffembed", "evaluate", "run", "evaluate.yaml", "output_dir=eval"),
        config="evaluate.yaml",
        reads=(*_HUB, *_EXPORTED),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml"),
        result=_scores,
        replaces=_EVALUATION_WRITES,
    ),
    "evaluate run again": Command(
        argv=("diffembed", "evaluate", "run", "evaluate.yaml"),
        reads=("eval/**/result.json", "eval/**/mteb/**/*.json"),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml", "eval"),
        result=_scores,
        replaces=_EVALUATION_WRITES,
    ),
    "evaluate plan": Command(
        argv=("diffembed", "evaluate", "plan", "evaluate.yaml"),
        config="evaluate.yaml",
        reads=("eval/plan/**/*", *_HUB),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml", "eval"),
        result=_plan,
        replaces=_EVALUATION_WRITES,
    ),
    "evaluate embed": Command(
        argv=("diffembed", "evaluate", "embed", "evaluate.yaml"),
        reads=("eval/plan/**/*", "eval/store/**/*.json"),
        needs=(*_EVALUATION_NEEDS, "evaluate.yaml", "eval"),
        result=_blocks,
        replaces=_EVALUATION_WRITES,
    ),
    "evaluate score": Command(
        argv=("diffembed", "evaluate", "score", "scored.yaml"),
        reads=("scored/plan/**/*", "scored/store/**/*"),
        needs=(*_EVALUATION_NEEDS, "scored.yaml", "scored"),
        result=lambda folder, output: {
            str(path.relative_to(folder)): json.loads(path.read_text())["score"]
            for path in sorted(folder.glob("scored/**/result.json"))
        },
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
        result=_report,
        weight=2,
        replaces=("eval/report/*", "eval/mteb/**/*", "export/README.md", "eval/**/*.jsonl"),
    ),
    "probe": Command(
        argv=("diffembed", "probe", "probe.yaml"),
        config="probe.yaml",
        reads=("data/words.txt", "data/words.jsonl"),
        needs=("export", "data"),
        result=_probe,
    ),
    "rewind": Command(
        argv=("diffembed", "rewind", "run", "step-000001"),
        reads=_CHECKPOINT,
        needs=("run",),
        result=_pointer,
        replaces=("run/checkpoints/latest",),
    ),
    "stop": Command(
        argv=("diffembed", "stop", "run"), reads=("run/config.yaml",), needs=("run",), result=_text
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
        result=_finished,
        weight=2,
        fewer=True,
    ),
    "rows": Command(
        argv=(
            *("ReasonAug", "rows", "--generations", "data/generations.jsonl"),
            *("--definitions", "data/definitions.jsonl", "--out", "made/rows.jsonl"),
        ),
        reads=("data/generations.jsonl", "data/definitions.jsonl"),
        result=_files("made/*"),
    ),
    "replicas": Command(
        argv=(
            *("ReasonAug", "replicas", "--data", "problems", "--out", "made"),
            *("--max-tokens", "256", "--long-queries", "10"),
        ),
        reads=("problems/*",),
        result=_files("made/**/*.jsonl"),
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


def preload() -> None:
    """Import everything that the commands import, once for all trials."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    names = (
        *("torch", "transformers", "deepspeed", "peft", "datasets", "mteb", "matplotlib.pyplot"),
        *("pyarrow.parquet", "pipeline.cli", "pipeline.train", "pipeline.training.trainer"),
        *("pipeline.training.export_run", "pipeline.evaluation.scoring", "ReasonAug.__main__"),
        *("pipeline.evaluation.tables", "pipeline.evaluation.report"),
        *("pipeline.evaluation.embedding_plan", "pipeline.evaluation.embed"),
        *("pipeline.evaluation.encode", "pipeline.evaluation.probe"),
        *("pipeline.model.starter", "pipeline.planning", "pipeline.data.shards"),
        *("pipeline.submission.submit", "pipeline.submission.restart", "pipeline.data.prepare"),
        *("pipeline.evaluation.models", "pipeline.evaluation.datasets"),
        # DeepSpeed imports it with its first engine, and with it torch's compiler.
        "deepspeed.runtime.zero.muon.original_muon",
    )
    for name in names:
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen2")  # keeps its table of all models


def draw(rng: random.Random) -> str:
    """The name of a command."""
    return rng.choices(list(COMMANDS), [command.weight for command in COMMANDS.values()])[0]
