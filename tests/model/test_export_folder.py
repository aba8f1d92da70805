"""The files of an export by the rules of the servers that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.model.export_folder import replace_folder
from pipeline.model.load_export import load_export
from tests.model.export_support import export, make


def pooling_of_tei(settings: dict[str, Any]) -> str | None:
    """text-embeddings-inference: two booleans must be there, a third may be."""
    cls, mean = settings["pooling_mode_cls_token"], settings["pooling_mode_mean_tokens"]
    last = settings.get("pooling_mode_lasttoken", False)
    assert all(isinstance(flag, bool) for flag in (cls, mean, last))
    return "cls" if cls else "mean" if mean else "last_token" if last else None


def pooling_of_old_vllm(settings: dict[str, Any]) -> str:
    """vLLM before it knew `pooling_mode`: the name of the first key that is true."""
    return next(key for key, value in settings.items() if value is True)


@pytest.mark.parametrize(
    ("pooling", "tei", "flag"),
    [
        ("mean", "mean", "pooling_mode_mean_tokens"),
        ("first_token", "cls", "pooling_mode_cls_token"),
        ("last_token", "last_token", "pooling_mode_lasttoken"),
        ("weighted_mean", None, "pooling_mode_weightedmean_tokens"),
    ],
)
def test_servers_old_and_new_read_the_same_pooling(
    starter: Path, tmp_path: Path, pooling: Any, tei: str | None, flag: str
) -> None:
    folder = export(*make(starter, pooling=pooling), starter, tmp_path / "export")
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling_of_tei(settings) == tei  # it refuses a pooling that it lacks
    assert pooling_of_old_vllm(settings) == flag
    assert settings["word_embedding_dimension"] == 32 and settings["include_prompt"] is True
    # The new form is left out by readers of the old one, and the other way round.
    old = {key: value for key, value in settings.items() if key != "pooling_mode"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    assert load_export(folder).encoder.config.pooling == pooling


def test_vectors_are_compared_as_in_training(starter: Path, tmp_path: Path) -> None:
    for normalize, trained, wanted in (
        (False, "dot", "dot"),
        (False, "cosine", "cosine"),
        (True, "dot", "cosine"),  # equal for unit vectors
    ):
        model = make(starter, normalize=normalize)
        folder = export(*model, starter, tmp_path / f"{normalize}-{trained}", similarity=trained)
        settings = json.loads((folder / "config_sentence_transformers.json").read_text())
        assert settings["similarity_fn_name"] == wanted
        assert ("Normalize" in (folder / "modules.json").read_text()) == normalize


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: int
) -> None:
    """Two renames, because a folder cannot replace another one in one step."""
    folder, rename, calls = tmp_path / "export", Path.rename, []
    folder.mkdir()
    (folder / "weights").write_text("old")

    def fail(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)), replace_folder(folder) as work:
        (work / "weights").write_text("new")

    assert (folder / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]
    with replace_folder(folder) as work:
        (work / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]
