"""Score positives, candidates and kept negatives with a stronger model.

    cross_encoder   (query, document) pairs through sentence-transformers' CrossEncoder
    bi_encoder      products of stored vectors, which the dataset can hold, too
    endpoint        a server's rerank route: one request for each query

The key of an endpoint comes from the environment and is written nowhere.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tenacity
from numpy.typing import NDArray

from pipeline.config import TeacherConfig
from pipeline.data.batch import IntArray, Ragged
from pipeline.errors import MachineError, UserError, blame
from pipeline.evaluation.models import device_here, resolve_precision, share_cores
from pipeline.files import load_arrays, map_vectors, save_arrays
from pipeline.mining.pick import read_picked
from pipeline.mining.plan import Mining
from pipeline.mining.retrieve import embed_block, open_corpus, score_listed
from pipeline.mining.texts import positives_of, read_texts

_FIX = "run `diffembed mine` again"
# Requests to an endpoint at a time, and documents of one request.
_REQUESTS = 8
_DOCUMENTS = 256
_SECONDS = 300
_ATTEMPTS = 6


def settings_of(teacher: TeacherConfig) -> tuple[Any, int | None, Any]:
    """Return the settings of a bi-encoder that decide its vectors."""
    return teacher.template, teacher.max_length, teacher.precision


def embedding_tasks(mining: Mining) -> list[tuple[str, int]]:
    """Return role and block of each task of a bi-encoder; none for other teachers."""
    teacher = mining.config.teacher
    if teacher is None or teacher.kind != "bi_encoder":
        return []
    sides = (("documents", mining.document_blocks), ("queries", mining.query_blocks))
    return [(role, block) for role, blocks in sides for block in range(len(blocks))]


def embed_teacher_block(mining: Mining, task: int) -> None:
    """Write the teacher's vectors of one block of documents or queries."""
    role, block = embedding_tasks(mining)[task]
    teacher, model = mining.config.teacher, mining.plan.teacher
    assert teacher is not None and model is not None
    embed_block(mining, model, settings_of(teacher), role, block)


def score_block(mining: Mining, task: int) -> None:
    """Write the teacher's scores of one block: positives, kept negatives and candidates.

    Raises:
        UserError: a score is not finite.
    """
    lists = scored_lists(mining, task)
    teacher = mining.config.teacher
    assert teacher is not None
    if teacher.kind == "bi_encoder":
        scores = _score_vectors(mining, task, lists)
    else:
        scores = _score_texts(mining, teacher, task, lists)
    queries = read_texts(mining, "queries", task)["text"]
    for part, values in zip(lists.values(), scores, strict=True):
        # NaN compares false with every margin: such a candidate would be kept silently.
        broken = ~np.isfinite(values)
        if broken.any():
            row = int(part.rows[int(np.argmax(broken))])
            raise UserError(
                f"teacher {mining.plan.teacher.folder if mining.plan.teacher else ''}: "
                f"{broken.sum()} of {len(values)} scores are not finite, the first for the query "
                f"{queries[row].as_py()[:60]!r}",
                fix="compute in precision float32, or take another teacher",
            )
    named = dict(zip(lists, scores, strict=True))
    save_arrays(mining.block_file("teacher", task), **named)


def scored_lists(mining: Mining, task: int) -> dict[str, Ragged]:
    """Return the documents that the teacher scores: a row for each query of a block."""
    ids = mining.query_blocks[task].numbers
    picked = read_picked(mining, task)
    lists = {
        "positives": positives_of(mining, ids),
        "candidates": Ragged(offsets=picked["offsets"], values=picked["documents"]),
    }
    if mining.config.keep_negatives:
        lists["negatives"] = mining.source.examples.ragged("negatives", ids)
    return lists


def read_scores(mining: Mining, block: int) -> dict[str, NDArray[np.float64]]:
    """Return the scores of a block, value for value of `scored_lists`."""
    path = mining.block_file("teacher", block)
    names = ["positives", "candidates"] + ["negatives"] * mining.config.keep_negatives
    return load_arrays(path, *names, fix=f"delete {path} and {_FIX}")


def _score_vectors(
    mining: Mining, task: int, lists: dict[str, Ragged]
) -> list[NDArray[np.float64]]:
    model = mining.plan.teacher
    assert model is not None
    path = mining.vectors(model, "queries", task)
    queries_QD = map_vectors(path, fix=f"delete {path} and {_FIX}")
    corpus = open_corpus(mining, model)
    return [score_listed(corpus, queries_QD, part) for part in lists.values()]


def _score_texts(
    mining: Mining, teacher: TeacherConfig, task: int, lists: dict[str, Ragged]
) -> list[NDArray[np.float64]]:
    queries = read_texts(mining, "queries", task)["text"].to_pylist()
    texts = document_texts(mining, np.concatenate([part.values for part in lists.values()]))
    rows = [
        [texts[number] for part in lists.values() for number in part[row].tolist()]
        for row in range(len(queries))
    ]
    model = mining.plan.teacher
    assert model is not None
    scores = score_rows(teacher, model.folder, queries, rows)
    # Scores of a query stand one list after another; `ends` cuts them into the lists again.
    ends = np.cumsum(
        [[len(part[row]) for part in lists.values()] for row in range(len(queries))], 1
    )
    return [
        np.concatenate(
            [
                values[(end[number - 1] if number else 0) : end[number]]
                for values, end in zip(scores, ends, strict=True)
            ]
        )
        for number in range(len(lists))
    ]


def document_texts(mining: Mining, documents: IntArray) -> dict[int, str]:
    """Return the bare texts of documents by their numbers."""
    wanted = np.unique(documents)
    found: dict[int, str] = {}
    for number, block in enumerate(mining.document_blocks):
        start, stop = np.searchsorted(wanted, [block.first, block.numbers[-1] + 1])
        if start < stop:
            numbers = wanted[start:stop]
            column = read_texts(mining, "documents", number)["text"].take(numbers - block.first)
            found |= zip(numbers.tolist(), column.to_pylist(), strict=True)
    return found


def score_rows(
    teacher: TeacherConfig, folder: str, queries: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]]:
    """Return the scores of each query's documents."""
    if teacher.kind == "cross_encoder":
        model = _load_cross_encoder(
            folder, teacher.max_length, resolve_precision(teacher.precision)
        )
        # All pairs of the block in one call, so that its batches are full.
        pairs = [(query, text) for query, row in zip(queries, rows, strict=True) for text in row]
        with blame(f"teacher: {folder} cannot score pairs", fix="give a model with one output"):
            values = np.asarray(
                model.predict(pairs, show_progress_bar=False, convert_to_numpy=True)
            ).astype(np.float64)
            if values.shape != (len(pairs),):
                raise ValueError(f"{values.shape[1:]} outputs for a pair")
        return np.split(values, np.cumsum([len(row) for row in rows])[:-1])
    _require_key(teacher)
    # Threads, because they only wait; `map` keeps the order of the queries.
    with ThreadPoolExecutor(_REQUESTS) as pool:
        answers = pool.map(functools.partial(_rerank, teacher), queries, rows)
        return [np.array(answer, dtype=np.float64) for answer in answers]


@functools.lru_cache(maxsize=1)
def _load_cross_encoder(folder: str, max_length: int | None, precision: str) -> Any:
    from sentence_transformers import CrossEncoder

    share_cores()
    with blame(
        f"teacher.path: {folder}", allowed="a folder that sentence-transformers' CrossEncoder reads"
    ):
        return CrossEncoder(
            folder,
            device=str(device_here()),
            max_length=max_length,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": precision},
        )


def _require_key(teacher: TeacherConfig) -> str | None:
    if teacher.key_variable is None:
        return None
    key = os.environ.get(teacher.key_variable)
    if not key:
        raise UserError(
            f"teacher.key_variable: {teacher.key_variable} is not set in the environment",
            fix="export it before the command",
        )
    return key


def _rerank(teacher: TeacherConfig, query: str, documents: Sequence[str]) -> list[float]:
    """Ask the endpoint for the scores of one query's documents."""
    scores: list[float] = []
    for start in range(0, len(documents), _DOCUMENTS):
        scores += _ask(teacher, query, documents[start : start + _DOCUMENTS])
    return scores


class _Busy(Exception):  # noqa: N818 -- an outcome that is tried again
    """The server did not answer, or asked for patience."""


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(_Busy),
    stop=tenacity.stop_after_attempt(_ATTEMPTS),
    wait=tenacity.wait_exponential_jitter(0.5, 60),
    retry_error_callback=lambda state: _give_up(state),
)
def _ask(teacher: TeacherConfig, query: str, documents: Sequence[str]) -> list[float]:
    body = {
        "model": teacher.model,
        "query": query,
        "documents": list(documents),
        "top_n": len(documents),
        "return_documents": False,
    }
    headers = {"Content-Type": "application/json"}
    if key := _require_key(teacher):
        headers["Authorization"] = f"Bearer {key}"
    url = str(teacher.url)
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        # Others will not change by waiting: a wrong key, model or address.
        if error.code in (408, 409, 429) or error.code >= 500:
            raise _Busy(f"status {error.code}") from error
        raise UserError(
            f"teacher.url: {url} answered with status {error.code}",
            fix="check url, model and the key",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Busy(str(error)) from error
    return _scores_of(content, len(documents), url)


def _give_up(state: tenacity.RetryCallState) -> list[float]:
    assert state.outcome is not None
    reason = state.outcome.exception()
    url = state.args[0].url
    raise MachineError(f"teacher.url: {url} gives no answer ({reason}) | fix: {_FIX} later")


def _scores_of(content: bytes, num_documents: int, url: str) -> list[float]:
    """Read the answer of a rerank route, whose results are in any order.

    Raises:
        UserError: a document has no score.
    """
    with blame(
        f"teacher.url: {url} gives no rerank answer",
        allowed="results with index and relevance_score for every document",
    ):
        tree = json.loads(content)
        results = tree["results"] if isinstance(tree, dict) else tree
        by_index = {
            int(result["index"]): float(result.get("relevance_score", result.get("score")))
            for result in results
        }
        return [by_index[number] for number in range(num_documents)]
