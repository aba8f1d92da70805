"""Write docs/reference/: every command and every key of every config, from the code itself.

    python -m tests.tools.reference     writes commands.md and config.md

tests/test_docs.py compares the pages with what this module would write.
"""

from __future__ import annotations

import functools
import importlib
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from pipeline.config.explain import KINDS, Key, list_keys

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
# Programs by the words that start them, with the module that holds their typer app.
PROGRAMS = {"diffembed": "pipeline.cli", "python -m ReasonAug": "ReasonAug.__main__"}
_READ_BY = {
    "starter": "diffembed starter",
    "prepare": "diffembed prepare",
    "mine": "diffembed mine",
    "train": "diffembed train",
    "evaluate": "diffembed evaluate",
    "probe": "diffembed probe",
    "chain": "diffembed submit all",
}
_WRITTEN = "Written by `python -m tests.tools.reference`; change the code, not this page."


@functools.cache
def program(name: str) -> Any:
    """Return the command tree of one of PROGRAMS."""
    return get_command(importlib.import_module(PROGRAMS[name]).app)


def pages() -> dict[str, str]:
    """Return the text of every generated page, by file name."""
    return {"commands.md": commands_page(), "config.md": config_page()}


def commands_page() -> str:
    """Describe every command, its arguments and its options."""
    parts = ["# All commands", _WRITTEN]
    for name in PROGRAMS:
        parts += [
            part
            for path, command in _leaves(name, program(name))
            for part in _command(path, command)
        ]
    return "\n\n".join(parts) + "\n"


def _leaves(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    # By name, because typer has its own classes, which need not derive from click's.
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, below in inner.items():
        yield from _leaves(f"{path} {name}", below)


def _command(path: str, command: Any) -> Iterator[str]:
    yield f"## {path}"
    yield " ".join((command.help or "").split())
    shown = [option for option in command.params if not getattr(option, "hidden", False)]
    places = [_place(option) for option in shown if option.param_type_name == "argument"]
    options = [option for option in shown if option.param_type_name == "option"]
    yield f"```text\n{' '.join([path, *places])}\n```"
    rows = [(f"`{place}`", _help(option)) for place, option in zip(places, shown, strict=False)]
    rows += [(f"`{_spelling(option)}`", _help(option)) for option in options]
    yield _table(("", ""), rows)


def _place(option: Any) -> str:
    return str(option.metavar or (option.name or "").upper())


def _spelling(option: Any) -> str:
    names = "/".join([*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {_values(option.type_descriptor.annotation)}"


def _values(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    return {"int": "INTEGER", "float": "NUMBER", "Path": "PATH"}.get(kind.__name__, "TEXT")


def _help(option: Any) -> str:
    text = " ".join((getattr(option, "help", None) or "").split())
    default = option.default
    if option.required:
        return f"{text} (must be given)"
    if default in (None, "", False, True) or callable(default):
        return text
    return f"{text} (default `{default}`)"


def config_page() -> str:
    """Describe every key of every kind of config file."""
    parts = [
        "# All config keys",
        _WRITTEN,
        "Any key can be changed on the command line: `diffembed train CONFIG key.sub=value`, "
        "or `key.0.sub=value` for the first item of a list. "
        "`diffembed config explain KEY` prints one key; `diffembed config schema` prints the JSON "
        "schema of a kind of file, which editors read for completion. `extends: FILE`, or "
        "`[FILE, ...]`, in any file takes the keys of others, relative to it; this file wins over "
        "them.",
    ]
    for kind in KINDS:
        parts += [f"## {kind}", f"Read by `{_READ_BY[kind]}`."]
        parts.append(
            _table(("key", "values", "default", "meaning"), map(_key_row, list_keys(kind)))
        )
    return "\n\n".join(parts) + "\n"


def _key_row(key: Key) -> tuple[str, ...]:
    default = "must be given" if key.default is None else f"`{key.default}`"
    # The defaults of a section are the defaults of its keys.
    return f"`{key.name}`", key.values, "" if key.default == "{}" else default, key.meaning


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
