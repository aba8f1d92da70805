"""The verdict on one trial: refused in one line, harmless, another legal input, or a fault."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from tests.damage.commands import Command
from tests.damage.damages import Damage, value_at
from tests.damage.processes import Ended
from tests.damage.results import digest

RIGHT = ("refused", "same", "told", "legal")
_ERROR = re.compile(r"^[A-Z][A-Za-z]*Error: ")
# The advice: usually after `fix:`, in a sentence after a step that is not finite.
_CURE = re.compile(r"fix: |allowed: |lower optimizer\.lr")
# Messages of commands that continue without something, or do it again.
_TOLD = re.compile(
    r"no samples|no line of|left out|again|missing|damaged|does not exist|does not say|\| fix: "
)
# Printed without the file's name: counts of dropped rows by reason, ids that are missing,
# generations without a verdict, and a checkpoint that its log does not reach.
_COUNTED = re.compile(
    r"no positive left|query without text|no record has an id|no_verdict|steps ahead of metrics"
)
# Files that people edit, or that others wrote: a key has a default, a value may be another.
_OPEN = ("base/", "pieces/", "adapter/", "export/", "foreign/", "hub/", "zero.json", "slurm/")
# Keys that transformers writes into tokenizer_config.json and never reads.
_UNREAD = {"backend"}
_KINDS = {
    "starter.yaml": "StarterConfig",
    "prepare.yaml": "PrepareConfig",
    "train.yaml": "TrainConfig",
    "evaluate.yaml": "EvaluateConfig",
    "probe.yaml": "ProbeConfig",
    "mine.yaml": "MineConfig",
    "mined-chain.yaml": "ChainConfig",
    "taught.yaml": "TrainConfig",
    "pieced.yaml": "TrainConfig",
    "chain.yaml": "ChainConfig",
}


def snapshot(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path within the folder."""
    return {
        str(path.relative_to(folder)): digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def judge(
    command: Command,
    damage: Damage,
    ended: Ended,
    *,
    whole: Path,
    folder: Path,
    before: dict[str, str],
    wanted: dict[str, Any],
) -> tuple[str, str]:
    """Outcome of a trial and what is to be said about it.

    Args:
        command: what was run.
        damage: what was done to its input.
        ended: how it ended.
        whole: the undamaged world.
        folder: the trial's folder after the run.
        before: digests of the trial's files before the run.
        wanted: what the command concludes where nothing is damaged.
    """
    text = ended.stdout + ended.stderr
    last = (ended.stderr.strip().splitlines() or [""])[-1][:300]
    if ended.code is None:
        return ("legal", "runs long") if _runs_long(damage) else ("out of time", last)
    if "Traceback (most recent call last)" in text:
        return "traceback", last
    if ended.code == command.code:
        return _judge_success(command, damage, ended, whole=whole, folder=folder, wanted=wanted)
    if command.lists and ended.code == 1:
        return _judge_list(damage, ended, folder=folder)
    if ended.code not in (1, 2):
        return "killed", f"exit code {ended.code}: {last}"
    return _judge_refusal(command, damage, ended, folder=folder, before=before)


def _judge_success(
    command: Command,
    damage: Damage,
    ended: Ended,
    *,
    whole: Path,
    folder: Path,
    wanted: dict[str, Any],
) -> tuple[str, str]:
    try:
        found = command.result(folder, ended.stdout)
    except Exception as error:
        found = {"no result": repr(error)[:200]}
    if json.dumps(found) == json.dumps(wanted):
        return "same", ""
    if command.fewer and all(set(found[key]) <= set(wanted[key]) for key in wanted):
        return "told", "less is finished"
    if is_legal(damage, whole=whole, folder=folder, any_text=command.any_text):
        return "legal", ""
    lines = (ended.stdout + ended.stderr).splitlines()
    for line in lines:
        named = Path(damage.file).name in line or "no samples: " in line
        if (named and _TOLD.search(line)) or _COUNTED.search(line):
            return "told", line[:300]
    different = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    return "silent", f"another {', '.join(different[:4])}: {str(found.get(different[0]))[:120]}"


def _judge_refusal(
    command: Command, damage: Damage, ended: Ended, *, folder: Path, before: dict[str, str]
) -> tuple[str, str]:
    lines = [line for line in ended.stderr.splitlines() if _ERROR.match(line)]
    last = (ended.stderr.strip().splitlines() or [""])[-1][:300]
    if len(lines) != 1:
        return "no single line", f"exit code {ended.code}: {last}"
    named = any(name in lines[0] for name in _names(damage)) or _tells_value(damage, lines[0])
    # A value that is right by itself may be wrong for what is there, which then is named.
    if not named and not (damage.key and _is_right_by_itself(damage, lines[0], folder)):
        return "unnamed", lines[0][:300]
    if not _CURE.search(lines[0]):
        return "no cure", lines[0][:300]
    lost = [
        name
        for name, was in before.items()
        if not any(Path(name).match(glob) for glob in command.replaces)
        and (not (folder / name).is_file() or digest(folder / name) != was)
    ]
    return ("lost", f"{lost[:3]} after {lines[0][:200]}") if lost else ("refused", lines[0][:300])


def _judge_list(damage: Damage, ended: Ended, *, folder: Path) -> tuple[str, str]:
    """Faults are lines, of which one names the damage; none is a fault of the check itself."""
    lines = [line for line in ended.stdout.splitlines() if line.startswith("fail ")]
    if broken := [line for line in lines if "the check itself failed" in line]:
        return "traceback", broken[0][:300]
    for line in lines:
        named = any(name in line for name in _names(damage)) or _tells_value(damage, line)
        if named or (damage.key and _is_right_by_itself(damage, line, folder)):
            return "refused", line[:300]
    return "unnamed", lines[0][:300]


def _names(damage: Damage) -> set[str]:
    """Words one of which a line must hold to point at the damage."""
    path = Path(damage.file)
    # A command line names one DeepSpeed JSON; its keys are named without the file.
    if path.suffix == ".npy":
        return {path.name, "blocks are not embedded"}
    if path.name == "zero.json":
        return {path.name, "DeepSpeed config", "zero_optimization"}
    names = {path.name}
    if path.name == "config.json":
        # A size that no machine holds.
        names.add("auto found none that fits")
    if path.suffix == ".safetensors":
        # Weights out of all proportion are known by their gradient only.
        names.add("gradient norm is")
    if path.name.startswith("tokenizer") or path.name == "special_tokens_map.json":
        # Shards that other tokens were made for are told so, whatever the token.
        names.add("another tokenizer")
    if not damage.key:
        # A folder is named where its files only make sense together.
        names |= {str(parent) for parent in path.parents if str(parent) != "."}
        return names
    own = [str(part) for part in damage.key if not isinstance(part, int)]
    if damage.kind == "key added":
        return {"surprise"}
    return {own[-1], *(names - {path.name})} if own else names


def _is_right_by_itself(damage: Damage, line: str, folder: Path) -> bool:
    """Return True if a config is valid after the damage, or breaks a rule about another key."""
    from pipeline.errors import UserError

    if damage.kind == "key dropped":
        return damage.file in line or _loads(damage, folder)
    try:
        return damage.kind == "key junk" and _is_taken(damage, folder)
    except UserError:
        return False


def _loads(damage: Damage, folder: Path) -> bool:
    import pipeline.config as kinds
    from pipeline.errors import UserError

    try:
        kinds.load_config(getattr(kinds, _KINDS[damage.file]), folder / damage.file)
    except UserError:
        return False
    return True


def _tells_value(damage: Damage, line: str) -> bool:
    """Return True if a line shows the value that a key was given, such as a missing path."""
    value = str(damage.value).replace("\n", " ").strip()[:80]
    value = str(Path.home()) if value == "~" else value
    return bool(damage.key) and (f" {value}: " in line or (len(value) > 1 and value in line))


def _runs_long(damage: Damage) -> bool:
    """Return True if the value is a number of steps or texts that takes hours."""
    return isinstance(damage.value, int | float) and damage.value >= 10**6


def is_legal(damage: Damage, *, whole: Path, folder: Path, any_text: bool = False) -> bool:
    """Return True if the damaged input is another valid input."""
    now, was = folder / damage.file, whole / damage.file
    if damage.key or damage.kind.startswith("key "):
        if damage.file in _KINDS:
            return _is_taken(damage, folder)
        return damage.file.startswith(_OPEN)
    if not now.is_file():
        # Without this file, an export is a sentence-transformers folder like any other.
        return damage.file == "export/diffembed.json" and damage.kind == "deleted"
    if now.suffix == ".json":
        open_ = damage.file.startswith(_OPEN)
        return _same_kinds(_parse(was), _parse(now), open_) and open_
    if now.name == "metrics.jsonl":
        return _is_log(now)
    if now.suffix == ".jsonl":
        return _lines_fit(was, now, any_text=any_text)
    if now.suffix == ".tsv":
        return _table_fits(now)
    if now.suffix == ".parquet":
        return _columns_fit(was, now)
    if now.suffix == ".safetensors":
        return damage.file.startswith(_OPEN) and _headers_equal(was, now)
    if now.suffix in (".md", ".env", ".txt", ".model"):
        return damage.file.startswith((*_OPEN, "data/"))
    return now.name == "config.yaml"


def _is_taken(damage: Damage, folder: Path) -> bool:
    """Return True if the resolved config holds the value that the file gives."""
    import pipeline.config as kinds

    kind = getattr(kinds, _KINDS[damage.file])
    resolved: Any = kinds.as_tree(kinds.load_config(kind, folder / damage.file))
    if damage.kind == "key dropped":
        return True  # the key has a default, which the resolved config shows
    if damage.kind != "key junk":
        return False
    try:
        taken = value_at(resolved, damage.key)
    except (KeyError, IndexError, TypeError):
        return False
    return _equal(damage.value, taken)


def _equal(given: Any, taken: Any) -> bool:
    if isinstance(given, bool) or isinstance(taken, bool) or given is None or taken is None:
        return given is taken
    if isinstance(given, int | float) and isinstance(taken, int | float):
        return math.isclose(given, taken)
    if isinstance(given, str) and isinstance(taken, int | float):
        return float(given) == taken
    if isinstance(given, dict):
        return isinstance(taken, dict) and all(_equal(v, taken.get(k)) for k, v in given.items())
    if isinstance(given, list):
        return isinstance(taken, list) and list(map(str, given)) == list(map(str, taken))
    paths = {"": ".", "~": str(Path.home())}
    return str(taken) in (str(given), paths.get(str(given)))


def _parse(path: Path) -> Any:
    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError, OSError):
        return ...


def _same_kinds(was: Any, now: Any, open_: bool) -> bool:
    """Return True if two trees differ only in values of the same kind; open ones also in keys."""
    if now is ... or was is ...:
        return False
    if isinstance(was, dict) and isinstance(now, dict):
        if not open_ and was.keys() != now.keys():
            return False
        if isinstance(now.get("id"), int | str) and not isinstance(now["id"], bool):
            was = {**was, "id": now["id"]}  # any text or whole number is an id
        if now.get("negative", ...) is None:
            was = {**was, "negative": None}  # a row without negatives
        read = (was.keys() & now.keys()) - _UNREAD
        return all(_same_kinds(was[key], now[key], open_) for key in read)
    if isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            return open_
        return all(_same_kinds(a, b, open_) for a, b in zip(was, now, strict=True))
    if was is None or now is None:
        return open_ or was is now
    return type(was) is type(now) or {type(was), type(now)} == {int, float}


def _lines_fit(was: Path, now: Path, *, any_text: bool) -> bool:
    """Return True if every line is an object with the fields and kinds that lines had before."""
    try:
        lines = now.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        return False
    rows = [json.loads(line) for line in was.read_text().splitlines()]
    found = []
    for line in lines:
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError:
            return False
    if not found:
        return False
    if not any(isinstance(line, dict) and "id" in line for line in found):
        # Ids may be left out of all lines.
        rows = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    return any_text or all(any(_same_kinds(row, new, False) for row in rows) for new in found)


def _is_log(path: Path) -> bool:
    """Return True if every line has a step; nothing is computed from the other numbers."""
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines]
    except ValueError:
        return False
    return bool(rows) and all(isinstance(r, dict) and type(r.get("step")) is int for r in rows)


def _table_fits(path: Path) -> bool:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return all(
            len(line.split("\t")) == 3 and int(line.split("\t")[2]) >= 0 for line in lines[1:]
        )
    except ValueError:
        return False


def _columns_fit(was: Path, now: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(now, use_threads=False)
        table.validate(full=True)
        schema = pq.read_schema(was)
        at = schema.get_field_index("id")
        # Whole numbers are ids like texts.
        if at >= 0 and pa.types.is_integer(table.schema.field("id").type):
            schema = schema.set(at, table.schema.field("id"))
        return bool(table.schema.equals(schema) and not any(c.null_count for c in table))
    except (pa.ArrowException, OSError, ValueError):
        return False


def _headers_equal(was: Path, now: Path) -> bool:
    first, second = was.read_bytes(), now.read_bytes()
    size = 8 + int.from_bytes(first[:8], "little")
    return len(first) == len(second) and first[:size] == second[:size] and _finite(second[size:])


def _finite(data: bytes) -> bool:
    import numpy as np

    return bool(np.isfinite(np.frombuffer(data[: len(data) // 4 * 4], dtype=np.float32)).all())
