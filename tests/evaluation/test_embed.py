"""Several processes of one element: the same bytes, and nobody is left behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_support import load_letters

from pipeline.config import EvaluateConfig, dump_config
from pipeline.errors import UserError
from pipeline.evaluation.embed import embed_element
from pipeline.evaluation.embedding_plan import store_folder, write_plan
from tests.support import PATIENCE

HERE = Path(__file__).parent
SCRIPT = """\
import sys
from pathlib import Path
import evaluation_support
from pipeline.config import EvaluateConfig, load_config
from pipeline.evaluation.embed import embed_element

if __name__ == "__main__":
    config = load_config(EvaluateConfig, Path(sys.argv[1]))
    embed_element(config, 0, 1, load=evaluation_support.load_endless, num_processes=2)
"""


@pytest.fixture
def planned(config, small_blocks) -> EvaluateConfig:
    """One model and one task in many small blocks."""
    config = dataclasses.replace(config, models=config.models[:1], tasks=("BrightAopsRetrieval",))
    write_plan(config)
    return config


def blocks_of(config: EvaluateConfig) -> dict[Path, bytes]:
    store = store_folder(config, config.models[0])
    return {path.relative_to(store): path.read_bytes() for path in store.glob("*/*.npy")}


def test_processes_of_one_element_write_what_one_process_writes(planned, capsys):
    count = embed_element(planned, 0, 1, load=load_letters)
    alone = blocks_of(planned)
    for path in store_folder(planned, planned.models[0]).glob("*/*.npy"):
        path.unlink()
    capsys.readouterr()
    assert embed_element(planned, 0, 1, load=load_letters, num_processes=2) == count > 2
    assert len(alone) == count
    assert blocks_of(planned) == alone
    assert f"block {count}/{count}" in capsys.readouterr().out
    assert embed_element(planned, 0, 1, load=load_letters, num_processes=2) == 0


def test_a_store_begun_at_one_precision_refuses_vectors_of_another(planned):
    def load_half(config, element):
        return dataclasses.replace(load_letters(config, element), precision="bfloat16")

    embed_element(planned, 0, 2, load=load_letters)
    begun = blocks_of(planned)
    with pytest.raises(UserError, match="float32, stored as float16.*computes in bfloat16"):
        embed_element(planned, 1, 2, load=load_half)
    assert blocks_of(planned) == begun


def test_processes_end_with_the_one_that_started_them(planned, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(dump_config(planned))
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "config.yaml")], env=environment
    )
    try:
        found = wait_for(lambda: list(planned.output_dir.glob("*.process")), 2)
        children = [int(path.stem) for path in found]
        assert all(running(child) for child in children)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: [child for child in children if not running(child)], 2)


def wait_for(found, count: int) -> list:
    """Poll until that many are found."""
    deadline = time.monotonic() + PATIENCE
    while len(everything := found()) < count:
        assert time.monotonic() < deadline, everything
        time.sleep(0.1)
    return everything


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
