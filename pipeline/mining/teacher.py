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
from pathlib import Path
from typing import Any

import numpy as np
import tenacity
from numpy.typing import NDArray

from pipeline.config import TeacherConfig
from pipeline.data.batch import Ragged
from pipeline.errors import MachineError, UserError, blame
from pipeline.evaluation.models import device_here, resolve_precision, share_cores
from pipeline.files import load_arrays, map_vectors, save_arrays
from pipeline.mining.pick import read_picked
from pipeline.mining.plan import Mining, delete_and_mine
from pipeline.mining.retrieve import embed_block, open_corpus, score_listed
from pipeline.mining.texts import positives_of, read_texts, texts_by_number
from pipeline.model.export_folder import export_fingerprint

# Requests to an endpoint at a time, and documents of one request.
_REQUESTS = 8
_DOCUMENTS = 256
# For the answer to one request, of which a busy server may have a queue.
_SECONDS = 300
# With pauses of about 0.5 to 8 seconds, 16 together; a longer silence ends the mining, which keeps
# all finished blocks.
_ATTEMPTS = 6


def embedding_tasks(mining: Mining) -> list[tuple[str, int]]:
    """Return role and block of each task of a bi-encoder; none for other teachers."""
    teacher = mining.config.teacher
    return mining.text_blocks if teacher is not None and teacher.kind == "bi_encoder" else []


def embed_teacher_block(mining: Mining, task: int) -> None:
    """Write the teacher's vectors of one block of documents or queries."""
    role, block = embedding_tasks(mining)[task]
    teacher, model = mining.teacher
    embed_block(mining, model, teacher, role, block)


def score_block(mining: Mining, task: int) -> None:
    """Write the teacher's scores of one block: positives, kept negatives and candidates.

    Raises:
        UserError: a score is not finite.
    """
    lists = _scored_lists(mining, task)
    teacher, model = mining.teacher
    score = _score_vectors if teacher.kind == "bi_encoder" else _score_texts
    scores = score(mining, task, lists)
    queries = read_texts(mining, "queries", task)["text"]
    # Before anything is written: a file's existence means that the block is scored.
    for part, values in zip(lists.values(), scores, strict=True):
        # NaN compares false with every margin: such a candidate would be kept silently.
        broken = ~np.isfinite(values)
        if broken.any():
            row = int(part.rows[int(np.argmax(broken))])
            raise UserError(
                f"teacher {model.folder}: "
                f"{broken.sum()} of {len(values)} scores are not finite, the first for the query "
                f"{queries[row].as_py()[:60]!r}",
                fix="compute in precision float32, or take another teacher",
            )
    save_arrays(mining.block_file("teacher", task), **dict(zip(lists, scores, strict=True)))


def _scored_lists(mining: Mining, task: int) -> dict[str, Ragged]:
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
    """Return the scores of a block, value for value of `_scored_lists`."""
    path = mining.block_file("teacher", block)
    names = ["positives", "candidates"] + ["negatives"] * mining.config.keep_negatives
    return load_arrays(path, *names, fix=delete_and_mine(path))


def _score_vectors(
    mining: Mining, task: int, lists: dict[str, Ragged]
) -> list[NDArray[np.float64]]:
    _, model = mining.teacher
    path = mining.vectors(model, "queries", task)
    queries_QD = map_vectors(path, fix=delete_and_mine(path))
    corpus = open_corpus(mining, model)
    return [score_listed(corpus, queries_QD, part) for part in lists.values()]


def _score_texts(mining: Mining, task: int, lists: dict[str, Ragged]) -> list[NDArray[np.float64]]:
    teacher, model = mining.teacher
    queries = read_texts(mining, "queries", task)["text"].to_pylist()
    every = np.concatenate([part.values for part in lists.values()])
    texts = texts_by_number(mining, "documents", every)
    rows = [
        [texts[number] for part in lists.values() for number in part[row].tolist()]
        for row in range(len(queries))
    ]
    scores = score_rows(teacher, model.folder, queries, rows)
    # (Q, lists) where each list ends in a query's scores, which stand one list after another.
    ends = np.cumsum([part.lengths for part in lists.values()], axis=0).T
    cut = [np.split(values, end[:-1]) for values, end in zip(scores, ends, strict=True)]
    return [np.concatenate(parts) for parts in zip(*cut, strict=True)]


def score_rows(
    teacher: TeacherConfig, folder: str, queries: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]]:
    """Return the scores of each query's documents."""
    if teacher.kind == "cross_encoder":
        precision = resolve_precision(teacher.precision)
        # Its fingerprint notices another model there.
        fingerprint = export_fingerprint(Path(folder))
        model = _load_cross_encoder(folder, fingerprint, teacher.max_length, precision)
        # All pairs of the block in one call, so that its batches are full.
        pairs = [(query, text) for query, row in zip(queries, rows, strict=True) for text in row]
        # (P,) scores of P pairs; a classifier of several labels gives (P, labels), none a score.
        with blame(f"teacher: {folder} cannot score pairs", fix="give a model with one output"):
            values = np.asarray(
                model.predict(pairs, show_progress_bar=False, convert_to_numpy=True)
            ).astype(np.float64)
            if values.shape != (len(pairs),):
                raise ValueError(f"{values.shape[1:]} outputs for a pair")
        return np.split(values, np.cumsum([len(row) for row in rows])[:-1])
    # Refused here once, instead of in each thread.
    _read_key(teacher)
    # Threads, because they only wait; `map` keeps the order of the queries.
    with ThreadPoolExecutor(_REQUESTS) as pool:
        answers = pool.map(functools.partial(_rerank, teacher), queries, rows)
        return [np.array(answer, dtype=np.float64) for answer in answers]


@functools.lru_cache(maxsize=1)
def _load_cross_encoder(
    folder: str, fingerprint: str, max_length: int | None, precision: str
) -> Any:
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


def _read_key(teacher: TeacherConfig) -> str | None:
    """Return the endpoint's key; None where it needs none.

    Raises:
        UserError: its variable is not set.
    """
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


def _give_up(state: tenacity.RetryCallState) -> list[float]:
    assert state.outcome is not None
    reason = state.outcome.exception()
    url = state.args[0].url
    raise MachineError(
        f"teacher.url: {url} gives no answer ({reason}) | fix: run `diffembed mine` again later"
    )


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(_Busy),
    stop=tenacity.stop_after_attempt(_ATTEMPTS),
    wait=tenacity.wait_exponential_jitter(0.5, 60),
    retry_error_callback=_give_up,
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
    if key := _read_key(teacher):
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
    # No connection, a timeout, or an answer that was cut short.
    except (OSError, http.client.HTTPException) as error:
        raise _Busy(str(error)) from error
    return _scores_of(content, len(documents), url)


def _scores_of(content: bytes, num_documents: int, url: str) -> list[float]:
    """Read the answer of a rerank route, whose results are in any order.

    Raises:
        UserError: a document has no score.
    """
    with blame(
        f"teacher.url: {url} gives no rerank answer",
        allowed="results with index and relevance_score for every document",
    ):
        # vLLM answers as Cohere does, {"results": [{"relevance_score": ...}]}; SGLang by a list of
        # {"score": ...}.
        tree = json.loads(content)
        results = tree["results"] if isinstance(tree, dict) else tree
        by_index = {
            int(result["index"]): float(result.get("relevance_score", result.get("score")))
            for result in results
        }
        return [by_index[number] for number in range(num_documents)]
