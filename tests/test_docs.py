"""docs/: the reference is current, commands parse, configs load, anchors exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import build_config
from pipeline.config.explain import KINDS, kind_of, list_keys
from pipeline.config.loading import read_tree
from pipeline.train import parse_arguments
from tests.tools import reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# data.md has its own test, which prepares its examples; the generated pages show no commands.
PAGES = sorted(page for page in DOCS.glob("*.md"))
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ("launch/recipes", "slurm"))]


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def command_lines(page: Path) -> list[list[str]]:
    """Return the words of every whole command of this project in a page's shell blocks."""
    text = "\n".join(blocks(page, "bash", "sh", "console")).replace("\\\n", " ")
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for line in text.splitlines()]
    return [words for words in lines if words[:1] == ["diffembed"] or words[:1] == ["python"]]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words name, and the words left for it."""
    name = next(name for name in reference.PROGRAMS if words[: len(name.split())] == name.split())
    command, rest = reference.program(name), words[len(name.split()) :]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no command {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def test_the_reference_is_what_the_code_says() -> None:
    written = {path.name: path.read_text() for path in reference.FOLDER.glob("*.md")}

    assert written == reference.pages(), "run `python -m tests.tools.reference`"


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_documents_parse(page: Path) -> None:
    """Names, options, their values, and the arguments that must be given."""
    for words in command_lines(page):
        if words[:2] == ["python", "pipeline/train.py"]:
            parse_arguments(words[2:])
        elif words[0] == "diffembed" or words[:3] == ["python", "-m", "ReasonAug"]:
            command, rest = find_command(words)
            command.make_context(" ".join(words), rest).close()


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_exist_and_have_these_options(page: Path) -> None:
    outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for text in re.findall(r"`(diffembed [a-z][^`]*)`", outside):
        words = text.replace("[", " ").replace("]", " ").split()
        if "|" in words[1]:  # `diffembed submit prepare|train ...`
            continue
        command, rest = find_command([word.partition("|")[0] for word in words])
        options = {name for option in command.params for name in option.opts}
        assert {word for word in rest if word.startswith("--")} <= options, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_of_documents_load(page: Path, tmp_path: Path) -> None:
    """A whole config is built; of a part, each key must exist."""
    if page.name == "data.md":
        return
    for text in blocks(page, "yaml"):
        (tmp_path / "page.yaml").write_text(text)
        extends = yaml.safe_load(text).pop("extends", None)
        tree = {key: value for key, value in yaml.safe_load(text).items() if key != "extends"}
        (tmp_path / "page.yaml").write_text(yaml.safe_dump(tree))
        kind = kind_of(tmp_path / "page.yaml")
        required = {key.name for key in list_keys(kind) if key.default is None}
        whole = {key for key in required if "." not in key} <= set(tree) and not extends
        if whole:
            build_config(KINDS[kind], tree, origin=page.name)
        known = {key.name for key in list_keys(kind)}
        given = _names(read_tree(tmp_path / "page.yaml"))
        assert not {name for name in given if not _is_known(name, known)}, page.name


def _names(tree: Any, name: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [n for key, value in tree.items() for n in _names(value, f"{name}.{key}".strip("."))]
    if isinstance(tree, list):
        return [n for item in tree for n in _names(item, f"{name}[]")] or [name]
    return [name]


def _is_known(name: str, known: set[str]) -> bool:
    """Keys below a key with free names, such as `instructions`, are the user's."""
    parts = name.removesuffix("[]").split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    free = ("instructions", "columns", "weights", "lengths", "where", "bands")
    return prefixes[-1] in known or any(
        prefix in known and prefix.split(".")[-1] in free for prefix in prefixes
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_of_links_exist(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        names = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
        assert anchor in names, f"{path}#{anchor}"


def test_every_page_is_on_the_map() -> None:
    pages = re.findall(r"\]\(([\w/]+\.md)", (DOCS / "index.md").read_text())
    navigation = (DOCS / "site" / "mkdocs.yml").read_text()
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"index.md"}

    assert there == set(pages)
    assert not {page for page in there if page not in navigation}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_of_documents_compile(page: Path) -> None:
    if page.name == "extend.md":  # edits of files, which test_extend.py makes
        return
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


def test_messages_on_the_page_of_symptoms_are_the_codes() -> None:
    """Their fixed parts occur in the sources, whose strings are joined over lines."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "pipeline").rglob("*.py")))
    joined = re.sub(r'"\s*\n?\s*\+?\s*f?"', "", sources)
    rows = re.findall(r"^\| `([^`]+)`", (DOCS / "trouble.md").read_text(), re.MULTILINE)
    quoted = [part for row in rows for part in _fixed_parts(row)]

    assert len(quoted) > 20
    assert [part for part in quoted if part not in joined] == []


def _fixed_parts(message: str) -> list[str]:
    """Return the parts of an example that are not values."""
    parts = re.split(r"\.\.\.|'[^']*'|[\d,]*\d", message)
    return [part.strip(" :()") for part in parts if len(part.strip(" :()")) > 3]


def test_pages_that_errors_name_have_these_anchors() -> None:
    sources = "".join(path.read_text() for path in sorted((ROOT / "pipeline").rglob("*.py")))
    named = set(re.findall(r'docs="([^"]+)"', sources))
    found = {
        f"{page.name}#{anchor}"
        for page in PAGES
        for anchor in re.findall(r'<a id="([^"]+)"></a>', page.read_text())
    }

    assert len(named) >= 12
    assert named == found
