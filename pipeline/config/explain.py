"""Describe the keys of all configs: for people, for editors, and as differences of two files.

    class TrainConfig:              ──> Key("train", "num_steps", "an integer >= 1", ...)
        num_steps: PositiveInt      ──> JSON schema, for completion and checks in an editor
        \"\"\"Optimizer steps.\"\"\"

Types, ranges and defaults come from pydantic's JSON schema, meanings from the text below each key.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.config.data import PrepareConfig
from pipeline.config.evaluation import ChainConfig, EvaluateConfig, ProbeConfig
from pipeline.config.loading import as_tree, expand_path, load_config, range_words, read_tree
from pipeline.config.mining import MineConfig
from pipeline.config.model import StarterConfig
from pipeline.config.training import TrainConfig
from pipeline.errors import UserError

# Kinds of config files, by the command that reads them.
KINDS: dict[str, type] = {
    "starter": StarterConfig,
    "prepare": PrepareConfig,
    "mine": MineConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "probe": ProbeConfig,
    "chain": ChainConfig,
}
_EXTENDS = {
    "description": "File, or list of files, that this one completes, relative to it; later ones "
    "win over earlier ones, and this file over all of them.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a kind of config files."""

    kind: str  # a name of KINDS
    name: str  # dotted: loss.temperature; `sources[]` for the items of a list
    values: str  # what may be given, in words
    default: str | None  # as YAML; None: the key must be given
    meaning: str


@functools.cache
def list_keys(kind: str) -> tuple[Key, ...]:
    """Return all keys of a kind of config files, sections before their keys."""
    schema = TypeAdapter(KINDS[kind]).json_schema()
    return tuple(_walk(kind, schema, schema, KINDS[kind].__name__, ""))


def explain(name: str) -> str:
    """Return the meaning, the values and the default of every key of this name, of any config.

    Args:
        name: a whole key (`loss.temperature`, or `train.loss.temperature`), its last words
            (`temperature`), or a section (`loss`), which lists its keys.

    Raises:
        UserError: no config has such a key.
    """
    every = [key for kind in KINDS for key in list_keys(kind)]
    exact = [key for key in every if name in (key.name, f"{key.kind}.{key.name}")]
    found = exact or [key for key in every if _plain(key.name).endswith(_plain(name))]
    if not found:
        names = {key.name for key in every} | {key.name.split(".")[-1] for key in every}
        close = get_close_matches(name, sorted(names), n=5, cutoff=0.5)
        raise UserError(
            f"config explain: no key {name!r}",
            allowed=f"for example {', '.join(close)}" if close else "a key of a config",
            fix="`diffembed config schema` lists every key",
        )
    inside = [key for key in every if any(_is_inside(key, section) for section in found)]
    return "\n\n".join(_describe(key) for key in dict.fromkeys([*found, *inside]))


def file_schema(kind: str) -> dict[str, Any]:
    """Return the JSON schema of a kind of config files, for editors.

    No key is required: a file may be completed by the files that it extends, or by the command
    line.
    """
    schema = TypeAdapter(KINDS[kind]).json_schema()
    for name, section in [(KINDS[kind].__name__, schema), *schema.get("$defs", {}).items()]:
        section.pop("required", None)
        for key, node in section.get("properties", {}).items():
            # A field's own description is the unit of its range, for messages.
            unit = node.pop("description", None)
            node["description"] = _meanings()[name][key] + (f" ({unit})" if unit else "")
            node.pop("title", None)
    schema["properties"]["extends"] = _EXTENDS
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def write_schemas(folder: Path) -> list[Path]:
    """Write the schema of every kind as KIND.json; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in KINDS:
        path = folder / f"{kind}.json"
        path.write_text(json.dumps(file_schema(kind), indent=1, ensure_ascii=False) + "\n")
        paths.append(path)
    return paths


def compare(first: Path, second: Path) -> list[tuple[str, str, str]]:
    """Return (key, value, other value) wherever two files of one kind resolve differently.

    Raises:
        UserError: a file is wrong, or the two are of different kinds.
    """
    kinds = [kind_of(path) for path in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{first} is a config of {kinds[0]}, {second} of {kinds[1]}",
            allowed="two files of one kind",
        )
    left, right = (
        dict(_leaves(as_tree(load_config(KINDS[kinds[0]], path)), "")) for path in (first, second)
    )
    return [
        (key, left.get(key, "-"), right.get(key, "-"))
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]


def kind_of(path: Path) -> str:
    """Return the kind of a config file, which may be incomplete: the one that knows its keys."""
    # A part of a config has keys that several kinds share, such as output_dir: of equally many
    # known keys, the kind with the fewest keys of its own is meant.
    given = {re.sub(r"\[\d+\]", "[]", name) for name, _ in _leaves(read_tree(path), "")}
    known = {kind: {key.name for key in list_keys(kind)} for kind in KINDS}
    return max(known, key=lambda kind: (len(given & known[kind]), -len(known[kind])))


def output_dir(config: Path) -> Path:
    """Return the folder that the command of a config writes: its `output_dir` or `output`.

    Raises:
        UserError: the file cannot be read, or sets none.
    """
    tree = read_tree(config)
    key = "output_dir" if "output_dir" in tree else "output"
    if not isinstance(found := tree.get(key), str):
        raise UserError(f"{config}: key 'output_dir' is missing", fix="add output_dir to the file")
    return expand_key(config, key, found)


def expand_key(config: Path, key: str, value: str) -> Path:
    """Expand the path under a key of a config that is read without being checked.

    Raises:
        UserError: it names a user or variable that does not exist, or is empty.
    """
    try:
        return Path(expand_path(value))
    except ValueError as error:
        raise UserError(f"{config}: {key}: {value!r}", allowed=str(error)) from error


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield dotted names and values; a list is one value unless it holds sections."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}" if name else key)
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for number, item in enumerate(tree):
            yield from _leaves(item, f"{name}[{number}]")
    else:
        yield name, json.dumps(tree, ensure_ascii=False)


# --- from schema and source to keys ----------------------------------------------------------


@functools.cache
def _meanings() -> dict[str, dict[str, str]]:
    """Return the text below every key, by class and key."""
    # From the source, because Python keeps no docstring of a field.
    found: dict[str, dict[str, str]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = dict(_texts_below(node))
    return found


def _texts_below(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            yield field.target.id, " ".join(str(below.value.value).split())


def _walk(
    kind: str, schema: Mapping[str, Any], section: Mapping[str, Any], name: str, prefix: str
) -> Iterator[Key]:
    """Yield the keys of a section and of the sections below it."""
    for key, node in section["properties"].items():
        required = key in section.get("required", ())
        default = json.dumps(node.get("default", {}), ensure_ascii=False)
        yield Key(
            kind=kind,
            name=prefix + key,
            values=_value_words(schema, node),
            default=None if required else default,
            meaning=_meanings()[name][key],
        )
        for below, mark in _sections(node):
            child = schema["$defs"][below]
            yield from _walk(kind, schema, child, below, f"{prefix}{key}{mark}.")


def _sections(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of the sections that a value may be, and `[]` for the items of a list."""
    if "$ref" in node:
        yield str(node["$ref"]).rsplit("/", 1)[-1], ""
    for branch in node.get("anyOf", ()):
        yield from _sections(branch)
    if "items" in node:
        yield from ((name, "[]") for name, _ in _sections(node["items"]))


def _value_words(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Return the values that a key accepts, in words."""
    if "anyOf" in node:
        return " or ".join(_value_words(schema, branch) for branch in node["anyOf"])
    if "enum" in node:
        return " or ".join(map(str, node["enum"]))
    if "const" in node:
        return str(node["const"])
    if "$ref" in node:
        return "a section of keys"
    match node.get("type"):
        case "integer" | "number":
            return range_words(node)
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "array":
            fixed = node.get("prefixItems")
            items = fixed[0] if fixed else node.get("items", {})
            return f"a list of {f'{len(fixed)} ' if fixed else ''}{_several(schema, items)}"
        case "object":
            inner = node.get("additionalProperties")
            return f"names with {_several(schema, inner) if isinstance(inner, dict) else 'values'}"
    return "a path" if node.get("format") == "path" else "a text"


def _several(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Return the items of a list in words: `texts or sections`."""
    # `a text` becomes `texts`, `an integer >= 1` becomes `integers >= 1`.
    words = re.sub(r"\ban? (\w+)", r"\1s", _value_words(schema, node))
    return words.replace("sections of keys", "sections")


def _plain(name: str) -> str:
    """Return `.key.sub`, so that `key` ends no `other_key`."""
    return "." + name.replace("[]", "").strip(".")


def _is_inside(key: Key, section: Key) -> bool:
    return key.kind == section.kind and key.name.startswith(
        (f"{section.name}.", f"{section.name}[")
    )


def _describe(key: Key) -> str:
    lines = textwrap.wrap(key.meaning, width=88)
    # A section has the defaults of its keys.
    default = "" if key.default == "{}" else f"; default {key.default}"
    lines.append(key.values + ("; must be given" if key.default is None else default))
    return "\n  ".join([f"{key.name}   ({key.kind})", *lines])
