"""A finished result counts for what it was computed from, and for nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_support import BagOfLetters, wrap

from pipeline.config import EvaluateConfig, Template
from pipeline.errors import UserError
from pipeline.evaluation.report import write_report
from pipeline.evaluation.run import run_element
from pipeline.evaluation.tasks import list_elements
from pipeline.files import fingerprint_files
from pipeline.model.export_folder import export_fingerprint

AOPS = "BrightAopsRetrieval"


@pytest.fixture
def own(config: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    """One element whose data and export a test may change."""
    hub = tmp_path / "hub"
    shutil.copytree(config.snapshots, hub)
    return dataclasses.replace(config, models=config.models[:1], tasks=(AOPS,), snapshots=hub)


@pytest.fixture
def load(minilm) -> Callable:
    """Whatever model the export's file names, as an export does by its weights."""

    def load(config, element):
        written = (element.model.path / "model.safetensors").read_text()
        return wrap({"weak": BagOfLetters(), "good": minilm}[written])

    return load


def refuse(*_: object) -> None:
    raise AssertionError("loaded a model for a finished element")


def replace_in_silence(path: Path, old: str, new: str) -> None:
    """Other bytes, but as many and with the same time: what a copy or an archive may leave."""
    before = path.stat()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def other_export(config: EvaluateConfig) -> None:
    replace_in_silence(config.models[0].path / "model.safetensors", "weak", "good")


def other_data(config: EvaluateConfig) -> None:
    path = config.snapshots / "mteb/BRIGHT/documents/aops.jsonl"
    replace_in_silence(path, "On the history", "zzzzzzzzzzzzzz")


@pytest.mark.parametrize(("change", "named"), [(other_export, "export"), (other_data, "data")])
def test_what_is_replaced_at_its_place_is_scored_again_and_nothing_else_is(
    change, named, own, load, tmp_path, capsys
):
    first = run_element(own, 0, load=load)
    assert run_element(own, 0, load=refuse) == first
    change(own)
    with pytest.raises(UserError, match=f"weak {AOPS}, changed since it was scored: {named} "):
        write_report(own)
    capsys.readouterr()
    second = run_element(own, 0, load=load)
    (why,) = [line for line in capsys.readouterr().out.splitlines() if "again" in line]
    assert why == f"element 1/1 weak {AOPS}: scored again, changed since: {named}"
    fresh = run_element(dataclasses.replace(own, output_dir=tmp_path / "fresh"), 0, load=load)
    assert second["score"] == fresh["score"] != first["score"]
    assert run_element(own, 0, load=refuse) == second
    write_report(own)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"template": Template(query="Q: {text}")}, "template"),
        ({"precision": "bfloat16"}, "precision"),
        ({"instructions": {AOPS: "Find it"}}, "instruction"),
    ],
)
def test_a_setting_of_the_config_that_changes_is_named(change, named, own, load, capsys):
    run_element(own, 0, load=load)
    changed = dataclasses.replace(own, models=(dataclasses.replace(own.models[0], **change),))
    run_element(changed, 0, load=load)
    assert f"scored again, changed since: {named}\n" in capsys.readouterr().out
    assert run_element(changed, 0, load=refuse)


def test_snapshots_that_move_or_are_gone_and_a_new_model_card_are_no_reason_to_score_again(
    own, load, tmp_path
):
    first = run_element(own, 0, load=load)
    (own.models[0].path / "README.md").write_text("a card")
    own.snapshots.rename(tmp_path / "moved")
    moved = dataclasses.replace(own, snapshots=tmp_path / "moved")
    assert run_element(moved, 0, load=refuse) == run_element(own, 0, load=refuse) == first


def test_a_result_that_does_not_say_what_it_was_computed_from_is_made_again(own, load):
    first = run_element(own, 0, load=load)
    (element,) = list_elements(own)
    element.result_path.write_text(json.dumps({"score": 1.0}))
    assert run_element(own, 0, load=load)["inputs"] == first["inputs"]


def test_an_export_that_is_replaced_by_a_pass_of_training_is_told_from_it(tmp_path):
    """The like of weights: larger than what is read, changed by a little in every part."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3_000_001))
    before, at = fingerprint_files(tmp_path, [path]), path.stat()
    for start in (0, 1_500_000, 3_000_000):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\1" * 60_000 if start < 3_000_000 else b"\1")
        os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
        after = fingerprint_files(tmp_path, [path])
        assert after != before
        before = after


def test_an_adapter_on_another_base_model_is_told_from_it(tmp_path):
    base, merged, adapter = (tmp_path / name for name in ("base", "merged", "adapter"))
    for folder in (base, merged, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_text("old weights")
    (adapter / "adapter_config.json").write_text("{}")
    settings = {"model": {"path": str(base), "adapter": str(merged)}}
    (adapter / "diffembed.json").write_text(json.dumps(settings))
    seen = [export_fingerprint(adapter)]
    for folder in (base, merged, adapter):
        replace_in_silence(folder / "model.safetensors", "old", "new")
        seen.append(export_fingerprint(adapter))
    (base / "README.md").write_text("a card")
    assert len(set(seen)) == 4
    assert export_fingerprint(adapter) == seen[-1]


def test_one_export_under_two_names_has_one_fingerprint(tmp_path):
    export = tmp_path / "one"
    export.mkdir()
    (export / "model.safetensors").write_text("weights")
    shutil.copytree(export, tmp_path / "two")  # keeps the times
    assert export_fingerprint(export) == export_fingerprint(tmp_path / "two")
