"""The policies of the house: layers, doors to libraries, names, scripts and documents."""

from __future__ import annotations

import ast
import collections
import functools
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.core import TyperGroup

from tests.tools import reference

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("pipeline", "ReasonAug", "ds_configs", "docs", "launch", "slurm", "tests", ".ci"),
    ".gitignore",
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
}
# A module imports modules on lower floors only; modules on one floor do not know each other.
FLOORS = (
    {"errors"},
    {"config", "files", "launch"},
    {"comm", "model_limits", "run_folder", "shipped_files", "tokenizer", "workers"},
    {"data", "exact_search", "loss", "model"},
    {"training", "evaluation"},
    {"mining"},
    {"planning", "submission"},
    {"doctor", "measuring", "new_run", "watch"},
    {"commands"},
    {"cli", "train"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Libraries that only these paths below pipeline/ may import.
DOORS = {
    "deepspeed": ("training/zero.py",),
    "torch.distributed": ("comm.py",),
    "mteb": tuple(f"evaluation/{file}.py" for file in ("tasks", "datasets", "models", "scoring")),
    "wandb": ("training/metrics.py",),
    "tensorboard": ("training/metrics.py",),
    "torch.utils.tensorboard": ("training/metrics.py",),
    "mpi4py": ("workers.py", "comm.py"),
}
LOADING = re.compile(
    "^(loads?|open|Unpickler|from_pretrained|from_config)$|(SentenceTransformer|CrossEncoder)$"
)
SAFE_LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader")
SOURCES = sorted((ROOT / "pipeline").rglob("*.py"))
SCRIPTS = sorted(
    path
    for folder in ("launch", "slurm", ".ci", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
    and (
        path.suffix in (".sh", ".sbatch", ".env")
        or path.read_bytes().startswith(b"#!/usr/bin/env bash")
    )
)
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "ReasonAug").glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "launch").rglob("*.md"),
    ]
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def imported_modules(path: Path) -> list[str]:
    """Dotted names that a file imports anywhere, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


class Call(NamedTuple):
    """A call in a source: the line, the call, the name called, and its named arguments."""

    line: int
    text: str
    called: str
    given: dict[str | None, str]


@functools.cache
def loads_of(source: str) -> list[Call]:
    """Calls in a source whose name is one of a function that loads something."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = []
    for node in calls:
        last = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        if LOADING.search(last) or any(word.arg == "allow_pickle" for word in node.keywords):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            call = Call(node.lineno, ast.unparse(node), ast.unparse(node.func), given)
            found.append(call)
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_down_only(path: Path) -> None:
    room = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
    if room == "__init__":
        assert not [m for m in imported_modules(path) if within(m, "pipeline")]
        return
    for module in imported_modules(path):
        assert not within(module, "ReasonAug"), f"{name(path)} imports {module}"
        if within(module, "pipeline") and (other := module.split(".")[1]) != room:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{name(path)} imports {module}"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def test_no_imports_form_a_circle() -> None:
    modules = {module_of(path): path for path in SOURCES}
    graph = {
        module: {
            known
            for target in imported_modules(path)
            if (known := target if target in modules else target.rpartition(".")[0]) in modules
        }
        for module, path in modules.items()
    }

    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_libraries_are_imported_only_in_the_rooms_that_own_them(path: Path) -> None:
    place = str(path.relative_to(ROOT / "pipeline"))
    for module in imported_modules(path):
        for library, owners in DOORS.items():
            if within(module, library):
                assert place.startswith(owners), f"{name(path)} imports {module}"
        if place.startswith(
            ("data/", "tokenizer.py", "model_limits.py", "workers.py", "planning/")
        ):
            assert not within(module, "torch"), f"{name(path)} imports {module}"


@pytest.mark.parametrize(
    "module",
    [
        "pipeline",
        "pipeline.config",
        "pipeline.launch",
        "pipeline.cli",
        "pipeline.data.batch",
        "pipeline.planning",
        "pipeline.doctor",
        "pipeline.watch",
    ],
)
def test_importing_stays_free_of_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit(int('torch' in sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def unsafe_loads(source: str) -> list[str]:
    """Calls that run code which a file brings along, if a stranger wrote it."""
    return [
        f"{line}: {text}"
        for line, text, called, given in loads_of(source)
        if (called.endswith("torch.load") and given.get("weights_only") != "True")
        or "allow_pickle" in given
        or re.fullmatch(
            r"(c?[pP]ickle|dill|joblib|marshal|shelve)\.(loads?|open|Unpickler)", called
        )
        or (called == "yaml.load" and given.get("Loader") not in SAFE_LOADERS)
    ]


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=True)", True),
        ("pickle.load(file)", False),
        ("numpy.load(path, allow_pickle=True)", False),
        ("yaml.load(text, Loader=yaml.Loader)", False),
        ("load_file(path)", True),
    ],
)
def test_a_load_that_runs_code_is_recognised(source: str, safe: bool) -> None:
    assert bool(unsafe_loads(source)) != safe


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "ReasonAug").rglob("*.py"))], ids=name)
def test_no_file_that_a_stranger_could_have_written_is_run(path: Path) -> None:
    assert unsafe_loads(path.read_text()) == []


# Where code may be trusted: after the user said so, at a revision that the user pinned; and to show
# that a folder which an export has just written asks for none.
REMOTE_CODE = ("pipeline/model/backbones.py", "pipeline/model/outside_program.py")


def untold_loads(source: str) -> list[str]:
    """Calls into transformers and its kin that would ask whether to run a model's own code."""
    return [
        f"{line}: {text}"
        for line, text, called, given in loads_of(source)
        if re.search(r"(\.from_(pretrained|config)|SentenceTransformer|CrossEncoder)$", called)
        and given.get("trust_remote_code") != "False"
        # An adapter's config is JSON, which names no code.
        and called != "peft.PeftConfig.from_pretrained"
    ]


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("AutoConfig.from_pretrained(path)", False),
        ("AutoModel.from_config(config, trust_remote_code=True)", False),
        ("kind.from_pretrained(path, **more)", False),
        ("SentenceTransformer(path)", False),
        ("AutoModel.from_config(config, trust_remote_code=False)", True),
    ],
)
def test_a_load_that_may_ask_for_a_models_code_is_recognised(source: str, safe: bool) -> None:
    assert bool(untold_loads(source)) != safe


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "ReasonAug").rglob("*.py"))], ids=name)
def test_no_model_is_loaded_with_its_own_code_unless_the_config_says_so(path: Path) -> None:
    untold = untold_loads(path.read_text())
    if name(path) in REMOTE_CODE:
        untold = [call for call in untold if "trust_remote_code=True" not in call]
    assert untold == []


def test_no_module_hides_one_of_python() -> None:
    # Folders that `python FILE` and pytest put first on the module path.
    folders = [ROOT, ROOT / "pipeline", *(p.parent for p in (ROOT / "tests").rglob("*.py"))]
    stems = {path.stem for folder in folders for path in folder.glob("*.py")}
    packages = {path.parent.name for folder in folders for path in folder.glob("*/__init__.py")}

    assert not (stems | packages) & sys.stdlib_module_names


def test_the_top_level_holds_only_the_agreed_names() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    assert {line.split("/")[0] for line in listing.splitlines()} <= TOP_LEVEL


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_shell_scripts_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_that_are_run_are_executable_and_strict(path: Path) -> None:
    text = path.read_text()
    if not text.startswith("#!"):  # sourced, not run
        return

    assert os.access(path, os.X_OK)
    assert re.search(r"^(set -euo pipefail|exec .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_of_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())

    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []


def commands(path: Path) -> str:
    """Return the commands that a document gives, and its quotations."""
    text = path.read_text()
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_named_in_documents_exist(path: Path) -> None:
    folders = "|".join(re.escape(name) for name in TOP_LEVEL if (ROOT / name).is_dir())
    named = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]+\w)", commands(path))

    assert [file for file in named if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=name)
def test_subcommands_named_in_documents_and_scripts_exist(path: Path) -> None:
    text = commands(path) if path in DOCUMENTS else path.read_text()
    root = reference.program("diffembed")

    for first, second in re.findall(r"(?<![\w./-])diffembed ([a-z]+)(?: ([a-z]+))?", text):
        assert first in root.commands
        if isinstance(group := root.commands[first], TyperGroup) and second:
            assert second in group.commands


def test_modules_that_code_in_texts_imports_are_there() -> None:
    """Programs of tests, the card's example, scripts and documents are not seen by a linter."""
    texts = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *SCRIPTS, *DOCUMENTS]
    gone = [
        f"{name(path)}: {module}"
        for path in texts
        for module in re.findall(r"^\s*(?:from|import) (pipeline[.\w]*)", path.read_text(), re.M)
        if not (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
        and not (ROOT / module.replace(".", "/")).is_dir()
    ]
    assert not gone


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by it, and would collect neither."""
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
