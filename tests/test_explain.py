"""Configs explain themselves: to people, to editors, and against each other."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config.explain import (
    KINDS,
    compare,
    explain,
    file_schema,
    kind_of,
    list_keys,
    write_schemas,
)
from pipeline.config.loading import read_yaml
from pipeline.errors import UserError

ROOT = Path(__file__).parents[1]
# The config of `python -m ReasonAug synthesize` is none of this package's.
RECIPES = sorted(
    path for path in (ROOT / "launch" / "recipes").rglob("*.yaml") if path.name != "synthesize.yaml"
)
SCHEMAS = ROOT / "docs" / "schema"
_MODELINE = "# yaml-language-server: $schema="


@functools.cache
def validator(schema: Path) -> Any:
    return jsonschema.Draft7Validator(json.loads(schema.read_text()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_meaning(kind: str) -> None:
    keys = {key.name: key for key in list_keys(kind)}
    assert {field.name for field in dataclasses.fields(KINDS[kind])} <= keys.keys()
    for key in keys.values():
        assert key.meaning.endswith((".", ")", "`")), key.name
        assert key.meaning[0].isupper() or key.meaning.startswith(("`", "plain")), key.name


def test_a_key_is_explained_by_its_name_its_end_or_its_section() -> None:
    whole = explain("loss.temperature")
    assert whole == explain("train.loss.temperature")
    assert whole.splitlines() == [
        "loss.temperature   (train)",
        "  Similarities are divided by this.",
        "  a number > 0; default 0.02",
    ]
    assert whole in explain("temperature")
    assert "sources[].columns   (prepare)" in explain("sources.columns")
    assert "must be given" in explain("num_steps")
    assert explain("chunks").count("chunks.") >= 5


def test_an_unknown_key_names_similar_ones() -> None:
    with pytest.raises(UserError, match="temprature") as error:
        explain("loss.temprature")
    assert "loss.temperature" in error.value.allowed


def test_defaults_and_ranges_are_those_of_the_config() -> None:
    keys = {key.name: key for key in list_keys("train")}
    assert keys["model.lora.targets"].values == "all-linear or a list of texts"
    assert keys["data.global_batch_size"].values == "an integer >= 2 (queries)"
    assert keys["model.dimensions"].values == "an integer >= 1 or null"
    assert keys["optimizer.betas"].default == "[0.9, 0.999]"
    assert keys["model.path"].default is None


def test_the_schemas_of_the_repository_are_up_to_date(tmp_path: Path) -> None:
    for path in write_schemas(tmp_path):
        kept = SCHEMAS / path.name
        assert kept.read_text() == path.read_text(), (
            f"{kept}: run `diffembed config schema --output docs/schema`"
        )
    assert {path.name for path in SCHEMAS.iterdir()} == {f"{kind}.json" for kind in KINDS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_names_the_schema_that_it_satisfies(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(_MODELINE)
    schema = (path.parent / first.removeprefix(_MODELINE)).resolve()
    assert schema == SCHEMAS / f"{kind_of(path)}.json"
    validator(schema).validate(read_yaml(path))


def test_an_editor_sees_a_misspelt_key_and_a_value_out_of_range() -> None:
    schema = file_schema("train")
    for tree in ({"los": {}}, {"loss": {"temprature": 1}}, {"data": {"global_batch_size": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tree, schema)
    for bases in ("base.yaml", ["base.yaml"]):
        jsonschema.validate({"extends": bases, "loss": {"temperature": 1}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"extends": 3}, schema)


def test_two_configs_differ_in_what_they_resolve_to(tmp_path: Path) -> None:
    base = ROOT / "launch/recipes/quickstart/train.yaml"
    changed = tmp_path / "changed.yaml"
    changed.write_text(f"extends: [{base}]\nloss: {{temperature: 0.1}}\nmodel: {{pooling: mean}}\n")
    assert compare(base, changed) == [("loss.temperature", "0.05", "0.1")]
    assert compare(base, base) == []


def test_lists_of_sections_are_compared_item_by_item(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source = {"name": "faq", "format": "columns", "path": "faq.jsonl"}
    for path, sources in ((first, [source]), (second, [source, {**source, "name": "wiki"}])):
        tree = {"output_dir": "shards", "tokenizer": "model", "sources": sources}
        path.write_text(yaml.safe_dump(tree))
    rows = compare(first, second)
    assert ("sources[1].name", "-", '"wiki"') in rows
    assert all(key.startswith("sources[1].") for key, _, _ in rows)


def test_configs_of_two_kinds_are_not_compared() -> None:
    recipes = ROOT / "launch/recipes/quickstart"
    with pytest.raises(UserError, match="a config of train"):
        compare(recipes / "train.yaml", recipes / "data.yaml")
