"""Check that everything a config names is on this machine, so that its command needs no network.

config of any kind ──kind_of──> model, tokenizer, shards, sources, tasks, exports, outputs
chain ──> its configs, in order; what an earlier stage will make need not exist yet
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import (
    BM25,
    ChainConfig,
    EvaluateConfig,
    EvaluatedModel,
    IndexConfig,
    MineConfig,
    ModelConfig,
    PrepareConfig,
    ProbeConfig,
    SourceConfig,
    StarterConfig,
    TrainConfig,
    load_config,
    local_file,
    model_fix,
    read_tree,
    require_model_path,
)
from pipeline.config.explain import KINDS, kind_of, output_dir
from pipeline.doctor import Finding, fail, guarded, ok, warn
from pipeline.doctor.machine import cache_folders, check_folder
from pipeline.errors import UserError, blame, several
from pipeline.run_folder import RunDir

# The first bytes of the text file that a clone without Git LFS has in place of weights.
_POINTER = b"version https://git-lfs"
_INDEX = "model.safetensors.index.json"
# The entry of a header that is no tensor.
_TEXTS = "__metadata__"
# Folders that earlier stages of a chain will make.
Made = frozenset[Path]


def check_config(path: Path, overrides: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Check that everything that a config of any kind names is there."""
    yield from guarded("config", lambda: _check(path, overrides, frozenset()))


def _check(
    path: Path, overrides: tuple[str, ...], made: Made, stage: str = ""
) -> Iterator[Finding]:
    """Check one config; as a `stage` of a chain it must be of that kind."""
    tree = read_tree(path.expanduser())
    # A synthesis has other keys, which this package does not know.
    if stage == "synthesize" or (not stage and "concepts" in tree and "problems" in tree):
        yield from _synthesis(path, overrides)
        return
    kind = stage or kind_of(path)
    config: Any = load_config(KINDS[kind], path, overrides)
    yield ok("config", f"{path}: a config of {kind}")
    yield from CHECKS[kind](config, made)


def _chain(config: ChainConfig, made: Made) -> Iterator[Finding]:
    stages = [(name, getattr(config, name)) for name in ("synthesize", "prepare", "mine")]
    for name, path in (*stages, ("train", config.train), ("evaluate", config.evaluate)):
        if path is None:
            continue
        yield from guarded(name, partial(_check, path, (), made, name))
        # Only now: a stage must not find its own output as its input.
        made |= _outputs(path, config)
    yield from guarded("deepspeed", lambda: _file(config.deepspeed, "deepspeed"))


def _outputs(path: Path, chain: ChainConfig) -> Made:
    """Return the folders and files that the command of a config makes."""
    try:
        folder = output_dir(path)
    except UserError:
        return frozenset()  # its own check names the fault
    exports = [step.output or RunDir(folder).export for step in chain.exports]
    # `rows.jsonl` is a synthesis's, which a source of `prepare` names.
    return frozenset([folder, folder / "rows.jsonl", *(exports if path == chain.train else ())])


# --- one kind of config each -----------------------------------------------------------------


def _starter(config: StarterConfig, made: Made) -> Iterator[Finding]:
    for path in config.corpus:
        yield from guarded("corpus", partial(_file, path, "corpus"))
    yield from _output(config.output_dir)


def _prepare(config: PrepareConfig, made: Made) -> Iterator[Finding]:
    yield from guarded("tokenizer", lambda: _tokenizer(config.tokenizer))
    for source in config.sources:
        name = f"sources.{source.name}"
        yield from guarded(name, partial(_source, source, made))
    for found in config.decontaminate.sets if config.decontaminate else ():
        name = f"decontaminate.{found.name}"
        yield from guarded(name, partial(_data, found.path, name, found.split))
    yield from _output(config.output_dir)


def _mine(config: MineConfig, made: Made) -> Iterator[Finding]:
    yield from guarded("data", partial(_dataset, config.data, "data", made))
    for retriever in config.retrievers:
        yield from guarded(
            f"retrievers.{retriever.name}",
            partial(_retriever, retriever.path, f"retrievers.{retriever.name}"),
        )
        if retriever.index is not None:
            name = f"retrievers.{retriever.name}.index"
            yield from guarded(name, partial(_index, retriever.index, name))
    for corpus in config.corpora:
        name = f"corpora.{corpus.name}"
        yield from guarded(name, partial(_data, corpus.path, name, corpus.split))
    if (teacher := config.teacher) and teacher.path is not None:
        yield from guarded("teacher.path", partial(_retriever, teacher.path, "teacher.path"))
    if teacher and teacher.key_variable:
        yield from _variable("teacher.key_variable", teacher.key_variable)
    yield from check_folder(config.output, "output")
    if config.store is not None:
        yield from check_folder(config.store, "store")


def _train(config: TrainConfig, made: Made) -> Iterator[Finding]:
    yield from guarded("model.path", lambda: _model(config.model))
    yield from guarded("data.path", lambda: _shards(config, made))
    yield from _output(config.output_dir)
    yield from guarded("output_dir", lambda: _owned(config.output_dir))
    if config.checkpoint.mirror is not None:
        yield from check_folder(config.checkpoint.mirror, "checkpoint.mirror")
    if config.evaluate is not None:
        path = config.evaluate.config
        # Checkpoints take the place of its last model.
        models = load_config(EvaluateConfig, path).models[-1:]
        made |= {model.path for model in models}
        yield from guarded("evaluate.config", lambda: _check(path, (), made))


def _evaluate(config: EvaluateConfig, made: Made) -> Iterator[Finding]:
    for model in config.models:
        yield from guarded(f"models.{model.name}", partial(_export, model, made))
    yield from guarded("tasks", lambda: _tasks(config))
    yield from _output(config.output_dir)


def _probe(config: ProbeConfig, made: Made) -> Iterator[Finding]:
    model = EvaluatedModel(name="model", path=config.model)
    yield from guarded("model", lambda: _export(model, made))
    for key, path in (("train", config.train), ("test", config.test)):
        yield from guarded(key, partial(_file, path, key))
    yield from _output(config.output_dir)


def _synthesis(path: Path, overrides: tuple[str, ...]) -> Iterator[Finding]:
    from pipeline.submission.serving import describe_synthesis

    state = describe_synthesis((str(path), *overrides))
    yield ok("config", f"{path}: a synthesis by {state.model}")
    if state.api_key_env:
        yield from _variable("model.servers", state.api_key_env)
    yield from _output(state.output_dir)


# --- parts -----------------------------------------------------------------------------------


def _output(folder: Path) -> Iterator[Finding]:
    yield from guarded("output_dir", lambda: check_folder(folder, "output_dir"))


def _owned(folder: Path) -> Iterable[Finding]:
    RunDir(folder).require_own()
    return ()


def _file(path: Path, key: str) -> Iterator[Finding]:
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix=f"correct {key}")
    yield ok(key, str(path))


def _variable(key: str, name: str) -> Iterator[Finding]:
    """Check that the variable with the key of a server is set; its value is never shown."""
    if os.environ.get(name):
        yield ok(key, f"{name} is set")
    else:
        yield fail(key, f"{name} is not set", f"export {name}=..., the key of the servers")


def _retriever(path: str, key: str) -> Iterator[Finding]:
    if path == BM25:
        from pipeline.mining.plan import require_bm25

        yield ok(key, f"{path}: bm25s {require_bm25(key=key)}")
        return
    size = _weights(path, None, key=key)
    yield ok(key, f"{path}: {size / 1e9:.2f} GB")


def _index(settings: IndexConfig, key: str) -> Iterator[Finding]:
    from pipeline.mining.plan import require_index

    require_index(settings, key=key)
    yield ok(key, settings.factory)


def _model(config: ModelConfig) -> Iterator[Finding]:
    size = _weights(config.path, config.revision)
    yield ok("model.path", f"{config.path}: {size / 1e9:.2f} GB")
    adapters = [*config.merged_adapters, *([config.adapter] if config.adapter else [])]
    for adapter in adapters:
        require_model_path(adapter, key="model.adapter")
        if local_file(adapter, "adapter_config.json") is None:
            raise UserError(
                f"model.adapter: no adapter_config.json in {adapter}", fix=model_fix(adapter)
            )
        yield ok("model.adapter", adapter)
    yield from guarded("tokenizer", lambda: _tokenizer(config.path))


def _weights(path: str, revision: str | None, *, key: str = "model.path") -> int:
    """Return the bytes of a model's weights on this machine.

    Raises:
        UserError: a file of it is missing, or a pointer of Git LFS.
    """
    require_model_path(path, key=key)
    if local_file(path, "config.json", revision) is None:
        raise UserError(f"{key}: no config.json in {path}", fix=model_fix(path))
    names = ["model.safetensors"]
    # An index names every file; without one, a folder's only file may have any name.
    if index := local_file(path, _INDEX, revision):
        with blame(f"{key}: {index}: damaged", fix=model_fix(path)):
            names = sorted({str(n) for n in json.loads(index.read_text())["weight_map"].values()})
    elif own := sorted(Path(path).glob("*.safetensors")):
        names = [file.name for file in own]
    files = {name: local_file(path, name, revision) for name in names}
    if missing := [name for name, file in files.items() if file is None]:
        raise UserError(f"{key}: {path} lacks {', '.join(missing)}", fix=model_fix(path))
    return sum(_whole_size(file, path, key) for file in files.values() if file)


def _whole_size(file: Path, path: str, key: str) -> int:
    """Return the size of a file of weights, which must be what its header says.

    Raises:
        UserError: it is a pointer of Git LFS, or was cut off while it was copied.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{key}: {file} is a Git LFS pointer", fix=model_fix(path))
        opened.seek(0)
        with blame(f"{key}: {file}: not safetensors, or cut off", fix=model_fix(path)):
            # The length of the header in 8 bytes, the header, then the tensors.
            length = int.from_bytes(opened.read(8), "little")
            if length > size:
                raise ValueError(f"{size:,} bytes, a header of {length:,}")
            header = json.loads(opened.read(length))
            ends = [found["data_offsets"][1] for name, found in header.items() if name != _TEXTS]
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        found = f"{key}: {file} has {size:,} bytes, by its header {wanted:,}"
        raise UserError(found, fix=model_fix(path))
    return size


def _tokenizer(path: str) -> Iterator[Finding]:
    """Find the files of a tokenizer; it is not loaded, which would take seconds."""
    require_model_path(path, key="tokenizer")
    known = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
    found = next((name for name in known if local_file(path, name)), None)
    if found is None:
        raise UserError(f"tokenizer: none of {', '.join(known)} in {path}", fix=model_fix(path))
    yield ok("tokenizer", f"{path}: {found}")


def _shards(config: TrainConfig, made: Made) -> Iterator[Finding]:
    from pipeline.data.shards import Dataset
    from pipeline.submission.chain import require_shards

    path = config.data.path
    if path not in made or Dataset.exists(path):
        # Also compares the tokenizer of the shards with the model's.
        require_shards(config)
    yield from _dataset(path, "data.path", made)


def _dataset(path: Path, key: str, made: Made) -> Iterator[Finding]:
    from pipeline.data.shards import Dataset

    if path in made and not Dataset.exists(path):
        yield ok(key, f"{path}: made by an earlier stage")
        return
    number = Dataset.open(path).manifest.num_examples
    yield ok(key, f"{path}: {number:,} examples")


def _source(source: SourceConfig, made: Made) -> Iterator[Finding]:
    key = f"sources.{source.name}"
    if Path(source.path) in made and not Path(source.path).exists():
        yield ok(key, f"{source.path}: made by an earlier stage")
        return
    yield from _data(source.path, key, source.split)
    if source.documents is not None:
        yield from _data(source.documents, f"{key}.documents", None)


def _data(path: str, key: str, split: str | None) -> Iterator[Finding]:
    from pipeline.data.sources.paths import HUB, choose_files

    name = path.removeprefix(HUB)
    if path.startswith(HUB) and not Path(name).exists():
        yield _hub_data(name, key)
        return
    if "://" in path and not path.startswith("file://"):
        yield warn(
            key, f"{path}: not on this machine, needs a network", "download it, and give the path"
        )
        return
    files = choose_files(path, key, split=split).files
    yield ok(key, f"{path}: {len(files)} files".replace(": 1 files", ""))


def _hub_data(name: str, key: str) -> Finding:
    """Look for a data set of the hub in the two caches in which it may be."""
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub.file_download import repo_folder_name

    repository, _, _ = name.partition(":")  # REPOSITORY:SUBSET
    caches = cache_folders()
    # `datasets`, which prepared it, keeps it as OWNER___NAME with the name in snake case; the hub's
    # client as datasets--OWNER--NAME.
    *owner, base = repository.split("/")
    prepared = "___".join([*owner, camelcase_to_snakecase(base)])
    fetched = repo_folder_name(repo_id=repository, repo_type="dataset")
    hub = Path(os.environ.get("HF_HUB_CACHE") or caches["HF_HOME"] / "hub")
    # The hub takes OWNER/NAME in any case.
    places = {caches["HF_DATASETS_CACHE"]: prepared.lower(), hub: fetched.lower()}
    if any(path.name.lower() == name for place, name in places.items() for path in place.glob("*")):
        return ok(key, f"hub:{name}: in the local cache")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return Finding(
        key,
        "fail" if offline else "warn",
        f"hub:{name}: not in the local cache"
        + (", and HF_HUB_OFFLINE is set" if offline else ", needs a network"),
        f"run `hf download --repo-type dataset {repository}` where there is a network",
    )


def _export(model: EvaluatedModel, made: Made) -> Iterator[Finding]:
    key = f"models.{model.name}"
    weights = any(model.path.glob("*.safetensors"))
    if model.path in made and not weights:
        yield ok(key, f"{model.path}: made by an earlier stage")
    elif not weights:
        raise UserError(
            f"{model.path}: {'no weights in it' if model.path.is_dir() else 'no such folder'}",
            fix="run `diffembed export` with the training's config, or name another export",
        )
    else:
        yield ok(key, str(model.path))


def _tasks(config: EvaluateConfig) -> Iterator[Finding]:
    from pipeline.evaluation.tasks import check_names, tasks_of

    check_names(config)
    tasks = tasks_of(config)
    for name, own in tasks.items():
        if own is not None and not own.path.is_dir():
            raise UserError(
                f"tasks.{name}: {own.path} is not a folder",
                fix="give a folder with corpus, queries and qrels",
            )
    of_mteb = {name: None for name, own in tasks.items() if own is None}
    # Only mteb knows the data sets of its tasks, and `prefetch` puts them below snapshots.
    if of_mteb and config.snapshots is None:
        number = several(len(of_mteb), "task")
        found = f"data of {number} are read from the hub's cache, which is not checked"
        fix = "set snapshots, and run `diffembed evaluate prefetch`"
        yield warn("tasks", found, fix)
        return
    if of_mteb:
        from pipeline.evaluation.datasets import check_tasks

        check_tasks(of_mteb, config.snapshots)
    yield ok("tasks", f"the data of {len(tasks)} tasks are here")


# By the kind of config; every kind has one.
CHECKS: dict[str, Callable[[Any, Made], Iterator[Finding]]] = {
    "starter": _starter,
    "prepare": _prepare,
    "mine": _mine,
    "train": _train,
    "evaluate": _evaluate,
    "probe": _probe,
    "chain": _chain,
}
