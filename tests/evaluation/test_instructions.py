"""Who gets which instruction, letter by letter where tables are to be compared."""

from __future__ import annotations

import dataclasses
import json

import pytest
from evaluation_support import BagOfLetters, wrap

from pipeline.config import EvaluateConfig, EvaluatedModel, Template, build_config
from pipeline.errors import UserError
from pipeline.evaluation.embedding_plan import write_plan
from pipeline.evaluation.models import revision
from pipeline.evaluation.results import inputs_of
from pipeline.evaluation.run import run_all
from pipeline.evaluation.tasks import INSTRUCTIONS, instruction_for, list_elements
from pipeline.model.export_folder import model_fingerprint

AOPS = "BrightAopsRetrieval"
# As published with the paper, its spelling included.
PUBLISHED = {
    AOPS: "Given a problem, rretrieve the relevant problems that can be solved by the similar math "
    "theorems:",
    "BrightBiologyRetrieval": "Given a biology post, retrieve relevant passages that help answer "
    "the post:",
    "BrightEconomicsRetrieval": "Given a economics post, retrieve relevant passages that help "
    "answer the post:",
    "BrightLeetcodeRetrieval": "Given a coding problem, retrieve the relevant problems that can be "
    "solved by the similar algorithms or data structures:",
    "BrightPonyRetrieval": "Given a Pony question, retrieve relevant passages that help answer the "
    "question:",
    "BrightTheoremQATheoremsRetrieval": "Given a problem, retrieve the relevant theorems that help "
    "solve the given problem:",
    "BrightTheoremQAQuestionsRetrieval": "Given a problem, retrieve the relevant problems that can "
    "be solved by the similar theorems:",
    "BrightStackoverflowRetrieval": "Given a post, retrieve relevant passages that help answer the "
    "post:",
    "BrightRetrieval": "Given a problem, retrieve solutions to other problems that use the same "
    "method as the correct solution to the given question:",
    # The paper names no sentence for these.
    "BrightPsychologyRetrieval": "Retrieve text based on user query:",
    "LEMBNeedleRetrieval": "Retrieve text based on user query:",
    "Core17InstructionRetrieval": "Retrieve text based on user query:",
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_papers_model_gets_the_papers_sentence(task, config):
    model = dataclasses.replace(config.models[0], instruction_set="paper")
    assert instruction_for(task, model, config) == PUBLISHED[task]


def test_a_models_own_text_wins_over_the_configs_and_that_over_the_set(config):
    model = config.models[0]
    assert instruction_for(AOPS, model, config) == INSTRUCTIONS[AOPS]
    config = dataclasses.replace(config, instructions={AOPS: "for all"})
    assert instruction_for(AOPS, model, config) == "for all"
    model = dataclasses.replace(model, instructions={AOPS: ""})
    assert instruction_for(AOPS, model, config) == ""


def test_an_unknown_set_is_the_users_error():
    tree = {
        "output_dir": "out",
        "models": [{"name": "a", "path": "a", "instruction_set": "theirs"}],
        "tasks": [AOPS],
    }
    with pytest.raises(UserError, match="instruction_set"):
        build_config(EvaluateConfig, tree, origin="here")


def test_two_wordings_share_the_documents_of_one_plan_and_get_their_own_queries(config):
    config = dataclasses.replace(config, tasks=(AOPS,), models=config.models[:1])
    alone = write_plan(config)
    paper = dataclasses.replace(config.models[0], name="paper", instruction_set="paper")
    both = write_plan(dataclasses.replace(config, models=(*config.models, paper)))
    keys = [key for block in range(len(both.block_costs)) for key in both.read_block(block)]
    queries = [key for key in keys if key.role == "query"]
    assert {key.instruction for key in queries} == {INSTRUCTIONS[AOPS], PUBLISHED[AOPS]}
    assert both.num_texts == alone.num_texts + len(queries) // 2
    assert all(key.instruction == "" for key in keys if key.role == "document")


def test_each_model_is_scored_with_its_own_wording_and_says_so(config, load):
    paper = dataclasses.replace(config.models[1], name="paper", instruction_set="paper")
    config = dataclasses.replace(config, tasks=(AOPS,), models=(config.models[1], paper))
    ours, theirs = run_all(config, load=load)
    assert ours["instruction"] == INSTRUCTIONS[AOPS]
    assert theirs["instruction"] == PUBLISHED[AOPS]
    assert ours["inputs"]["instruction"] != theirs["inputs"]["instruction"]


def test_another_template_is_another_model_with_another_revision(config):
    element = list_elements(config)[0]
    changed = dataclasses.replace(
        element,
        model=dataclasses.replace(element.model, template=Template(query="{instruction} {text}")),
    )
    assert model_fingerprint(changed.model) != model_fingerprint(element.model)
    assert inputs_of(config, changed, None) != inputs_of(config, element, None)
    assert revision(changed) != revision(element)
    again = EvaluatedModel(name="other", path=element.model.path)
    assert model_fingerprint(again) == model_fingerprint(element.model)


def test_the_revision_holds_the_exports_step_and_the_maximum_length(config):
    element = list_elements(config)[0]
    (element.model.path / "diffembed.json").write_text(json.dumps({"step": 80}))
    found = revision(element)
    assert found.startswith("step-000080-")
    assert found.endswith(f"-length-{element.max_length}")
    assert wrap(BagOfLetters(), revision=found).meta().revision == found
