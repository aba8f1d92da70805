"""The example of the page is a config that the command reads."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.loading import load_config
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.prompts import VALUES

ROOT = Path(__file__).parents[2]


def test_the_example_is_read() -> None:
    config = load_config(SynthesisConfig, ROOT / "ReasonAug" / "synthesis" / "example.yaml")
    assert config.kind("economics principle") == "text"


def test_every_prompt_is_a_file_and_every_file_a_prompt_or_its_form() -> None:
    files = {path.stem for path in (ROOT / "ReasonAug" / "prompts").glob("*.md")}
    kinds = ("coding", "numeric", "text")
    forms = {f"{name}-{kind}" for name in ("form", "definition") for kind in kinds}
    assert files == set(VALUES) | forms
