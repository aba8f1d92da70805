"""The one place where YAML becomes dataclasses and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError

T = TypeVar("T")

# Keys that people bring from elsewhere, and why there is no such key here.
_NO_QLORA = (
    "leave it out: adapters trained on 4-bit weights give other vectors once they are merged into "
    "the 16-bit ones; ZeRO-3 shards the frozen weights over the ranks instead"
)
_NOT_OFFERED = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantize", "quantization"), _NO_QLORA),
    "adapter_dtype": "leave it out: DeepSpeed computes adapters in model.dtype and keeps an fp32 "
    "copy of them, which is what is updated and saved",
}


def load_config(kind: type[T], path: str | Path, overrides: tuple[str, ...] = ()) -> T:
    """Read a YAML file with those it extends, apply overrides, and build `kind` from it.

    `extends: [a.yaml, ../b.yaml]`, relative to the file that says so, reads those files first. A
    later one wins, the file itself over all of them; sections are merged key by key, lists and
    values replaced, and `key.sub=value` overrides come last.

    Raises:
        UserError: a file is missing or no YAML, a file extends itself, a key is unknown, a value
            has a wrong type or breaks a rule; the message names the file and the whole key path.
    """
    path = Path(path)
    tree = _read_tree(path, extended_by=())
    for override in overrides:
        _apply_override(tree, override)
    return build_config(kind, tree, origin=str(path))


def build_config(kind: type[T], tree: dict[str, Any], *, origin: str) -> T:
    """Validate a plain tree of values into `kind`; `origin` names it in messages."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        raise _explain(kind, error, origin) from error
    except UserError as error:
        raise UserError(f"{origin}: {error.found}", allowed=error.allowed, fix=error.fix) from error


def as_tree(config: Any) -> dict[str, Any]:
    """The resolved config as nested dicts of plain values."""
    tree: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return tree


def dump_config(config: Any) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)


def _read_tree(path: Path, *, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """A file's keys over those of the files that it extends; `extended_by` led to this one."""
    place = path.resolve()
    above = f"{extended_by[-1]}: extends: " if extended_by else ""
    if place in extended_by:
        raise UserError(
            f"{above}{path} is extended in a circle",
            fix=f"take one of these out: {' -> '.join(file.name for file in extended_by)}",
        )
    if not path.is_file():
        raise UserError(f"{above}{path}: no such file", fix="give the path of a YAML config")
    try:
        own = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({error})") from error
    if not isinstance(own, dict):
        raise UserError(f"{path}: {type(own).__name__} at the top", allowed="a mapping of keys")
    bases = own.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: extends = {bases!r}", allowed="a list of paths of YAML files")
    tree: dict[str, Any] = {}
    for base in bases:
        _merge(tree, _read_tree(path.parent / base, extended_by=(*extended_by, place)))
    _merge(tree, own)
    return tree


def _merge(tree: dict[str, Any], over: dict[str, Any]) -> None:
    """Put the keys of `over` into `tree`; a section that both have is merged key by key."""
    for key, value in over.items():
        below = tree.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)
        else:
            tree[key] = value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}", allowed="key.sub=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        node = tree.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent!r} holds a value, not keys")
        tree = node
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: value is not YAML ({error})") from error


def _explain(kind: type, error: ValidationError, origin: str) -> UserError:
    """The first fault of a pydantic report, in the user's words."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return UserError(
            f"{origin}: unknown key {key!r}",
            allowed=", ".join(_keys_beside(kind, first["loc"])),
            fix=_NOT_OFFERED.get(str(first["loc"][-1]), ""),
        )
    if first["type"] in ("missing", "missing_keyword_only_argument"):
        return UserError(f"{origin}: key {key!r} is missing", fix=f"add {key} to the file")
    return UserError(f"{origin}: {key} = {first['input']!r}", allowed=first["msg"])


def _keys_beside(kind: type, location: tuple[int | str, ...]) -> list[str]:
    """Names allowed where an unknown key was found."""
    schema = TypeAdapter(kind).json_schema()
    node: dict[str, Any] = schema
    for part in location[:-1]:
        child = node["items"] if isinstance(part, int) else node["properties"][part]
        node = _resolve(schema, child)
    return list(_resolve(schema, node)["properties"])


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow references and optional branches of a JSON schema to the object they mean."""
    for branch in node.get("anyOf", []):
        if branch.get("type") != "null":
            return _resolve(schema, branch)
    if "$ref" in node:
        return dict(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    return node
