"""What would spoil an evaluation is one line before any model is loaded, with the right cure."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_support import BagOfLetters, wrap

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.datasets import REVISION_FILE
from pipeline.evaluation.run import plan, run_all
from pipeline.evaluation.tasks import instruction_for, list_elements

AOPS, CORE = "BrightAopsRetrieval", "Core17InstructionRetrieval"


def refuse(*_: object) -> None:
    raise AssertionError("loaded a model")


@pytest.fixture
def one(config: EvaluateConfig) -> EvaluateConfig:
    return dataclasses.replace(config, models=config.models[:1], tasks=(AOPS,))


@pytest.mark.parametrize("key", ["lengths", "instructions", "models.0.instructions"])
@pytest.mark.parametrize("name", ["BrightAop", CORE, "FollowIR"])
def test_a_key_of_a_task_that_is_not_evaluated_is_refused(
    key: str, name: str, one: EvaluateConfig
) -> None:
    if key == "models.0.instructions":
        model = dataclasses.replace(one.models[0], instructions={name: "x"})
        wrong = dataclasses.replace(one, models=(model,))
    else:
        wrong = dataclasses.replace(one, **{key: {name: (8,) if key == "lengths" else "x"}})
    fix = f"write {AOPS}" if name == "BrightAop" else f"remove it, or add {name} to tasks"
    with pytest.raises(UserError) as error:
        list_elements(wrong)
    expected = f"{key}: '{name}' is not evaluated | allowed: {AOPS}, BRIGHT | fix: {fix}"
    assert str(error.value) == expected


def test_lengths_and_instructions_may_be_given_by_benchmark(one: EvaluateConfig) -> None:
    given = dataclasses.replace(one, lengths={"BRIGHT": (8, 16)}, instructions={"BRIGHT": "Find"})
    assert [element.max_length for element in list_elements(given)] == [8, 16]
    assert instruction_for(AOPS, one.models[0], given) == "Find"
    closer = dataclasses.replace(given, instructions={"BRIGHT": "Find", AOPS: ""})
    assert instruction_for(AOPS, one.models[0], closer) == ""


def test_an_unknown_task_is_found_before_the_first_one_is_scored(one: EvaluateConfig) -> None:
    wrong = dataclasses.replace(one, tasks=(AOPS, "BrightAop"))
    for command in (plan, lambda config: run_all(config, load=refuse)):
        with pytest.raises(UserError, match="'BrightAop': mteb has no such task"):
            command(wrong)


@pytest.mark.parametrize("task", [AOPS, CORE])
def test_a_data_set_out_of_reach_has_one_cure_whatever_the_command(
    task: str, one: EvaluateConfig
) -> None:
    away = dataclasses.replace(one, tasks=(task,), snapshots=None)
    for command in (plan, lambda config: run_all(config, load=lambda *_: BagOfLetters())):
        with pytest.raises(UserError, match=f"^{task}: cannot load .* data set") as error:
            command(away)
        assert error.value.fix == (
            "set snapshots to a folder, and run `diffembed evaluate prefetch` on a machine with "
            "network"
        )


def test_an_output_that_cannot_be_written_is_found_before_the_first_task_is_scored(
    one: EvaluateConfig,
) -> None:
    one.output_dir.write_text("a file")
    for command in (plan, lambda config: run_all(config, load=refuse)):
        with pytest.raises(UserError, match=r"^output_dir: "):
            command(one)


def edit(path: Path, change: Callable[[list[dict]], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FAULTS: dict[str, tuple[str, str, Callable[[list[dict]], object], str]] = {
    "null document": (
        AOPS,
        "mteb/BRIGHT/documents/aops.jsonl",
        lambda rows: rows[2].update(content=None),
        "document 'aops/glaciers-measurement': text is null",
    ),
    "null query": (
        CORE,
        f"mteb/{CORE}/queries/queries.jsonl",
        lambda rows: rows[0].update(text=None),
        "query '0-og': text is null",
    ),
    "no judgement": (
        AOPS,
        "mteb/BRIGHT/examples/aops.jsonl",
        lambda rows: rows[2].update(gold_ids=[]),
        r"no relevance judgements for queries \['2'\]",
    ),
    "no such column": (
        AOPS,
        "mteb/BRIGHT/documents/aops.jsonl",
        lambda rows: [row.pop("content") for row in rows],
        "cannot load the data set",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_data_are_named_with_a_fix_that_fits_where_they_come_from(
    fault: str, one: EvaluateConfig, tmp_path: Path
) -> None:
    task, file, change, message = FAULTS[fault]
    hub = tmp_path / "hub"
    folder = hub / Path(*Path(file).parts[:2])
    shutil.copytree(one.snapshots / folder.relative_to(hub), folder)
    edit(hub / file, change)
    own = dataclasses.replace(one, snapshots=hub, tasks=(task,))
    with pytest.raises(UserError, match=f"{message}.* fix: repair the files in {folder}, or name"):
        plan(own)
    if fault == "no judgement":
        from pipeline.evaluation.datasets import get_task

        revision = get_task(task).metadata.dataset["revision"]
        (folder / REVISION_FILE).write_text(revision)
        with pytest.raises(UserError, match=f"fix: remove {folder} and run `diffembed evaluate"):
            plan(own)


def test_vectors_that_are_not_finite_are_never_scored(one: EvaluateConfig) -> None:
    class Broken(BagOfLetters):
        def encode_texts(self, texts, prefix="", suffix=""):
            vectors = super().encode_texts(texts, prefix)
            vectors[-1, 0] = np.nan
            return vectors

    with pytest.raises(UserError, match="1 of 8 vectors are not finite, the first of 'Why do"):
        run_all(one, load=lambda config, element: wrap(Broken(), element.model.name))


_OFFLINE = """
import sys
from pipeline.errors import UserError
from pipeline.evaluation.datasets import get_task, load_and_check
try:
    load_and_check(get_task(sys.argv[1]))
except UserError as error:
    print(error)
"""


def test_without_a_network_or_a_home_folder_one_line_names_prefetch(tmp_path: Path) -> None:
    """In a process of its own: what is offline is decided when libraries are imported."""
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "home")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": nowhere}
    environment.pop("MTEB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", _OFFLINE, "NFCorpus"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (line,) = ran.stdout.splitlines()
    assert line.startswith("NFCorpus: cannot load the data set mteb/nfcorpus (")
    assert line.endswith(
        "| fix: set snapshots to a folder, and run `diffembed evaluate prefetch` on a machine "
        "with network"
    )
