"""The parts of a synthesis job that need no Slurm: its nodes, its place in a chain, its script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.submission.chain import synthesize_chain, whole_chain
from pipeline.submission.restart import Ending, decide
from pipeline.submission.serving import describe_synthesis, divide, without_proxy
from pipeline.submission.submit import Submission, batch_scripts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def synthesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config without servers, in a folder that holds what a submission needs."""
    monkeypatch.chdir(tmp_path)
    for name in ("slurm", "launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    config = {
        "output_dir": "runs/synthesis",
        "model": {"name": "Qwen/Qwen3-32B"},
        "concepts": {"builtin": True},
    }
    path = tmp_path / "synthesis.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return path


def test_nodes_are_divided_into_servers_of_one_size() -> None:
    nodes = ["a", "b", "c", "d"]

    assert divide(nodes, 1) == [("a",), ("b",), ("c",), ("d",)]
    assert divide(nodes, 2) == [("a", "b"), ("c", "d")]
    with pytest.raises(UserError, match="SERVER_NODES=3"):
        divide(nodes, 3)


def test_requests_to_the_servers_pass_no_proxy() -> None:
    environment = {"http_proxy": "http://proxy", "NO_PROXY": "localhost"}

    found = without_proxy(environment, ["10.0.0.1", "10.0.0.2", "10.0.0.1"])

    assert found["no_proxy"] == found["NO_PROXY"] == "localhost,10.0.0.1,10.0.0.2"
    assert found["http_proxy"] == "http://proxy"


def test_a_synthesis_whose_budget_is_used_up_is_not_requeued() -> None:
    ending = {"out_of_time": False, "preempted": False, "running": True, "idle_starts": 1}

    assert decide(Ending(code=75, what="the synthesis", **ending))[0] == "leave"
    assert decide(Ending(code=1, what="the synthesis", **ending)) == (
        "requeue",
        "the synthesis ended with exit code 1",
    )


def test_a_wrong_config_is_refused_with_the_line_of_the_synthesis(synthesis: Path) -> None:
    with pytest.raises(UserError, match=r"problems\.per_concept: 0 \| allowed: an integer >= 1"):
        describe_synthesis((str(synthesis), "problems.per_concept=0"))


def test_a_synthesis_may_come_before_the_shards(synthesis: Path) -> None:
    recipe = Path("launch/recipes/synthesis/chain.yaml")

    jobs = whole_chain(recipe).jobs

    assert [(job.name, job.after) for job in jobs] == [
        ("synthesize", ()),
        ("prepare", ("synthesize",)),
        ("train", ("prepare",)),
        ("export-latest", ("train",)),
    ]
    # The shards hold the rows that the synthesis writes.
    rows = jobs[0].folder.parent / "rows.jsonl"
    assert any(str(rows) in text for text in jobs[1].files.values())
    with pytest.raises(UserError, match=r"synthesize: .* null without prepare"):
        whole_chain(recipe, ("prepare=null",))


def test_the_batch_script_starts_servers_for_a_frozen_config(synthesis: Path) -> None:
    text = batch_scripts(synthesize_chain(synthesis, ("seed=7",)), Submission())

    (path,) = [line for line in text.splitlines() if line.startswith("set -- ")]
    assert path.startswith("set -- runs/synthesis/jobs/synthesize-") and path.endswith(".yaml")
    assert "#SBATCH --signal=B:USR1@120" in text
    assert "#SBATCH --gpus-per-node=8" in text
    assert "exec python -m pipeline.submission.serving" in text
    (job,) = synthesize_chain(synthesis, ("seed=7",)).jobs
    assert yaml.safe_load(next(iter(job.files.values())))["seed"] == 7


def test_a_finished_synthesis_is_not_submitted(
    synthesis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {**vars_of(synthesis), "rows": 60}
    program = synthesis.with_name("ReasonAug")
    program.mkdir()
    # Without it the installed package would come first, wherever it is on the path.
    (program / "__init__.py").touch()
    (program / "__main__.py").write_text(f"print({json.dumps(json.dumps(state))})")
    monkeypatch.setenv("PYTHONPATH", str(synthesis.parent))

    chain = synthesize_chain(synthesis)

    assert chain.jobs == ()
    assert chain.finished == ("synthesize: runs/synthesis has all of its 60 rows",)


def vars_of(synthesis: Path) -> dict[str, object]:
    """The state of an unfinished synthesis, as the program prints it."""
    found = describe_synthesis((str(synthesis),))
    assert (str(found.output_dir), found.model, found.rows) == (
        *("runs/synthesis", "Qwen/Qwen3-32B"),
        None,
    )
    return {name: getattr(found, name) for name in found.__slots__} | {
        "output_dir": str(found.output_dir)
    }
