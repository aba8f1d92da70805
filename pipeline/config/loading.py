"""Read a config from strict YAML and overrides, explain its faults, and write it back.

    file.yaml ── extends ──> base.yaml, ...       later files win, sections are merged key by key
        │
        v  overrides key.sub=value                the command line wins over all files
    tree of plain values ── pydantic ──> frozen dataclass, or one line: file, key, found, allowed

YAML is read by the core schema of YAML 1.2, without repeated keys, NaN, or values that no file
can hold. The range of a single number is part of its type (`PositiveInt`, `Field(ge=2)`); `require`
is for rules between keys. Both end as one line of found, allowed and fix.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails

from pipeline.errors import UserError

T = TypeVar("T")
# Unknown keys are refused: a misspelt key that is ignored trains the wrong model.
strict = with_config(ConfigDict(extra="forbid"))


def load_config(kind: type[T], path: str | Path, overrides: tuple[str, ...] = ()) -> T:
    """Read a YAML file with the files it extends, apply overrides, and build `kind` from it.

    `extends: a.yaml`, or `[a.yaml, ../b.yaml]`, relative to the file with that key, reads those
    files first. A later one wins, and the file itself wins over all of them. Sections are merged
    key by key, lists and values are replaced. Overrides `key.sub=value` come last; in them,
    `key.0.sub` names the first item of a list.

    Raises:
        UserError: a file is missing or not YAML, a file extends itself, a key is unknown, a value
            has a wrong type or breaks a rule; the message names the file and the whole key path.
    """
    path = Path(path).expanduser()
    # Files and overrides are merged as plain trees, so that pydantic sees the result only once and
    # rules between keys hold for what the user finally gets.
    tree = read_tree(path)
    _refuse_repeated(overrides)
    for override in overrides:
        _apply_override(tree, override)
    return build_config(kind, tree, origin=str(path))


def build_config(kind: type[T], tree: dict[str, Any], *, origin: str) -> T:
    """Validate a tree of plain values into `kind`; `origin` names it in messages."""
    try:
        config: T = _adapter(kind).validate_python(tree)
        # Pydantic accepts true as 1; in a config it is a mistake.
        for key in _booleans_as_numbers(tree, as_tree(config), ""):
            raise UserError(f"{key}: a switch (true or false)", allowed="a number")
    except ValidationError as error:
        raise _explain(kind, error, tree, origin) from error
    except UserError as error:
        raise UserError(f"{origin}: {error.found}", allowed=error.allowed, fix=error.fix) from error
    return config


def as_tree(config: Any) -> dict[str, Any]:
    """Return the resolved config as nested dicts of plain values."""
    tree: dict[str, Any] = _adapter(type(config)).dump_python(config, mode="json")
    return tree


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)  # takes up to 0.2 s
    return _ADAPTERS[kind]


def dump_config(config: Any) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal object."""
    return dump_yaml(as_tree(config))


# --- parts of every section --------------------------------------------------------------------


def require(condition: bool, key: str, value: object, allowed: str, fix: str = "") -> None:
    """Refuse a value of `key` unless the condition holds."""
    if not condition:
        raise UserError(f"{key}: {value!r}", allowed=allowed, fix=fix)


def expand_path(value: Any) -> Any:
    """Expand `~`, `$NAME` and `${NAME}` in a path, also after `hub:`; leave URLs unchanged.

    Raises:
        ValueError: there is no such user or variable, or the path is empty. pydantic reports it
            with the key, and its text is printed as what is allowed.
    """
    # A Path comes from Python code, which means exactly this path.
    if not isinstance(value, str) or "://" in value:
        return value
    if not value.strip() or "\n" in value:
        raise ValueError("a path of one line")
    head = "hub:" if value.startswith("hub:") else ""
    path = os.path.expanduser(os.path.expandvars(value.removeprefix(head)))  # noqa: PTH111
    # Left over because the variable is not set: a folder named `$DATA` is never meant.
    if missing := re.search(r"\$(\w+|\{\w*\})", path):
        raise ValueError(f"a path without {missing[0]}, which is not set in the environment")
    if path.startswith("~"):
        raise ValueError(f"a path without {path.partition('/')[0]}, which is not a user here")
    return head + path


# Every path of a config is one of these two; `PathText` may also be a name on the hub.
UserPath = Annotated[Path, BeforeValidator(expand_path)]
PathText = Annotated[str, BeforeValidator(expand_path)]


# --- files and overrides ---------------------------------------------------------------------


def read_tree(path: Path, *, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Merge a file over the files it extends.

    Args:
        path: a YAML config, possibly not complete.
        extended_by: the files that led to it, by which a circle is found.

    Raises:
        UserError: a file is missing or not a mapping, or extends itself.
    """
    resolved = path.resolve()
    above = f"{extended_by[-1]}: extends: " if extended_by else ""
    if resolved in extended_by:
        raise UserError(
            f"{above}{path} is extended in a circle",
            fix=f"remove one of these: {' -> '.join(file.name for file in extended_by)}",
        )
    if not path.exists():
        raise UserError(f"{above}{path}: no such file", fix="give the path of a YAML config")
    own = read_yaml(path)
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise UserError(f"{path}: {type(own).__name__} at the top", allowed="a mapping of keys")
    bases = own.pop("extends", [])
    listed = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in listed):
        raise UserError(
            f"{path}: extends = {bases!r}", allowed="the path of a YAML file, or a list of them"
        )
    tree: dict[str, Any] = {}
    for base in listed:
        below = path.parent / Path(base).expanduser()
        _merge(tree, read_tree(below, extended_by=(*extended_by, resolved)))
    _merge(tree, own)
    return tree


def _merge(tree: dict[str, Any], over: dict[str, Any]) -> None:
    """Put the keys of `over` into `tree`; a section in both is merged key by key."""
    for key, value in over.items():
        below = tree.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)
        else:
            tree[key] = value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `key.sub=value`; of a list, `key.0.sub=value` changes its first item."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise UserError(f"override {override!r}", allowed="key.sub=value")
    *parents, leaf = name.split(".")
    node: Any = tree  # the section or list of the next word
    for parent in parents:
        key = _key_in(node, parent, override)
        below = node.get(key) if isinstance(node, dict) else node[key]
        below = {} if below is None else below  # a section that is left out, or null
        if not isinstance(below, dict | list):
            raise UserError(f"override {override!r}: {parent!r} holds a value, not keys")
        # A copy, because an alias in the file may hold the same section.
        node[key] = node = copy.copy(below)
    node[_key_in(node, leaf, override)] = parse_yaml(text, origin=f"override {override!r}")


def _key_in(node: dict[str, Any] | list[Any], word: str, override: str) -> Any:
    """Return the key of a section, or the number of an item of a list."""
    if isinstance(node, dict):
        return word
    if word.isdecimal() and int(word) < len(node):
        return int(word)
    raise UserError(
        f"override {override!r}: {word!r} in a list of {len(node)}",
        allowed=f"the number of an item, 0 to {len(node) - 1}" if node else "",
        fix="give the whole list, as in 'key=[{...}, {...}]', to add items",
    )


def _refuse_repeated(overrides: tuple[str, ...]) -> None:
    """Refuse an override that a later one replaces: the same key, or the section around it."""
    keys = [override.partition("=")[0] for override in overrides]
    for index, key in enumerate(keys):
        for later in keys[index + 1 :]:
            if f"{key}.".startswith(f"{later}."):
                raise UserError(
                    f"override {overrides[index]!r}: {later} is given again after it",
                    fix="remove one of the two",
                )


# --- faults in the user's words --------------------------------------------------------------

_UNKNOWN = "unexpected_keyword_argument"
_MISSING = ("missing", "missing_keyword_only_argument")
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short")
# The expected kind of value, by pydantic's type of error.
_EXPECTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "dataclass_type": "a section of keys",
    "path_type": "a path",
    "string_type": "a text",
}
# Keys of other packages that users try, and the reason why there is no such key here.
_NO_QLORA = (
    "leave it out: adapters trained on 4-bit weights give other vectors once they are merged into "
    "the 16-bit ones; ZeRO-3 shards the frozen weights over the ranks instead"
)
_NOT_OFFERED = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantize", "quantization"), _NO_QLORA),
    "adapter_dtype": "leave it out: DeepSpeed computes adapters in model.dtype and keeps an fp32 "
    "copy of them, which is what is updated and saved",
}


def _explain(kind: type, error: ValidationError, tree: dict[str, Any], origin: str) -> UserError:
    """Return the first fault of a pydantic report as one line, with the keys of the others."""
    faults: dict[str, list[ErrorDetails]] = {}
    # A list with a faulty item is also "too short": its valid items are counted.
    reported = [f for f in error.errors() if not (f["type"] == "too_short" and f["input"])]
    # A misspelt key first: the missing key follows from it.
    for fault in sorted(reported, key=lambda fault: fault["type"] != _UNKNOWN):
        faults.setdefault(_key_of(tree, fault), []).append(fault)
    (key, own), *others = faults.items()
    more = f" (and {len(others)} more: {_shorten(', '.join(k for k, _ in others))})"
    more, first = more if others else "", own[0]
    if first["type"] == _UNKNOWN:
        return UserError(
            f"{origin}: unknown key {key!r}{more}",
            allowed=", ".join(_allowed_keys(kind, first["loc"])),
            fix=_NOT_OFFERED.get(str(first["loc"][-1]), ""),
            docs="trouble.md#unknown-key",
        )
    if first["type"] in _MISSING:
        return UserError(f"{origin}: key {key!r} is missing{more}", fix=f"add {key} to the file")
    if isinstance(first["input"], bool) and first["type"] in _OUT_OF_RANGE:
        return UserError(f"{origin}: {key}: a switch (true or false){more}", allowed="a number")
    expected = dict.fromkeys(_describe_expected(kind, fault) for fault in own)
    value = "an empty list" if first["type"] == "too_short" else _shorten(repr(first["input"]))
    sign = ":" if first["type"] in _OUT_OF_RANGE else " ="
    unquoted = first["type"] == "string_type" and isinstance(first["input"], int | float)
    return UserError(
        f"{origin}: {key}{sign} {value}{more}",
        allowed=" or ".join(expected),
        fix="put it in quotes" if unquoted else "",
    )


def _key_of(tree: Any, fault: ErrorDetails) -> str:
    """Return the key that a fault is about; its location also names branches of a type."""
    keys: list[str] = []
    for part in fault["loc"]:
        if isinstance(tree, list) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        elif isinstance(tree, dict) and (part in tree or fault["type"].startswith("missing")):
            tree = tree.get(part)
        else:
            break
        keys.append(str(part))
    return ".".join(keys)


def _describe_expected(kind: type, fault: ErrorDetails) -> str:
    """Return the values that would have been accepted, in words."""
    if fault["type"] in _OUT_OF_RANGE:
        return _describe_range(kind, fault["loc"])
    message = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return _EXPECTED.get(fault["type"], message)


def _describe_range(kind: type, location: tuple[int | str, ...]) -> str:
    """Return the range of a number, or the least length of a list: `an integer >= 2 (queries)`."""
    # The JSON schema has the whole range of a field, pydantic's error only the violated limit.
    schema = _adapter(kind).json_schema()
    given = _find(schema, location)
    node = _resolve(schema, given)
    unit = node.get("description", "")
    if "minItems" in node:
        return f"at least one {unit}"
    words = range_words(node)
    nullable = any(branch.get("type") == "null" for branch in given.get("anyOf", []))
    return f"{words}, or null" if nullable else words


def range_words(node: Mapping[str, Any]) -> str:
    """Return the numbers that a JSON schema accepts: `an integer >= 2 (queries)`."""
    is_integer = node["type"] == "integer"
    # Of integers, `> 0` reads better as `>= 1`.
    limits = [
        f"{sign} {node[key] + step:g}" if is_integer else f"{sign} {node[key]:g}"
        for key, sign, step in (
            ("minimum", ">=", 0),
            ("exclusiveMinimum", ">=" if is_integer else ">", 1),
            ("maximum", "<=", 0),
            ("exclusiveMaximum", "<", 0),
        )
        if key in node
    ]
    unit = node.get("description")
    words = f"{'an integer' if is_integer else 'a number'} {' and '.join(limits)}".rstrip()
    return f"{words} ({unit})" if unit else words


def _allowed_keys(kind: type, location: tuple[int | str, ...]) -> list[str]:
    """Return the names that are allowed in the section with an unknown key."""
    schema = _adapter(kind).json_schema()
    return list(_resolve(schema, _find(schema, location[:-1]))["properties"])


def _find(schema: dict[str, Any], location: tuple[int | str, ...]) -> dict[str, Any]:
    """Return the JSON schema of the value at a location; names of a type's branches are skipped."""
    node = schema
    for part in location:
        inside = _resolve(schema, node)
        # Any other part names a branch of a union, such as `constrained-int`.
        if isinstance(part, int):
            # A pair lists the schema of each of its items.
            node = inside["prefixItems"][part] if "prefixItems" in inside else inside["items"]
        elif part in inside.get("properties", {}):
            node = inside["properties"][part]
        elif isinstance(inside.get("additionalProperties"), dict):
            node = inside["additionalProperties"]
    return node


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow references, and the first branch that is not null, to the schema itself."""
    for branch in node.get("anyOf", []):
        if branch.get("type") != "null":
            return _resolve(schema, branch)
    if "$ref" in node:
        return dict(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    return node


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."


def _booleans_as_numbers(given: Any, taken: Any, key: str) -> Iterator[str]:
    """Yield keys where true or false was converted to 1 or 0."""
    if isinstance(given, dict) and isinstance(taken, dict):
        pairs = [(name, value, taken.get(name)) for name, value in given.items()]
    elif isinstance(given, list) and isinstance(taken, list):
        pairs = [(n, *pair) for n, pair in enumerate(zip(given, taken, strict=False))]
    else:
        if isinstance(given, bool) and isinstance(taken, int | float) and taken is not given:
            yield key
        return
    for name, value, result in pairs:
        yield from _booleans_as_numbers(value, result, f"{key}.{name}" if key else str(name))


# --- strict YAML -----------------------------------------------------------------------------

_MAX_BYTES = 2**20
# Values of a file with all its aliases expanded; sensible configs have some hundreds. Ten lines of
# aliases of aliases would be a billion.
_MAX_VALUES = 50_000
_MAX_INTEGER = 2**63 - 1
# Plain values by the core schema of YAML 1.2. In YAML 1.1, which PyYAML reads by default, `no` is
# false, 0123 is octal, 1:30 is 90, 2024-01-01 is a date, and 1e-3 is a text.
_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    # Of YAML 1.1: `<<: *anchor` takes over the keys of another section.
    ("merge", r"<<", "<"),
)


def read_yaml(path: Path) -> Any:
    """Read one YAML file.

    Raises:
        UserError: it is missing, too large, or refused by `parse_yaml`.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file", fix="give the path of a YAML config")
    if path.is_dir():
        raise UserError(f"{path}: a folder", allowed="a YAML file", fix="name the file inside it")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: more than a megabyte", allowed="a YAML config")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a YAML file (byte {error.start + 1} is not UTF-8)",
            fix="save the file as UTF-8",
        ) from error
    return parse_yaml(text, origin=str(path))


def parse_yaml(text: str, *, origin: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        origin: its file or flag, for messages.

    Raises:
        UserError: it is not YAML, or holds something that no config may hold.
    """
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
        for key, fault in _value_faults(value, ""):
            raise UserError(f"{key}: {fault}" if key else fault, fix="give it another value")
    except UserError as error:
        raise UserError(f"{origin}: {error.found}", allowed=error.allowed, fix=error.fix) from error
    except RecursionError as error:
        raise UserError(
            f"{origin}: not a YAML file (nested too deeply)", fix="see launch/recipes/"
        ) from error
    # Explicit tags (`!!int x`) fail with any error that their constructor raises.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{origin}: not a YAML file ({_yaml_problem(error)})", fix="see launch/recipes/"
        ) from error
    return value


def dump_yaml(value: Any) -> str:
    """Return YAML that `parse_yaml` reads back to an equal value."""
    # The pure dumper: the one in C knows only the resolvers it was compiled with.
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter."""

    # Empty: without PyYAML's own, only the resolvers of `_PLAIN` are added below.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own attribute

    def get_single_node(self) -> Any:
        """Compose a document, and refuse one that its aliases make huge."""
        node = super().get_single_node()
        if node is not None and _num_values(node, {}, ()) > _MAX_VALUES:
            raise UserError(
                f"more than {_MAX_VALUES:,} values with all aliases expanded",
                fix="use fewer aliases",
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping, and refuse one that gives a key twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        # Merge keys (`<<`) are not expanded yet: a key may replace one that they bring.
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    raise UserError(
                        f"line {line}: key {key.value!r} is given twice, first in line "
                        f"{lines[key.tag, key.value]}",
                        fix="remove one of the two",
                    )
                lines[key.tag, key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes texts that would be plain values to `_Loader`."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Only double quotes escape the rarer line breaks; elsewhere they read back as spaces.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _kind, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})\\Z"), list(_first)
        )


def _num_values(node: Any, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Count a node's values; an alias counts each time it is used."""
    if id(node) in above:
        line = node.start_mark.line + 1
        raise UserError(f"line {line}: an anchor contains itself", fix="write the values out")
    if id(node) not in sizes:
        # Counted once for each anchor: walking every alias would take as long as expanding them.
        inside = _children(node)
        sizes[id(node)] = 1 + sum(_num_values(child, sizes, (*above, id(node))) for child in inside)
    return sizes[id(node)]


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)


def _value_faults(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) for values that no key of any config accepts."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _value_faults(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _value_faults(child, f"{key}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, f"{value} is not a finite number"
    elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
        yield key, "an integer beyond 64 bits"
    # Lone halves of surrogate pairs cannot be written as UTF-8: `replace` changes them.
    elif isinstance(value, str) and (
        "\0" in value or value.encode(errors="replace") != value.encode(errors="surrogatepass")
    ):
        yield key, f"{value[:80]!r} holds a character that no file can hold"
