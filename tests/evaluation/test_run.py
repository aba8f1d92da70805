"""Elements: independent, resumable, and refused before any work is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from evaluation_support import BagOfLetters, wrap

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.errors import UserError
from pipeline.evaluation.run import plan, run_all, run_element
from pipeline.evaluation.tasks import (
    INSTRUCTIONS,
    PAPER_INSTRUCTIONS,
    list_elements,
)
from pipeline.files import hold_lock

AOPS, CORE = "BrightAopsRetrieval", "Core17InstructionRetrieval"


def refuse(*_: object) -> None:
    raise AssertionError("loaded a model for a finished element")


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


def test_vectors_that_are_not_finite_are_never_scored(one: EvaluateConfig) -> None:
    class Broken(BagOfLetters):
        def encode_texts(self, texts, prefix="", suffix=""):
            vectors = super().encode_texts(texts, prefix)
            vectors[-1, 0] = np.nan
            return vectors

    with pytest.raises(UserError, match="1 of 8 vectors are not finite, the first of 'Why do"):
        run_all(one, load=lambda config, element: wrap(Broken(), element.model.name))


def test_a_finished_element_is_skipped_and_an_unfinished_one_runs(config, load):
    config = dataclasses.replace(config, tasks=("BrightBiologyRetrieval",))
    first = run_element(config, 0, load=load)
    assert run_element(config, 0, load=refuse) == first
    list_elements(config)[0].result_path.unlink()
    with pytest.raises(AssertionError, match="finished element"):
        run_element(config, 0, load=refuse)


def test_of_two_processes_with_one_element_the_second_waits_and_takes_the_result(config, load):
    config = dataclasses.replace(config, tasks=("BrightBiologyRetrieval",))
    (element, _) = list_elements(config)
    first = run_element(config, 0, load=load)
    content = element.result_path.read_bytes()
    element.result_path.unlink()
    lock, found = element.folder / ".lock", []
    with hold_lock(lock, tell=print), contextlib.redirect_stdout(io.StringIO()) as printed:
        second = threading.Thread(target=lambda: found.append(run_element(config, 0, load=refuse)))
        second.start()
        while "waiting for another process that scores it" not in printed.getvalue():
            assert second.is_alive()
            time.sleep(0.01)
        element.result_path.write_bytes(content)
    second.join()
    assert found == [first]
    assert not lock.exists()


def test_an_interrupted_element_leaves_nothing_that_counts_as_finished(config, load):
    config = dataclasses.replace(config, tasks=("BrightBiologyRetrieval",))

    class Interrupted:
        def embed(self, *_: object) -> object:
            raise KeyboardInterrupt

    def die(*args: object) -> object:
        encoder = load(*args)
        return dataclasses.replace(encoder, embedder=Interrupted())

    with pytest.raises(KeyboardInterrupt):
        run_element(config, 0, load=die)
    assert not list_elements(config)[0].result_path.exists()


def test_a_folder_without_weights_is_the_users_error(config, tmp_path):
    (tmp_path / "empty").mkdir()
    models = (EvaluatedModel(name="m", path=tmp_path / "empty"),)
    broken = EvaluateConfig(output_dir=tmp_path, models=models, tasks=("BrightAopsRetrieval",))
    with pytest.raises(UserError, match="no export there"):
        run_element(broken, 0)


def test_counting_elements_loads_neither_torch_nor_mteb():
    code = (
        "import sys; import pipeline.evaluation.run; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'mteb', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path.cwd()).returncode == 0


def test_each_model_is_scored_with_its_own_wording_and_says_so(config, load):
    paper = dataclasses.replace(config.models[1], name="paper", instruction_set="paper")
    config = dataclasses.replace(config, tasks=(AOPS,), models=(config.models[1], paper))
    ours, theirs = run_all(config, load=load)
    assert ours["instruction"] == INSTRUCTIONS[AOPS]
    assert theirs["instruction"] == PAPER_INSTRUCTIONS[AOPS]
    assert ours["inputs"]["instruction"] != theirs["inputs"]["instruction"]
