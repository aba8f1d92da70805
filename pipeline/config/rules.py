"""Strict YAML and strict dataclasses: the rules that every section of a config obeys."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ConfigDict, with_config

from pipeline.errors import UserError

# Unknown keys are refused: a misspelt key that is ignored trains the wrong model.
strict = with_config(ConfigDict(extra="forbid"))


def require(condition: bool, key: str, value: object, allowed: str, fix: str = "") -> None:
    """Refuse a value of `key` unless the condition holds."""
    if not condition:
        raise UserError(f"{key}: {value!r}", allowed=allowed, fix=fix)


def expand_path(value: Any) -> Any:
    """Write out `~`, `$NAME` and `${NAME}` at a path, also behind `hub:`; URLs stay as they are.

    Raises:
        ValueError: there is no such user or variable, or the path is empty.
    """
    if not isinstance(value, str) or "://" in value:
        return value
    if not value.strip() or "\n" in value:
        raise ValueError("a path of one line")
    head = "hub:" if value.startswith("hub:") else ""
    path = os.path.expanduser(os.path.expandvars(value.removeprefix(head)))  # noqa: PTH111
    if missing := re.search(r"\$(\w+|\{\w*\})", path):
        raise ValueError(f"a path without {missing[0]}, which is not set in the environment")
    if path.startswith("~"):
        raise ValueError(f"a path without {path.partition('/')[0]}, who is no user here")
    return head + path


# Every path of a config is one of these two; a hub name may stand in the place of `PathText`.
UserPath = Annotated[Path, BeforeValidator(expand_path)]
PathText = Annotated[str, BeforeValidator(expand_path)]
_MAX_BYTES = 2**20
# Values of a file with all its aliases written out; sensible configs have some hundreds.
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
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own attribute

    def get_single_node(self) -> Any:
        """Compose a document, and refuse one that its aliases make huge."""
        node = super().get_single_node()
        if node is not None and _num_values(node, {}, ()) > _MAX_VALUES:
            raise UserError(
                f"more than {_MAX_VALUES:,} values, written out", fix="use less aliases"
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping, and refuse one that gives a key twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        # Here merge keys are not filled in yet: a key may replace one that comes by `<<`.
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
    # Only in double quotes are the rarer line breaks escaped; elsewhere they read back as spaces.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _kind, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})\\Z"), list(_first)
        )


def _num_values(node: Any, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Count a node's values, those behind aliases each time."""
    if id(node) in above:
        line = node.start_mark.line + 1
        raise UserError(f"line {line}: an anchor contains itself", fix="write the values out")
    if id(node) not in sizes:
        inside = _children(node)
        sizes[id(node)] = 1 + sum(_num_values(child, sizes, (*above, id(node))) for child in inside)
    return sizes[id(node)]


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


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
        for key, fault in _faults(value, ""):
            raise UserError(f"{key}: {fault}" if key else fault, fix="give it another value")
    except UserError as error:
        raise UserError(f"{origin}: {error.found}", allowed=error.allowed, fix=error.fix) from error
    except RecursionError as error:
        raise UserError(
            f"{origin}: not a YAML file (nested too deeply)", fix="see launch/recipes/"
        ) from error
    # Explicit tags (`!!int x`) fail in whatever way their constructor does.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{origin}: not a YAML file ({_reason(error)})", fix="see launch/recipes/"
        ) from error
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)


def _faults(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, fault) of values that no key of any config takes."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _faults(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _faults(part, f"{key}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, f"{value} is no finite number"
    elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
        yield key, "an integer beyond 64 bits"
    elif isinstance(value, str) and ("\0" in value or (not value.isascii() and _is_broken(value))):
        yield key, f"{value[:80]!r} holds a character that no file can hold"


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def read_yaml(path: Path) -> Any:
    """Read one YAML file.

    Raises:
        UserError: it is missing, too large, or as of `parse_yaml`.
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


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back to an equal value."""
    # The pure dumper: the one in C knows only the resolvers it was compiled with.
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
