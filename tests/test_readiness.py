"""Readiness of a config: everything that it names is found on this machine, or named as missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.explain import KINDS
from pipeline.doctor.readiness import CHECKS, check_config
from tests.test_doctor import ROOT, levels, one, write_evaluation
from tests.tiny_models import prepare_tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its shards."""
    folder = tmp_path_factory.mktemp("ready")
    prepare_tiny(folder)
    return folder


def train_config(folder: Path, shards: Path, **changes: object) -> Path:
    tree = {
        "num_steps": 4,
        "output_dir": str(folder / "run"),
        "model": {"path": str(shards / "model"), "dtype": "float32"},
        "data": {"path": str(shards / "shards"), "global_batch_size": 4},
        **changes,
    }
    path = folder / "train.yaml"
    path.write_text(json.dumps(tree))
    return path


def test_a_config_whose_parts_are_all_there_is_ready(tmp_path: Path, shards: Path) -> None:
    findings = list(check_config(train_config(tmp_path, shards)))

    assert set(levels(findings)) == {"config", "model.path", "tokenizer", "data.path", "output_dir"}
    assert set(levels(findings).values()) == {"ok"}, findings
    assert not (tmp_path / "run").exists()


def test_every_part_that_is_missing_is_named_at_once(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "run").touch()
    config = train_config(
        tmp_path,
        shards,
        model={"path": "some/model-that-is-nowhere", "pooling": "mean"},
        data={"path": str(tmp_path / "nothing"), "global_batch_size": 4},
    )

    findings = {finding.check: finding for finding in check_config(config) if finding.fix}

    assert {name: finding.level for name, finding in findings.items()} == {
        **{"model.path": "fail", "data.path": "fail", "output_dir": "fail"}
    }
    assert findings["model.path"].found.startswith("no config.json in some/model")
    assert "hf download some/model-that-is-nowhere" in findings["model.path"].fix
    assert "diffembed prepare" in findings["data.path"].fix


def test_a_model_that_lacks_a_file_or_holds_a_pointer_is_named(
    tmp_path: Path, shards: Path
) -> None:
    def fault(name: str) -> str:
        config = train_config(tmp_path, shards, model={"path": str(tmp_path / name)})
        found = {finding.check: finding for finding in check_config(config)}
        assert found["model.path"].level == "fail"
        return f"{found['model.path'].found} {found['model.path'].fix}"

    for name in ("pointer", "part", "empty", "cut", "nothing", "zip", "index"):
        shutil.copytree(shards / "model", tmp_path / name)
        for file in (tmp_path / name).glob("*.safetensors"):
            file.unlink()
    (tmp_path / "pointer" / "model.safetensors").write_text("version https://git-lfs.github.com\n")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "part" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "part" / "model-1.safetensors").write_bytes(b"x" * 100)

    assert "git lfs pull" in fault("pointer")
    assert "lacks model-2.safetensors" in fault("part")
    assert "lacks model.safetensors" in fault("empty")
    # A copy or a download that broke off.
    (weights,) = (shards / "model").glob("*.safetensors")
    whole = weights.read_bytes()
    contents = {"cut": whole[:-100], "nothing": b"", "zip": b"PK" + b"x" * 2000}
    for name, content in contents.items():
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert f"has {len(whole) - 100:,} bytes, by its header {len(whole):,}" in fault("cut")
    assert "not safetensors, or cut off" in fault("nothing")
    assert "not safetensors, or cut off" in fault("zip")
    (tmp_path / "index" / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: damaged" in fault("index")


def test_sources_of_a_data_config_are_found_in_files_and_caches(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("datasets/owner___known", "datasets/Owner___my_data", "datasets/squad"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    (tmp_path / "cache" / "hub" / "datasets--Owner--Fetched").mkdir(parents=True)
    paths = {
        "file": str(shards / "rows.jsonl"),
        "gone": str(tmp_path / "gone.jsonl"),
        "known": "hub:Owner/known",
        "unknown": "hub:owner/unknown",
        "snake case": "hub:Owner/MyData",
        "no owner": "hub:squad",
        "fetched": "hub:owner/Fetched",
        "far": "https://example.org/rows.jsonl",
    }
    tree = {
        "output_dir": str(tmp_path / "out"),
        "tokenizer": str(shards / "model"),
        "sources": [{"name": name, "format": "e5", "path": path} for name, path in paths.items()],
    }
    config = tmp_path / "data.yaml"
    config.write_text(json.dumps(tree))

    found = levels(list(check_config(config)))

    assert [found[f"sources.{name}"] for name in paths] == [
        *("ok", "fail", "ok", "fail", "ok", "ok", "ok", "warn")
    ]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert levels(list(check_config(config)))["sources.unknown"] == "warn"
    assert found["tokenizer"] == found["output_dir"] == "ok"


def test_models_and_shards_of_a_mining_are_looked_for(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(CHECKS) == set(KINDS)
    models = {"words": "bm25", "here": str(shards / "model"), "gone": str(tmp_path / "gone")}
    tree: dict[str, Any] = {
        "data": str(shards / "shards"),
        "output": str(tmp_path / "mined"),
        "retrievers": [{"name": name, "path": path} for name, path in models.items()],
    }
    config = tmp_path / "mine.yaml"
    config.write_text(json.dumps(tree))

    found = levels(list(check_config(config)))

    assert [found[f"retrievers.{name}"] for name in models] == ["ok", "ok", "fail"]
    assert found["data"] == found["output"] == "ok"

    for factory, level in (("IVF8,Flat", "ok"), ("IVF8;Flat", "fail")):
        tree["retrievers"][1]["index"] = {"factory": factory}
        config.write_text(json.dumps(tree))
        assert levels(list(check_config(config)))["retrievers.here.index"] == level
    monkeypatch.setitem(sys.modules, "faiss", None)
    lacking = {finding.check: finding for finding in check_config(config)}["retrievers.here.index"]
    assert (lacking.level, lacking.fix) == ("fail", "pip install 'diffembed[faiss]'")


def test_exports_and_own_tasks_of_an_evaluation_are_looked_for(
    tmp_path: Path,
) -> None:
    evaluation = write_evaluation(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").touch()

    findings = {finding.check: finding for finding in check_config(evaluation)}

    assert findings["models.old"].level == findings["tasks"].level == "ok"
    assert (findings["models.new"].level, "diffembed export" in findings["models.new"].fix) == (
        *("fail", True),
    )
    (tmp_path / "there").rmdir()
    assert levels(list(check_config(evaluation)))["tasks"] == "fail"


def test_what_an_earlier_stage_of_a_chain_makes_need_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("launch", "ds_configs", "README.md", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)

    findings = list(check_config(Path("launch/recipes/quickstart/chain.yaml")))

    later = [finding.found for finding in findings if "made by an earlier stage" in finding.found]
    assert any("shards" in line for line in later) and len(later) >= 2
    assert levels(findings)["deepspeed"] == "ok"


def test_a_config_of_another_kind_than_its_stage_is_named(tmp_path: Path, shards: Path) -> None:
    train = train_config(tmp_path, shards)
    chain = tmp_path / "chain.yaml"
    for stage in ("prepare", "mine", "evaluate"):
        chain.write_text(json.dumps({"train": str(train), stage: str(train)}))
        found = {finding.check: finding for finding in check_config(chain)}
        assert found[stage].level == "fail", stage
        assert found["data.path"].level == "ok"


@pytest.mark.parametrize(
    "text",
    ["num_steps: [\n", "- a\n", "num_stepz: 3\nmodel: {path: x}\n", "a: \u0000\n"],
)
def test_a_config_that_cannot_be_read_is_one_failed_line(text: str, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(text)

    finding = one(check_config(config))

    assert (finding.check, finding.level) == ("config", "fail")
    assert "\n" not in finding.found
