"""`diffembed encode` with one process per GPU."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import ModelConfig
from pipeline.model.load_export import load_export
from tests.tiny_models import export_tiny, tiny_starter

WORDS = ("river", "stone", "cloud", "amber", "forest", "signal", "copper", "meadow")


def export(folder: Path) -> Path:
    (folder / "corpus.txt").write_text(" ".join(WORDS) * 9)
    starter = tiny_starter(folder / "starter", folder / "corpus.txt", hidden_size=128)
    config = ModelConfig(path=str(starter), dtype="float32")
    return export_tiny(config, folder / "model", max_length=512)


@pytest.mark.parametrize(
    "num_gpus",
    [
        pytest.param(1, marks=pytest.mark.gpu),
        pytest.param(2, marks=[pytest.mark.gpu, pytest.mark.multi_gpu]),
    ],
)
def test_vectors_of_any_number_of_gpus_are_those_of_the_cpu(num_gpus: int, tmp_path: Path) -> None:
    # Reading files needs `datasets`, which a machine that is lent for an hour may lack.
    encode = pytest.importorskip("pipeline.evaluation.encode", exc_type=ImportError)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 300))) for _ in range(400)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    job = encode.EncodeJob(
        model=export(tmp_path),
        input=str(tmp_path / "texts.txt"),
        output=tmp_path / "out.arrow",
        block_bytes=50_000,
    )
    with pa.memory_map(str(encode.encode_file(job, num_processes=num_gpus))) as source:
        vectors = np.array(pa.ipc.open_file(source).read_all()["vector"].to_pylist())
    wanted = load_export(job.model).encode_texts(texts)
    assert (vectors * wanted).sum(axis=1).min() > 0.999  # bfloat16 there, float32 here
