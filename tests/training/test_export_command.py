"""`diffembed export` and `diffembed encode` as they are typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.model.load_export import load_export


def diffembed(*arguments: object) -> str:
    result = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    return result.stdout


def test_an_adapter_alone_and_merged_give_the_same_vectors_and_say_what_they_need(
    recipe: Path, tmp_path: Path
) -> None:
    command = ("export", recipe, "model.lora.rank=4", "model.dimensions=16", "--checkpoint", "init")
    command = (*command, "--no-check")
    diffembed(*command, "--output", tmp_path / "adapter", "--adapter-only")
    diffembed(*command, "--output", tmp_path / "merged")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    texts = ["the river stone lies at place 1", "amber"]
    alone, merged = (
        load_export(tmp_path / name).encode_texts(texts) for name in ("adapter", "merged")
    )
    assert merged.shape == (2, 16)
    np.testing.assert_allclose(alone, merged, atol=1e-5)

    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("adapter", "merged")}
    # Dream's published folder runs its own code in transformers, so its adapter needs ours.
    assert "load_export" in cards["adapter"] and "A merged export needs neither" in cards["adapter"]
    assert "SentenceTransformer" in cards["merged"]
    for card in cards.values():
        assert "| rows | e5 | files | 24 | 24 | 1 |" in card
        assert "24 examples, 48 documents." in card

    (tmp_path / "texts.txt").write_text("\n".join(texts))
    diffembed(
        "encode", tmp_path / "merged", "--input", tmp_path / "texts.txt",
        "--output", tmp_path / "out.arrow", "--dim", "8",
    )  # fmt: skip
    with pa.memory_map(str(tmp_path / "out.arrow")) as source:
        vectors = np.array(pa.ipc.open_file(source).read_all()["vector"].to_pylist())
    wanted = merged[:, :8] / np.linalg.norm(merged[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)


def test_an_adapter_of_a_run_without_one_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter-only export of a run without adapter"):
        diffembed("export", recipe, "--checkpoint", "init", "--adapter-only", "--output", tmp_path)
