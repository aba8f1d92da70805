"""Count the tokens of an evaluation's texts with the models' own tokenizers; loads mteb.

tasks --load_texts--> texts --tokenizer of each model--> lengths, uncut
                            --digest, as in a written plan--> each distinct text once
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import EvaluateConfig, EvaluatedModel, Role
from pipeline.evaluation.distinct_texts import byte_sizes, digests, effective_lengths
from pipeline.evaluation.tasks import instruction_for, lengths_of, list_elements, tasks_of
from pipeline.planning.text_sizes import TaskSizes, Texts
from pipeline.tokenizer import load_tokenizer

# Texts of one call of a tokenizer.
_BATCH = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CountedTexts:
    """The texts of an evaluation, counted.

    Attributes:
        sizes: by model and task, uncut; queries with their template and instruction.
        distinct: by model, each distinct text of all its tasks and lengths once, cut.
    """

    sizes: dict[tuple[str, str], TaskSizes]
    distinct: dict[str, Texts]


def count_texts(config: EvaluateConfig) -> CountedTexts:
    """Load every task once and count its texts for every model.

    Raises:
        UserError: the data of a task or the tokenizer of a model are missing.
    """
    # Not at the top: both load torch.
    from pipeline.evaluation.datasets import load_texts
    from pipeline.model.load_export import read_template

    tokenizers = {model.name: load_tokenizer(str(model.path)) for model in config.models}
    templates = {model.name: model.template or read_template(model.path) for model in config.models}
    every = sorted({element.max_length for element in list_elements(config)})
    sizes: dict[tuple[str, str], TaskSizes] = {}
    found: dict[str, list[tuple[NDArray[np.uint64], NDArray[np.int64]]]] = {}
    for task, own in tasks_of(config).items():
        documents, queries = load_texts(task, snapshots=config.snapshots, own=own)
        for model in config.models:
            counted = []
            for role, texts, instruction in _roles(documents, queries, task, model, config):
                frame = templates[model.name].frame(role, instruction)
                lengths_N = count_tokens(tokenizers[model.name], texts, *frame)
                counted.append(Texts.counted(lengths_N))
                column = pa.array(texts, type=pa.large_string())
                bytes_N = byte_sizes(column)
                for wanted in lengths_of(config, task):
                    limits_N = effective_lengths(instruction, bytes_N, wanted, every)
                    names_N = digests(role, instruction, column, limits_N)[:, 0]
                    found.setdefault(model.name, []).append(
                        (names_N, np.minimum(lengths_N, wanted))
                    )
            sizes[model.name, task] = TaskSizes(
                documents=counted[0], queries=counted[1], distinct=1.0, origin="counted"
            )
    return CountedTexts(
        sizes=sizes, distinct={name: _distinct(parts) for name, parts in found.items()}
    )


def _roles(
    documents: list[str], queries: list[str], task: str, model: EvaluatedModel,
    config: EvaluateConfig,
) -> tuple[tuple[Role, list[str], str], ...]:  # fmt: skip
    return (
        ("document", documents, ""),
        ("query", queries, instruction_for(task, model, config)),
    )


def count_tokens(
    tokenizer: Any, texts: Sequence[str], prefix: str, suffix: str
) -> NDArray[np.int64]:
    """Return (N,) tokens of texts between prefix and suffix, special tokens included."""
    lengths: list[int] = []
    for start in range(0, len(texts), _BATCH):
        strings = [prefix + text + suffix for text in texts[start : start + _BATCH]]
        lengths += map(len, tokenizer(strings, verbose=False)["input_ids"])
    # Of an empty text one token is made, because pooling needs one.
    return np.maximum(np.array(lengths, np.int64), 1)


def _distinct(parts: Sequence[tuple[NDArray[np.uint64], NDArray[np.int64]]]) -> Texts:
    names_N, lengths_N = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    _, first = np.unique(names_N, return_index=True)
    return Texts.counted(lengths_N[first])
