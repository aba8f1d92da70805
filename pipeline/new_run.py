"""Write the configs of a first run from four answers: model, data, GPUs, goal.

    faq.jsonl, MiniLM, 0 GPUs, search  ──>  DIR/data.yaml      for `diffembed prepare`
                                            DIR/train.yaml     for `diffembed train`
                                            DIR/evaluate.yaml  scores before and after

Every number comes with its reason. Fields of the data are recognised by common names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.config import (
    PrepareConfig,
    SourceConfig,
    TrainConfig,
    dump_yaml,
    load_config,
    local_file,
    model_fix,
    require_model_path,
)
from pipeline.data.sources import FORMATS, plan_source
from pipeline.data.sources.containers import read_records
from pipeline.errors import UserError
from pipeline.files import atomic_path, require_writable
from pipeline.model_limits import limits_of
from pipeline.planning.architecture import read_architecture

Goal = Literal["search", "instructions", "long"]
# Names of fields in public data sets, by our column; a `*` joins several fields. The first that is
# there is taken, so that general names come last.
_NAMES = {
    "query": ("query", "question", "anchor", "sentence1", "prompt", "input", "title"),
    "positives": (
        *("positives", "positive", "pos", "positive_*", "answers", "answer", "document"),
        *("passage", "context", "response", "sentence2", "output", "text", "body"),
    ),
    "negatives": (
        *("negatives", "negative", "neg", "hard_negatives", "hard_negative", "negative_*"),
        *("neg_*", "hard_negative_*"),
    ),
    "instruction": ("instruction", "task_description"),
}
# Fields that say by a number whether, or how well, the two texts of a row match.
_LABELS = (
    *("label", "labels", "is_duplicate", "is_relevant", "relevance", "score", "scores"),
    *("similarity", "similarity_score", "relatedness_score"),
)
_SOURCE = "data"  # in data.yaml, and before `-holdout` in the name of the task to score
_HELD_OUT = 0.1
_LEAST_HELD_OUT = 10  # fewer questions show no difference between two models
_COUNTED_ROWS = 200_000  # more rows than that need not be counted to choose a batch
_LORA_PARAMETERS = 1.5e9  # full fine-tuning of larger models needs 16 bytes each over all GPUs
_UNKNOWN_LENGTH = 512  # of a model that does not state its longest text
# Tokens of a query and of a document, by goal.
_MAX_TOKENS = {"search": (128, 512), "instructions": (256, 512), "long": (512, 8192)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The four answers, the names of fields that cannot be guessed, and the share to score.

    Attributes:
        holdout: share of the documents to keep out of training; None holds a tenth out, unless
            that would be too few to show anything; 0 holds none out.
    """

    model: str  # a folder, or a model name in the local cache
    data: str  # a file, folder, glob or hub data set
    num_gpus: int
    goal: Goal
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    holdout: float | None = None


def write_run(folder: Path, answers: Answers) -> list[Path]:
    """Write data.yaml, train.yaml and, if rows are held out, evaluate.yaml; return their paths.

    Raises:
        UserError: the folder holds such files, the model or data cannot be read, or no field of
            the data is a query or a document.
    """
    data, train, evaluate = (folder / f"{name}.yaml" for name in ("data", "train", "evaluate"))
    for path in (data, train, evaluate):
        if path.exists():
            raise UserError(f"{path} exists", fix="give another folder, or remove the file")
    model = _read_model(answers.model)
    rows = _read_data(answers)
    num_rows, columns = rows.num_rows, rows.columns
    holdout = answers.holdout
    if holdout is None:
        holdout = _HELD_OUT if _HELD_OUT * num_rows >= _LEAST_HELD_OUT else 0.0
    require_writable(folder, key="the folder of the configs")
    # All before the first is written, so that an error leaves no half of a run behind.
    texts = {
        data: _prepare_text(folder, answers, rows, model.max_tokens, holdout),
        train: _train_text(
            folder, answers, model, num_rows, holdout, has_negatives=rows.has_negatives
        ),
    }
    if holdout:
        texts[evaluate] = _evaluate_text(folder, answers, columns, model.max_tokens)
    if rows.unread:
        print(f"init: fields that are not read: {', '.join(rows.unread)}", file=sys.stderr)
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    # The commands must accept what was written; `prepare` writes what evaluate.yaml extends.
    load_config(PrepareConfig, data)
    load_config(TrainConfig, train)
    return list(texts)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    num_parameters: int
    max_tokens: int


def _read_model(path: str) -> _Model:
    """Read size and longest text from a model's config.json."""
    require_model_path(path, key="--model")
    file = local_file(path, "config.json")
    if file is None:
        raise UserError(f"--model: no config.json in {path}", fix=model_fix(path))
    try:
        tree = json.loads(file.read_text())
        architecture = read_architecture(tree)
        # A model with its own code may have other keys, and a missing one counts as 1: a model of
        # one layer would be taken for small.
        if architecture.block is None and not {"num_hidden_layers", "vocab_size"} <= tree.keys():
            raise KeyError("num_hidden_layers")
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"--model: {file} does not say its width, layers and vocabulary", fix=model_fix(path)
        ) from error
    return _Model(
        num_parameters=architecture.num_layers * architecture.layer_parameters
        + architecture.outer_parameters,
        max_tokens=limits_of(tree, path).trained_length or _UNKNOWN_LENGTH,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """The user's rows, as far as the configs depend on them.

    Attributes:
        num_rows: with a positive; counted up to a limit.
        columns: the field of each of our columns.
        has_negatives: whether queries have their own negatives.
        unread: fields that no column reads.
    """

    num_rows: int
    columns: dict[str, str]
    has_negatives: bool
    unread: tuple[str, ...]


def _read_data(answers: Answers) -> _Rows:
    """Count rows, up to a limit, and find the fields that hold queries and documents."""
    source = SourceConfig(name=_SOURCE, format="columns", path=answers.data)
    records = itertools.islice(_records(source), _COUNTED_ROWS)
    first = next(records, None)
    if not isinstance(first, Mapping):
        raise UserError(
            f"--data: {answers.data} holds no rows with fields",
            allowed="JSON lines, CSV, TSV, Parquet, Arrow, or a data set of the hub",
            fix=f"for other layouts ({', '.join(FORMATS)}) see docs/data.md",
        )
    # Of all rows: in JSON lines, the first may lack a field that others have.
    fields: dict[str, None] = {}
    labels = _Labels()
    num_rows = 0
    for record in itertools.chain([first], records):
        fields.update(dict.fromkeys(record))
        labels.add(record)
        num_rows += 1
    columns = find_columns(list(fields), answers.columns)
    has_negatives = "negatives" in columns
    # A choice of the user's stands: all rows are pairs that match.
    name = (
        None if has_negatives or "positives" in answers.columns else labels.find(columns, num_rows)
    )
    if name is not None:
        documents = columns.pop("positives")
        columns |= {"documents": documents, "labels": name}
        num_rows, has_negatives = labels.matching[name], labels.has_lists[name]
    read = [*columns.values(), *(path.partition(".")[0] for path in columns.values())]
    unread = (field for field in fields if not any(fnmatch.fnmatchcase(field, of) for of in read))
    return _Rows(
        num_rows=num_rows, columns=columns, has_negatives=has_negatives, unread=tuple(unread)
    )


class _Labels:
    """Fields of labels, by which rows whose texts do not match can be told."""

    def __init__(self) -> None:
        self.matching: dict[str, int] = {}  # rows with a 1, by field
        self.has_lists: dict[str, bool] = {}  # a label for each of several documents
        self._values: dict[str, set[str]] = {}
        self._rows: dict[str, int] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a row's values."""
        for field in record:
            if field.lower() not in _LABELS or not self._values.get(field, set()) <= _BINARY:
                continue
            try:
                value = record[field]
            except UserError:  # a cell of a table that cannot be decoded
                value = None
            is_list = isinstance(value, list)
            # As texts, which all cells of a delimited file are.
            found = {str(item) for item in (value if is_list else [value])}
            # Lists in some rows only are no labels; the mark is in no set of labels.
            if self.has_lists.setdefault(field, is_list) != is_list:
                found.add("")
            self._values[field] = self._values.get(field, set()) | found
            self._rows[field] = self._rows.get(field, 0) + 1
            is_match = bool(found & _MATCH)
            self.matching[field] = self.matching.get(field, 0) + is_match

    def find(self, columns: Mapping[str, str], num_rows: int) -> str | None:
        """Return the first field that has both zeros and ones, and no other value, in all rows."""
        for field, values in self._values.items():
            whole = values <= _BINARY and self._rows[field] == num_rows
            if whole and values & _MATCH and values - _MATCH and field not in columns.values():
                return field
        return None


_MATCH = {"1", "1.0", "True"}
_BINARY = {*_MATCH, "0", "0.0", "False"}


def _records(source: SourceConfig) -> Iterator[Mapping[str, Any]]:
    for block in plan_source(source, block_bytes=16 * 2**20):
        # Bad records are left to `prepare`, which reports all of them at once.
        for record in read_records(block, split=source.split, on_bad=lambda bad: None):
            yield record.value


def find_columns(fields: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Return the field of each column: as given, or recognised by a common name.

    Args:
        fields: of the records.
        given: the user's own choices, by column.

    Raises:
        UserError: a given field does not exist, or none is a query or a positive.
    """
    found: dict[str, str] = {}
    for column, names in _NAMES.items():
        if column in given:
            # Of a path into a field, `prepare` reads the rest.
            first = given[column].partition(".")[0]
            if first not in fields and not fnmatch.filter(fields, given[column]):
                raise UserError(
                    f"--{column.removesuffix('s')}: no field {given[column]!r}",
                    allowed=", ".join(fields),
                )
            found[column] = given[column]
            continue
        # A field serves one column: `title` is no query where --positive names it.
        taken = {*found.values(), *given.values()}
        lowered = {field.lower(): field for field in fields if field not in taken}
        for name in names:
            if "*" in name and (matching := fnmatch.filter(lowered, name)):
                # In the data's own letters: `prepare` tells Negative_1 from negative_1.
                found[column] = lowered[matching[0]][: name.index("*")] + "*"
            elif name in lowered:
                found[column] = lowered[name]
            if column in found:
                break
    for column, flag in (("query", "--query"), ("positives", "--positive")):
        if column not in found:
            raise UserError(
                f"--data: no field looks like a {column.rstrip('s')}",
                allowed=f"one of {', '.join(fields)}",
                fix=f"name it: {flag} FIELD (other layouts: {', '.join(FORMATS)}; docs/data.md)",
            )
    return found


# --- the text of each file -------------------------------------------------------------------


def _prepare_text(
    folder: Path,
    answers: Answers,
    rows: _Rows,
    model_tokens: int,
    holdout: float,
) -> str:
    columns = rows.columns
    query, document = _max_tokens(answers, model_tokens)
    instructed = _is_instructed(answers, columns)
    # Without an instruction the words of the template would be noise in every query.
    template = "" if instructed else 'template: {query: "{text}"}\n'
    # A field that has our name is found without being listed.
    listed = ("documents", "labels")
    named = {name: field for name, field in columns.items() if name != field or name in listed}
    source: dict[str, Any] = {"name": _SOURCE, "format": "columns", "path": answers.data}
    source |= {"columns": named} if named else {}
    if instructed and "instruction" not in columns:
        source["instruction"] = "Retrieve texts that answer the query"  # for the user to reword
    # Said, because a field may decide what a row means: how well two texts match, for example.
    unread = f"# Fields that are not read: {', '.join(rows.unread)}\n" if rows.unread else ""
    return f"""\
# Raw rows to tokenised shards: `diffembed prepare {folder / "data.yaml"}`.
# `diffembed config explain KEY` explains any key; docs/data.md lists other layouts of data.
output_dir: {_quote(folder / "shards")}
tokenizer: {_quote(answers.model)}
{unread}{dump_yaml({"sources": [source]})}{template}\
# Tokens; longer texts are cut and counted. The report of `prepare` shows how many.
max_query_length: {query}
max_document_length: {document}
# Share of the documents to keep out of training, with the rows that ask for them.
{"" if holdout else "# "}holdout: {holdout or _HELD_OUT}
"""


def _max_tokens(answers: Answers, model_tokens: int) -> tuple[int, int]:
    query, document = _MAX_TOKENS[answers.goal]
    return min(query, model_tokens), min(document, model_tokens)


def _is_instructed(answers: Answers, columns: Mapping[str, str]) -> bool:
    return "instruction" in columns or answers.goal == "instructions"


def _evaluate_text(
    folder: Path, answers: Answers, columns: Mapping[str, str], model_tokens: int
) -> str:
    if _is_instructed(answers, columns):
        # Instructions are known once the rows are read.
        tasks = "extends: [shards/holdout/evaluate.yaml]  # written by `diffembed prepare`\n"
    else:
        name = f"{_SOURCE}-holdout"
        tasks = f"""\
tasks:
  - {{name: {name}, path: {_quote(folder / "shards" / "holdout" / name)}}}
instructions: {{{name}: ""}}  # as in training: none
max_length: {_max_tokens(answers, model_tokens)[1]}
"""
    return f"""\
# The model before and after training, on the rows that `diffembed prepare` held out:
#   diffembed export {folder / "train.yaml"}
#   diffembed export {folder / "train.yaml"} --checkpoint init --output {folder / "before"}
#   diffembed evaluate run {folder / "evaluate.yaml"}
#   diffembed report {folder / "evaluate.yaml"}
output_dir: {_quote(folder / "scores")}
models:
  - {{name: before, path: {_quote(folder / "before")}}}
  - {{name: after, path: {_quote(folder / "run" / "export")}}}
{tasks}\
training_run: {_quote(folder / "run")}
"""


def _train_text(
    folder: Path,
    answers: Answers,
    model: _Model,
    num_rows: int,
    holdout: float,
    *,
    has_negatives: bool,
) -> str:
    trained = math.ceil((1 - holdout) * num_rows)
    batch = _batch_size(trained, answers.num_gpus)
    epochs = 1 if trained >= 50_000 else 3  # few rows take several epochs to fill a hundred steps
    steps = max(1, math.ceil(epochs * trained / batch))
    rows = f"{trained:,}" if num_rows < _COUNTED_ROWS else f"more than {trained:,}"
    lora = model.num_parameters > _LORA_PARAMETERS
    weights = (
        "  lora: {rank: 16, alpha: 32}  # trains an adapter: the model is large\n" if lora else ""
    )
    return f"""\
# `diffembed train {folder / "train.yaml"}`; add --dry-run to see memory and arithmetic first.
# The same command resumes after any interruption.
output_dir: {_quote(folder / "run")}
num_steps: {steps}  # {epochs} x {rows} rows / {batch} queries a step
model:
  path: {_quote(answers.model)}
  dtype: {"bfloat16" if answers.num_gpus else "float32"}
{weights}\
data:
  path: {_quote(folder / "shards")}
  global_batch_size: {batch}  # every query is contrasted with all documents of the batch
  num_hard_negatives: {int(has_negatives)}
chunks:
  max_tokens: {8192 if answers.num_gpus else 4096}  # of one forward: memory, never the gradient
loss:
  temperature: {0.02 if has_negatives else 0.05}
optimizer:
  lr: {"1.0e-4" if lora else "2.0e-5"}
  warmup_steps: {steps // 10}
checkpoint:
  every: {max(1, min(100, steps // 4))}
"""


def _batch_size(num_rows: int, num_gpus: int) -> int:
    """Return a power of two: large, but small enough for a hundred steps or so in three epochs."""
    most = 1024 if num_gpus else 64
    # 3 epochs x rows / (rows / 32) = 96 steps, or more where the power of two is below. Fewer than
    # 16 queries would be too few negatives for each other.
    wanted = max(16, int(2 ** math.floor(math.log2(max(2, num_rows / 32)))))
    return max(2, min(most, wanted, num_rows))


def _quote(path: object) -> str:
    # A JSON string is a quoted YAML string.
    return json.dumps(str(path), ensure_ascii=False)
