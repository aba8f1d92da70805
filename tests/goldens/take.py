"""Run every kind of command on small inputs and keep what it made, as text or as a hash.

The package is reached by its commands, `pipeline/train.py`, `python -m ReasonAug` and the recipes
alone, so that this folder runs unchanged before and after its modules move.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.goldens.inputs import write_inputs
from tests.goldens.processes import ROOT, Command, Outcome, begin_ranks

# Values that differ from run to run: times, speeds, memory, and hashes of files that hold such.
VOLATILE = {"seconds", "tokens_per_second", "peak_memory_gib", "mteb_files", "results_digest"}
TEXTS = {".md", ".yaml", ".json", ".txt", ".jinja", ".csv", ""}
LINES = {"metrics.jsonl", "dropped.jsonl"}
Values = dict[str, Any]


def stable(value: Any) -> Any:
    """Leave out of a record what differs from run to run."""
    if isinstance(value, dict):
        # The seal of a record covers them as well.
        left_out = VOLATILE | {"sha256"} if VOLATILE & value.keys() else VOLATILE
        return {key: stable(inner) for key, inner in value.items() if key not in left_out}
    return [stable(inner) for inner in value] if isinstance(value, list) else value


class Take:
    """One taking: its folder, and what was found so far by section and name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sections: dict[str, Values] = {}
        for name in ("launch", "slurm", "ds_configs", "pipeline"):
            (folder / name).symlink_to(ROOT / name)

    def plain(self, text: str) -> str:
        """Replace what names this machine, this folder and the modules behind a command."""
        text = text.replace(str(self.folder), "<work>").replace(str(ROOT), "<root>")
        text = text.replace(sys.executable, "<python>").replace(sys.prefix, "<env>")
        text = re.sub(r"-m pipeline\.(?!cli\b)[\w.]+", "-m pipeline.<module>", text)
        text = re.sub(r"^prepare: .*/s\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"\b\d+(\.\d+)? (tokens/s|rows/s|s|ms|min)\b", r"<n> \2", text)
        return re.sub(r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?", "<time>", text)

    def keep(self, section: str, name: str, value: Any) -> None:
        """Keep a value under a name that no other has."""
        values = self.sections.setdefault(section, {})
        assert name not in values, name
        values[name] = value

    def keep_files(
        self, section: str, *globs: str, where: Callable[[Path], bool] = lambda path: True
    ) -> None:
        """Keep the files that the globs find: small texts as they are, everything else as hash."""
        found = {path for glob in globs for path in self.folder.glob(glob) if path.is_file()}
        assert found, globs
        for path in filter(where, sorted(found)):
            name = str(path.relative_to(self.folder))
            is_short = path.stat().st_size < 40_000 or path.suffix == ".json"
            if is_short and (path.suffix in TEXTS or path.name in LINES):
                self.keep(section, name, self._read(path))
            else:
                self.keep(section, name, hashlib.sha256(path.read_bytes()).hexdigest())

    def _read(self, path: Path) -> Any:
        text = path.read_text()
        if path.suffix == ".json":
            return json.loads(self.plain(json.dumps(stable(json.loads(text)))))
        if path.name == "metrics.jsonl":
            return [stable(json.loads(line)) for line in text.splitlines()]
        return self.plain(text)

    def freeze(self, *names: str) -> None:
        """Give files one time of writing: fingerprints of an evaluation's inputs hold it."""
        for name in names:
            for path in (self.folder / name).rglob("*"):
                os.utime(path, (1_000_000_000, 1_000_000_000))

    def write(self, name: str, tree: Any) -> str:
        """Write a config; returns its name."""
        (self.folder / name).write_text(yaml.safe_dump(tree, sort_keys=False))
        return name

    def run(self, *words: str, code: int | None = 0) -> Outcome:
        """Run a command; it must end with `code` unless that is None."""
        return self._ended(Command(self.folder, words), words, code)

    def say(self, section: str, *words: str, name: str = "", code: int | None = 0) -> None:
        """Run a command and keep what it prints."""
        outcome = self.run(*words, code=code)
        printed = f"exit code {outcome.code}\n{outcome.stdout}"
        if outcome.code:
            printed += outcome.stderr
        self.keep(section, name or " ".join(words), self.plain(printed))

    def train(self, *words: str, ranks: int = 2) -> None:
        """Train on gloo ranks of this machine."""
        for command in begin_ranks(self.folder, ("train", *words), ranks):
            self._ended(command, words, 0)

    def _ended(self, command: Command, words: Sequence[str], code: int | None) -> Outcome:
        outcome = command.wait()
        if code is not None and outcome.code != code:
            said = f"{outcome.stdout[-2000:]}\n{outcome.stderr[-4000:]}"
            raise RuntimeError(f"{' '.join(words)}: exit code {outcome.code}\n{said}")
        return outcome


# --- shards ----------------------------------------------------------------------------------

POSITIVE = {"query": "query", "positives": "positive", "negatives": "negative"}
LABELS = {"query": "q.text", "documents": "docs", "labels": "labels"}
LABELLED = {**LABELS, "concept": "of", "instruction": "prompt"}
TRIPLET = {"query": "anchor", "positives": "positive", "negatives": "negative_*"}
CHAT = {"query": "messages", "positives": "answers"}
BRIGHT = "data/bright/documents/biology.jsonl"


def _sources() -> Iterator[dict[str, Any]]:
    """Yield a source of every format, in every kind of file."""
    kinds = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "feather", "arrow")
    files = [f"rows.{kind}" for kind in kinds]
    files += [f"packed/rows.csv.{kind}" for kind in ("gz", "bz2", "xz", "zst")]
    for file in (*files, "folder", "fold*r/train.jsonl"):
        name = re.sub(r"\W", "-", file)
        yield {"name": name, "format": "columns", "path": f"data/{file}", "columns": POSITIVE,
               "instruction": "Find the place"}  # fmt: skip
    for name, columns in (("triplets.parquet", TRIPLET), ("labels.jsonl", LABELLED),
                          ("chats.jsonl", CHAT)):  # fmt: skip
        path = f"data/{name}"
        yield {"name": path[5:], "format": "columns", "path": path, "columns": columns}
    yield {"name": "german", "format": "columns", "path": "data/labels.jsonl", "columns": LABELS,
           "where": {"lang": "de"}, "weight": 2.0}  # fmt: skip
    yield {"name": "bad", "format": "columns", "path": "data/bad.jsonl", "columns": POSITIVE,
           "on_bad_row": "drop", "require_negatives": True}  # fmt: skip
    for name in ("near.jsonl", "saved"):
        yield {"name": name, "format": "columns", "path": f"data/{name}", "columns": POSITIVE}
    yield {"name": "lines", "format": "lines", "path": "data/texts.txt", "max_rows": 9}
    yield {"name": "texts", "format": "lines", "path": "data/texts.jsonl"}
    for name in ("beir", "tables"):
        yield {"name": name, "format": "mteb", "path": f"data/{name}", "max_negatives": 1}
    yield {"name": "e5", "format": "e5", "path": "data/e5"}
    yield {"name": "ms", "format": "msmarco_instructions", "path": "data/msmarco.jsonl"}
    yield {"name": "reasonaug", "format": "reasonaug", "path": "problems/train.jsonl",
           "max_rows": 20}  # fmt: skip
    yield {"name": "vl", "format": "reasonir_vl", "path": "data/vl.jsonl"}
    yield {"name": "hq", "format": "reasonir_hq", "path": "data/hq.jsonl", "documents": BRIGHT}


def _prepare_config(name: str, sources: Iterable[dict[str, Any]], **more: Any) -> dict[str, Any]:
    lengths = {"max_query_length": 32, "max_document_length": 48}
    return {"output_dir": f"shards/{name}", "tokenizer": "base", "sources": list(sources),
            **lengths, "shard_bytes": 4096, "block_bytes": 1024, **more}  # fmt: skip


def take_data(take: Take) -> None:
    """Synthetic data, the starter, and shards of every format by one and by three workers."""
    took = ("--problems-per-concept", "8", "--max-tokens", "300")
    take.run("ReasonAug", "templates", "--out", "problems", *took)
    given = ("--data", "problems", "--out")
    take.run("ReasonAug", "replicas", *given, "replicas", "--max-tokens", "256")
    take.run("ReasonAug", "texts", *given[:2], "--num-long", "16", "--max-tokens", "128")
    take.run("ReasonAug", "long", *given[:2], "--rows", "16", "--max-tokens", "256")
    take.keep_files("ReasonAug", "problems/**/*", "replicas/**/*")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    starter = {"output_dir": "base", "corpus": ["data/corpus.jsonl"], **sizes}
    take.run("diffembed", "starter", take.write("starter.yaml", starter))
    take.keep_files("starter", "base/*")
    sources = list(_sources())
    columns = {"format": "columns", "columns": POSITIVE}
    scored = {"name": "scored", "path": "data/scored.jsonl", **columns}
    scored["columns"] = {**POSITIVE, "scores": "scores"}
    bench = {"name": "bench", "path": "data/bench.jsonl"}
    cleaned = {
        "decontaminate": {"sets": [bench], "ngram": 8, "max_overlap": 0.5, "max_ratio": 0.99},
        "near_duplicates": 0.8, "reuse": "shards/all",
        "template": {"query": "[{instruction}] {text} !", "document": "d: {text} ."},
    }  # fmt: skip
    datasets = {
        "all": _prepare_config("all", sources),
        "clean": _prepare_config("clean", sources[:20], **cleaned),
        "scored": _prepare_config("scored", [scored], append_eos=True),
        "plain": _prepare_config(
            "plain", [{"name": "t", "format": "lines", "path": "data/texts.txt"}]
        ),
        "many": _prepare_config(
            "many", [{"name": "many", "path": "data/many.jsonl", **columns}],
            shard_bytes=2**24, block_bytes=2**24,
        ),
    }  # fmt: skip
    # One core, one worker.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    for name, config in datasets.items():
        take.run("diffembed", "prepare", take.write(f"prepare-{name}.yaml", config))
    os.sched_setaffinity(0, cores)
    three = take.write("prepare-three.yaml", {**datasets["all"], "output_dir": "shards/three"})
    ranks = ("mpirun", "-n", "3", "--allow-run-as-root", "--oversubscribe")
    subprocess.run(
        [*ranks, sys.executable, "-m", "pipeline.cli", "prepare", three],
        check=True, cwd=take.folder, capture_output=True,
    )  # fmt: skip
    take.keep_files("shards", "shards/*/*", where=lambda path: path.name != "recipe.json")
    take.say("shards", "diffembed", "data", "inspect", "shards/all")
    take.say("shards", "diffembed", "data", "verify", "shards/three")


# --- training --------------------------------------------------------------------------------

TRAINING: dict[str, Any] = {
    "num_steps": 3,
    "seed": 7,
    "model": {"path": "base", "dtype": "float32", "attention": "bidirectional"},
    "data": {"path": "shards/all", "global_batch_size": 16, "homogeneous": "none"},
    "chunks": {"max_tokens": 160, "min_chunks": 2},
    "loss": {"temperature": 0.1},
    "optimizer": {"lr": 1.0e-3, "warmup_steps": 1},
    "checkpoint": {"every": 3, "keep_last": 1},
}
LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
TOKENS = {"path": "shards/plain", "global_batch_size": 8, "block_length": 16}
# Name: ZeRO stage, and what differs from TRAINING.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    **{
        f"zero{stage}-{schedule}": (stage, {"schedule": schedule})
        for stage in (1, 2, 3)
        for schedule in ("cache", "sweep")
    },
    "plain": (1, {"schedule": "plain",
                  "data": {"global_batch_size": 2, "homogeneous": "instruction"}}),
    "lora-cache": (2, {"schedule": "cache", "model": LORA}),
    "lora-sweep": (3, {"schedule": "sweep", "model": LORA}),
    "causal": (2, {
        "schedule": "cache", "non_finite": "skip",
        "model": {"attention": "causal", "pooling": "last_token", "pool_instruction": False,
                  "attention_dropout": 0.1, "gradient_checkpointing": True,
                  "rope_scaling": {"kind": "yarn", "factor": 2.0}},
        "data": {"num_hard_negatives": 2, "mixture_temperature": 2.0, "weights": {"e5.nq": 3.0}},
        "loss": {"similarity": "scaled_dot", "temperature": 1.0, "negatives": "own"},
    }),
    "terms": (1, {
        "schedule": "cache", "data": {"path": "shards/scored", "homogeneous": "source"},
        "chunks": {"keep_graphs": 1},
        "loss": {"matryoshka_dims": [8, 16], "symmetric": True, "learn_temperature": True,
                 "false_negative_margin": 0.1, "distillation": {"weight": 0.3}},
    }),
    "mntp": (2, {"schedule": "cache", "loss": None, "objective": {"mntp": {}}, "data": TOKENS}),
    "diffusion": (3, {"schedule": "sweep", "loss": None, "data": TOKENS,
                      "objective": {"masked_diffusion": {}}}),
    "next-token": (1, {"loss": None, "objective": {"next_token": {}}, "data": TOKENS,
                       "schedule": "cache", "model": {"attention": "causal"}}),
    "bfloat16": (3, {"schedule": "cache", "model": {"dtype": "bfloat16"}}),
    "killed": (3, {"schedule": "cache", "num_steps": 12, "checkpoint": {"every": 4}}),
    "moved": (1, {"schedule": "cache", "num_steps": 2, "optimizer": {"decay_steps": 4}}),
}  # fmt: skip


def _write_run(take: Take, name: str, stage: int, changes: dict[str, Any]) -> tuple[str, ...]:
    """Write the config of a run; returns the arguments of its training."""
    tree = {"output_dir": f"runs/{name}", **TRAINING}
    for key, value in changes.items():
        tree[key] = {**TRAINING.get(key, {}), **value} if isinstance(value, dict) else value
    tree = {key: value for key, value in tree.items() if value is not None}
    path = take.write(f"train-{name}.yaml", tree)
    return path, "--deepspeed", f"ds_configs/zero{stage}.json"


def take_training(take: Take) -> None:
    """Metrics and checkpoints of every stage, schedule and objective, also when cut short."""
    for name, (stage, changes) in RUNS.items():
        words = _write_run(take, name, stage, changes)
        if name == "killed":
            _kill_after_a_checkpoint(take, words)
        take.train(*words)
        print(f"  {name}", flush=True)
    # The same run on one rank of another stage.
    take.train("train-moved.yaml", "--deepspeed", "ds_configs/zero3.json", "num_steps=4", ranks=1)
    take.say("training", "diffembed", "rewind", "runs/killed", "step-000012")
    take.say("training", "diffembed", "stop", "runs/killed")
    words = ("--nproc-per-node=2", "--standalone", "pipeline/train.py", "train-zero2-cache.yaml")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words,
         "--deepspeed", "ds_configs/zero2.json", "output_dir=runs/torchrun"],
        check=True, cwd=take.folder, capture_output=True,
    )  # fmt: skip
    files = ("config.yaml", "ds_config.json", "metrics.jsonl", "kinds.json", "checkpoints/**/*")
    take.keep_files("training", *(f"runs/*/{name}" for name in files))
    for nodes, name in ((1, "zero3-cache"), (8, "mntp")):
        words = (f"train-{name}.yaml", "--deepspeed", "ds_configs/zero3.json")
        more = ("--nodes", str(nodes), "--gpus-per-node", "8", "--gpu", "l40s")
        take.say("training", "diffembed", "plan", "run", *words, *more)
    loss = ("--queries", "65536", "--documents", "131072", "--world-size", "64")
    take.say("training", "diffembed", "plan", "loss", *loss)


def _kill_after_a_checkpoint(take: Take, words: tuple[str, ...]) -> None:
    ranks = begin_ranks(take.folder, ("train", *words), 2)
    latest = take.folder / "runs/killed/checkpoints/latest"
    while not latest.exists() and ranks[0].is_alive:
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.wait()


# --- exports and scores ----------------------------------------------------------------------


def take_exports(take: Take) -> None:
    """Exports of full, LoRA and token-prediction runs, vectors of texts, and word tags."""
    last = ("--no-check", "--output")
    # Each as another library reads it, for one of them.
    take.run("diffembed", "export", "train-zero3-cache.yaml")
    for name in ("lora-cache", "mntp", "causal", "terms"):
        take.run("diffembed", "export", f"train-{name}.yaml", *last, f"exports/{name}")
    take.run(
        "diffembed", "export", "train-lora-sweep.yaml", "--adapter-only", *last, "exports/adapter"
    )
    shutil.move(take.folder / "runs/zero3-cache/export", take.folder / "exports/full")
    init = ("--checkpoint", "init", *last, "exports/init")
    take.run("diffembed", "export", "train-zero3-cache.yaml", *init)
    take.keep_files("exports", "exports/**/*")
    # The recipe of an encoding holds times of writing.
    take.freeze("exports", "data")
    for suffix, more in {
        "arrow": (),
        "parquet": ("--role", "query", "--instruction", "Find", "--dtype", "float16"),
        "npy": ("--dim", "8", "--max-length", "12", "--precision", "float32"),
    }.items():
        given = ("--input", "data/texts.jsonl", "--output", f"vectors/t.{suffix}", *more)
        take.run("diffembed", "encode", "exports/full", *given, "--processes", "1")
    take.keep_files("vectors", "vectors/t*")
    probe = {"output_dir": "probed", "model": "exports/full", "train": "data/words.txt",
             "test": "data/words.txt", "task": "chunk", "num_epochs": 2}  # fmt: skip
    take.run("diffembed", "probe", take.write("probe.yaml", probe))
    take.keep_files("vectors", "probed/*")


def take_evaluation(take: Take) -> None:
    """Scores of two exports on own tasks and a replica, task by task and from shared texts."""
    take.freeze("exports", "data", "hub", "replicas")
    task = "BrightBiologyRetrieval"
    wording = {"template": {"query": "{instruction} {text}", "document": "{text}"}}
    models = [{"name": "untrained", "path": "exports/init"},
              {"name": "trained", "path": "exports/full", "instructions": {task: "Find it"}},
              {"name": "causal", "path": "exports/causal", **wording}]  # fmt: skip
    own = {"name": "mine", "path": "data/beir"}
    config = {"output_dir": "scores", "models": models, "tasks": [own, task], "snapshots": "hub",
              "max_length": 48, "max_tokens": 2048, "lengths": {"mine": [16, 48]},
              "training_run": "runs/zero3-cache"}  # fmt: skip
    replicas = ["Core17InstructionRetrieval", "LEMBPasskeyRetrieval"]
    first = take.write("evaluate.yaml", config)
    shared = {**config, "output_dir": "shared", "tasks": replicas, "snapshots": "replicas",
              "max_length": 64, "lengths": {}, "models": [models[0], models[2]]}  # fmt: skip
    second = take.write("shared.yaml", shared)
    take.say("evaluation", "diffembed", "evaluate", "count", first)
    take.run("diffembed", "evaluate", "run", first)
    take.run("diffembed", "evaluate", "plan", second)
    take.run("diffembed", "evaluate", "embed", second, "--processes", "1")
    take.run("diffembed", "evaluate", "score", second)
    for path in (first, second):
        take.run("diffembed", "report", path)
    take.keep_files("evaluation", "scores/**/result.json", "shared/**/result.json",
                    "shared/plan/**/*", "*/report/*.json", "*/report/*.md",
                    "*/report/*.csv")  # fmt: skip


# --- recipes, help, wording ------------------------------------------------------------------


def _recipes(*folders: str) -> list[str]:
    found = (path for f in folders for path in (ROOT / "launch/recipes" / f).rglob("*.yaml"))
    return sorted(str(path.relative_to(ROOT)) for path in found if path.stem != "common")


def take_recipes(take: Take) -> None:
    """Resolved config, plan and batch scripts of every recipe."""
    local = ("data.path=shards/many", "model.path=base", "model.adapter=null",
             "model.adapter_use=merge", "model.merged_adapters=[]", "model.revision=null",
             "data.weights={}")  # fmt: skip
    single = [name for name in _recipes(".") if name.endswith("/train.yaml") or "pretrain" in name]
    token = [f"launch/recipes/miniature/{k}.yaml" for k in ("autoregressive", "diffusion")]
    for name in (*_recipes("published", "baselines"), *single, *token):
        planned = ("--dry-run", "--world-size", "8", "--deepspeed", "ds_configs/zero3.json")
        take.say("configs", "train", name, *local, *planned, name=name, code=None)
        # Nothing is changed here: its file names hold the hash of the whole config.
        take.say("submission", "diffembed", "submit", "export", name, "--dry-run", code=None)
        take.say("submission", "diffembed", "submit", "train", name, *local, "--dry-run",
                 name=f"submit train {name}", code=None)  # fmt: skip
    for name in (n for n in _recipes(".") if n.endswith("/data.yaml") or "/recipes/data/" in n):
        take.say("submission", "diffembed", "submit", "prepare", name, "--dry-run", code=None)
    for name in (n for n in _recipes(".") if "evaluate" in n):
        tree = yaml.safe_load((ROOT / name).read_text())
        for model in tree.get("models", []):
            export = take.folder / model["path"]
            export.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                export.symlink_to(take.folder / "exports/full")
        take.say("submission", "diffembed", "submit", "evaluate", name, "--dry-run", code=None)
    chain = "launch/recipes/quickstart/chain.yaml"
    take.say("submission", "diffembed", "submit", "all", chain, "--after", "77", "--dry-run")
    flags = ("--sbatch", "--nodes=4 --account=me", "--texts", "3", "--dry-run")
    take.say("submission", "diffembed", "submit", "evaluate", "shared.yaml", *flags)


def take_help(take: Take) -> None:
    """The help of every command and of every command below it."""
    waiting = [("diffembed",), ("ReasonAug",), ("train",)]
    while waiting:
        words = waiting.pop()
        outcome = take.run(*words, "--help")
        take.keep("help", " ".join(words), take.plain(outcome.stdout))
        listed = outcome.stdout.partition("Commands ─")[2]
        waiting += [(*words, name) for name in re.findall(r"^│ (\w[\w-]*) ", listed, re.MULTILINE)]


def take_wording(take: Take) -> None:
    """One line and an exit code for typical mistakes; these may change on purpose."""
    bad = {"name": "bad", "format": "columns", "path": "data/bad.jsonl", "columns": POSITIVE}
    take.write("bad-rows.yaml", _prepare_config("bad", [bad]))
    (take.folder / "twice.yaml").write_text("output_dir: a\noutput_dir: b\n")
    train = ("train", "train-plain.yaml", "--deepspeed", "ds_configs/zero1.json")
    prepare, other = ("diffembed", "prepare"), "output_dir=runs/other"
    for words in (
        (*prepare, "absent.yaml"),
        (*prepare, "twice.yaml"),
        (*prepare, "bad-rows.yaml"),
        (*prepare, "prepare-all.yaml", "max_query_length=2"),
        (*prepare, "prepare-all.yaml", "max_query_lenght=20"),
        (*prepare, "prepare-plain.yaml", "max_query_length=31"),
        (*train, other, "data.path=absent"),
        (*train, other, "optimizer.lr=fast"),
        (*train, other, "loss.temperature=0"),
        (*train, other, "data.global_batch_size=100000"),
        (*train, "seed=8"),
        ("train", "train-plain.yaml", "--deepspeed", "absent.json"),
        ("diffembed", "export", "train-plain.yaml", "--checkpoint", "step-000777"),
        ("diffembed", "rewind", "runs/plain", "step-000777"),
        ("diffembed", "stop", "absent"),
        ("diffembed", "encode", "data", "--input", "data/texts.jsonl", "--output", "v.npy"),
        ("diffembed", "evaluate", "run", "evaluate.yaml", "tasks=[Absent]"),
        ("diffembed", "submit", "train", "train-plain.yaml", "--sbatch", "nodes", "--dry-run"),
    ):
        take.say("wording", *words, code=None)


SECTIONS: tuple[Callable[[Take], None], ...] = (
    *(take_data, take_help, take_training, take_exports),
    *(take_evaluation, take_recipes, take_wording),
)


def take_all(folder: Path) -> dict[str, Values]:
    """Run everything in an empty folder; returns what was made by section and name."""
    take = Take(folder)
    write_inputs(folder)
    for section in SECTIONS:
        began = os.times()
        section(take)
        used = [after - before for before, after in zip(began, os.times(), strict=True)]
        print(f"{section.__name__}: {sum(used[:4]):.0f} s of CPU, {used[4]:.0f} s", flush=True)
    return take.sections
