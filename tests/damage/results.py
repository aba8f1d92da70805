"""Results of commands, read from their folder and output, for comparison between two runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def text(folder: Path, output: str) -> Result:
    return {"output": output}


def finished(folder: Path, output: str) -> Result:
    """Stages that `submit` skips because they are finished."""
    lines = [line for line in output.splitlines() if line.startswith("# finished")]
    return {"finished": lines}


def files(*globs: str) -> Callable[[Path, str], Result]:
    """The bytes of the files that the globs find."""

    def result(folder: Path, output: str) -> Result:
        found = sorted(path for glob in globs for path in folder.glob(glob) if path.is_file())
        return {str(path.relative_to(folder)): digest(path) for path in found}

    return result


def shards(folder: Path, output: str) -> Result:
    """The manifest without what names the inputs, and every shard."""
    tree = json.loads((folder / "made/manifest.json").read_text())
    kept = {k: tree.get(k) for k in ("num_examples", "num_documents", "groups", "query_lengths")}
    counts = [[s["name"], s["rows"], s["examples"], s["dropped"]] for s in tree["sources"]]
    return {**kept, "sources": counts, **files("made/*.arrow")(folder, output)}


def training(run: str) -> Callable[[Path, str], Result]:
    """The numbers of each step and the newest checkpoint's tensors."""

    def result(folder: Path, output: str) -> Result:
        lines = (folder / run / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        machine = ("seconds", "tokens_per_second", "peak_memory_gib")
        timeless = [{k: v for k, v in row.items() if k not in machine} for row in rows]
        newest = (folder / run / "checkpoints/latest").read_text().strip()
        tensors = files(f"{run}/checkpoints/{newest}/*.safetensors")(folder, output)
        return {"steps": timeless, "newest": newest, **tensors}

    return result


def export(folder: Path, output: str) -> Result:
    """Weights and settings; the model card holds the config's text as well."""
    found = files("made/*.safetensors", "made/*.json", "made/1_Pooling/*")(folder, output)
    # Files that no vector depends on are copied as they were published.
    published = json.loads((folder / "made/config.json").read_text())
    kept = {key: value for key, value in published.items() if not key.endswith("_token_id")}
    return {**found, "made/config.json": kept}


def vectors(name: str) -> Callable[[Path, str], Result]:
    """Contents of an Arrow file of vectors; its bytes also hold the path of the input."""

    def result(folder: Path, output: str) -> Result:
        import pyarrow as pa

        with pa.OSFile(str(folder / name)) as file:
            table = pa.ipc.open_file(file).read_all()
        values = hashlib.sha256(table["vector"].combine_chunks().flatten().to_numpy().tobytes())
        return {"ids": table["id"].to_pylist(), "vectors": values.hexdigest()[:16]}

    return result


def scores(folder: Path, output: str) -> Result:
    found = {}
    for path in sorted(folder.glob("eval/**/result.json")):
        tree = json.loads(path.read_text())
        found[str(path.relative_to(folder))] = {k: tree.get(k) for k in ("score", "per_query")}
    return found


def stored_scores(folder: Path, output: str) -> Result:
    """Scores of a plan whose texts were embedded before."""
    found = sorted(folder.glob("scored/**/result.json"))
    return {str(path.relative_to(folder)): json.loads(path.read_text())["score"] for path in found}


def blocks(folder: Path, output: str) -> Result:
    return files("eval/**/*.npy")(folder, output)


def plan(folder: Path, output: str) -> Result:
    found = {}
    for path in folder.glob("eval/plan/*/plan.json"):
        tree = json.loads(path.read_text())
        found[path.parent.name] = {k: tree.get(k) for k in ("num_texts", "num_occurrences")}
    return found


def report(folder: Path, output: str) -> Result:
    tree = json.loads((folder / "eval/report/report.json").read_text())
    return {key: tree.get(key) for key in ("models", "tasks", "training")}


def probe(folder: Path, output: str) -> Result:
    tree = json.loads((folder / "probed/probe.json").read_text())
    return {key: value for key, value in tree.items() if key != "config"}


def pointer(folder: Path, output: str) -> Result:
    return {"latest": (folder / "run/checkpoints/latest").read_text()}


def watched(folder: Path, output: str) -> Result:
    """Steps, checkpoints and stages of what is shown, without times."""
    shown = "step .*|checkpoint .*|(?:prepare|mine|train|export-latest|evaluate|report) +[a-z]+"
    lines = re.findall(rf"^ *({shown})", output, re.MULTILINE)
    # Tables pad their cells to the widest, which may be a time.
    return {"shown": [re.sub(r", [^,;]* old", "", line).rstrip() for line in lines]}


def checked(folder: Path, output: str) -> Result:
    """The checks of a doctor; not its numbers, of which free disk space is one."""
    return {"checks": re.findall(r"^(?:ok|warn) +[^:]+", output, re.MULTILINE)}
