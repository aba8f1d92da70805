"""Read a config from YAML and overrides, and write it back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.rules import dump_yaml, parse_yaml, read_yaml
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
    path = Path(path).expanduser()
    tree = _read_tree(path, extended_by=())
    _refuse_lost(overrides)
    for override in overrides:
        _apply_override(tree, override)
    return build_config(kind, tree, origin=str(path))


def build_config(kind: type[T], tree: dict[str, Any], *, origin: str) -> T:
    """Validate a plain tree of values into `kind`; `origin` names it in messages."""
    try:
        config = TypeAdapter(kind).validate_python(tree)
        for key in _switched_numbers(tree, as_tree(config), ""):
            raise UserError(f"{key}: a switch (true or false)", allowed="a number")
    except ValidationError as error:
        raise _explain(kind, error, tree, origin) from error
    except UserError as error:
        raise UserError(f"{origin}: {error.found}", allowed=error.allowed, fix=error.fix) from error
    return config


def as_tree(config: Any) -> dict[str, Any]:
    """The resolved config as nested dicts of plain values."""
    tree: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return tree


def dump_config(config: Any) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return dump_yaml(as_tree(config))


def _read_tree(path: Path, *, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """A file's keys over those of the files that it extends; `extended_by` led to this one."""
    place = path.resolve()
    above = f"{extended_by[-1]}: extends: " if extended_by else ""
    if place in extended_by:
        raise UserError(
            f"{above}{path} is extended in a circle",
            fix=f"take one of these out: {' -> '.join(file.name for file in extended_by)}",
        )
    if not path.exists():
        raise UserError(f"{above}{path}: no such file", fix="give the path of a YAML config")
    own = read_yaml(path)
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise UserError(f"{path}: {type(own).__name__} at the top", allowed="a mapping of keys")
    bases = own.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: extends = {bases!r}", allowed="a list of paths of YAML files")
    tree: dict[str, Any] = {}
    for base in bases:
        below = path.parent / Path(base).expanduser()
        _merge(tree, _read_tree(below, extended_by=(*extended_by, place)))
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
    tree[leaf] = parse_yaml(text, origin=f"override {override!r}")


def _refuse_lost(overrides: tuple[str, ...]) -> None:
    """Refuse an override that a later one replaces with the section it is in, or by itself."""
    keys = [override.partition("=")[0] for override in overrides]
    for place, key in enumerate(keys):
        for later in keys[place + 1 :]:
            if f"{key}.".startswith(f"{later}."):
                raise UserError(
                    f"override {overrides[place]!r}: {later} is given again after it",
                    fix="remove one of the two",
                )


_UNKNOWN = "unexpected_keyword_argument"
# In the user's words: what a value of a wrong type should have been.
_WANTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "dataclass_type": "a section of keys",
    "path_type": "a path",
    "string_type": "a text",
}


def _explain(kind: type, error: ValidationError, tree: dict[str, Any], origin: str) -> UserError:
    """The first fault of a pydantic report, in the user's words, and the keys of the others."""
    faults: dict[str, list[ErrorDetails]] = {}
    # A misspelt key first: that another one is missing follows from it.
    for fault in sorted(error.errors(), key=lambda fault: fault["type"] != _UNKNOWN):
        faults.setdefault(_key_of(tree, fault), []).append(fault)
    (key, own), *others = faults.items()
    more = f" (and {len(others)} more: {_shorten(', '.join(k for k, _ in others))})"
    more, first = more if others else "", own[0]
    if first["type"] == _UNKNOWN:
        return UserError(
            f"{origin}: unknown key {key!r}{more}",
            allowed=", ".join(_keys_beside(kind, first["loc"])),
            fix=_NOT_OFFERED.get(str(first["loc"][-1]), ""),
        )
    if first["type"] in ("missing", "missing_keyword_only_argument"):
        return UserError(f"{origin}: key {key!r} is missing{more}", fix=f"add {key} to the file")
    wanted = (_WANTED.get(fault["type"]) or _plain(fault["msg"]) for fault in own)
    quoted = first["type"] == "string_type" and isinstance(first["input"], int | float)
    return UserError(
        f"{origin}: {key} = {_shorten(repr(first['input']))}{more}",
        allowed=" or ".join(dict.fromkeys(wanted)),
        fix="put it in quotes" if quoted else "",
    )


def _key_of(tree: Any, fault: ErrorDetails) -> str:
    """The key that a fault is about; its location also names branches of a type."""
    parts: list[str] = []
    for part in fault["loc"]:
        if isinstance(tree, list) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        elif isinstance(tree, dict) and (part in tree or fault["type"].startswith("missing")):
            tree = tree.get(part)
        else:
            break
        parts.append(str(part))
    return ".".join(parts)


def _plain(message: str) -> str:
    for start in ("Input should be ", "Value error, "):
        message = message.removeprefix(start)
    return message


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."


def _switched_numbers(given: Any, taken: Any, key: str) -> Iterator[str]:
    """Keys where true or false was taken for 1 or 0."""
    if isinstance(given, dict) and isinstance(taken, dict):
        pairs = [(name, value, taken.get(name)) for name, value in given.items()]
    elif isinstance(given, list) and isinstance(taken, list):
        pairs = [(n, *pair) for n, pair in enumerate(zip(given, taken, strict=False))]
    else:
        if isinstance(given, bool) and isinstance(taken, int | float) and taken is not given:
            yield key
        return
    for name, value, result in pairs:
        yield from _switched_numbers(value, result, f"{key}.{name}" if key else str(name))


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
