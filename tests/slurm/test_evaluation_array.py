"""Texts shared among an array's elements, some of them killed: the same scores, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest

from pipeline.config import (
    EvaluateConfig,
    EvaluatedModel,
    ModelConfig,
    StarterConfig,
    Template,
    dump_config,
)
from pipeline.evaluation.datasets import prefetch
from pipeline.evaluation.embed import embed_element, missing_blocks
from pipeline.evaluation.embedding_plan import read_plan, store_folder, write_plan
from pipeline.evaluation.models import load_encoder
from pipeline.evaluation.run import score_all
from pipeline.model.encoder import build_encoder
from pipeline.model.export import export_encoder
from pipeline.model.starter import build_starter
from tests import forks
from tests.evaluation.local_hub import serve
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/benchmarks"))
TASKS = ("BrightAopsRetrieval", "Core17InstructionRetrieval")
NUM_ELEMENTS, NUM_VICTIMS = 4, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The part of a manifest that `export_encoder` reads."""

    path: str
    append_eos: bool = False


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """A small share of two real-sized corpora, fetched from a hub, and a very small model."""
    from full_size_hub import write_hub

    folder = tmp_path_factory.mktemp("array")
    write_hub(folder / "hub", scale=0.017)
    corpus = folder / "corpus.jsonl"
    corpus.write_text(json.dumps({"query": "some words", "positive": "of a text"}) + "\n")
    model = build_starter(
        StarterConfig(
            output_dir=folder / "model",
            corpus=(corpus,),
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_layers=1,
        )
    )
    settings = ModelConfig(path=str(model), dtype="float32")
    export_encoder(
        build_encoder(settings),
        config=settings,
        tokenizer=Source(path=str(model)),
        template=Template(),
        max_length=256,
        output_dir=folder / "export",
        card={"step": 7, "recipe": ""},
    )
    config = EvaluateConfig(
        output_dir=folder / "disturbed",
        models=(EvaluatedModel(name="tiny", path=folder / "export"),),
        tasks=TASKS,
        snapshots=folder / "snapshots",
        max_length=256,
    )
    with serve(folder / "hub") as (address, _):
        prefetch(config, endpoint=address)
    return config


def scores_of(config: EvaluateConfig) -> list[dict[str, object]]:
    return [
        {key: value for key, value in result.items() if key not in ("seconds", "mteb_files")}
        for result in score_all(config)
    ]


def test_an_array_with_half_of_its_elements_killed_and_rerun_scores_bit_identically(
    config: EvaluateConfig, cluster: Cluster, tmp_path: Path
) -> None:
    undisturbed = dataclasses.replace(config, output_dir=tmp_path / "undisturbed")
    plan = write_plan(undisturbed)
    embed_element(undisturbed, 0, 1, load=load_encoder)
    assert len(plan.block_costs) >= 2 * NUM_ELEMENTS

    path = tmp_path / "evaluate.yaml"
    path.write_text(dump_config(config))
    logs = tmp_path / "%a.log"
    environment = {**forks.ENVIRONMENT, "PATH": forks.program_path(tmp_path / "bin")}

    def submit(elements: list[int]) -> str:
        # Two at a time: the nodes claim more processors than this machine has.
        array = f"--array={','.join(map(str, elements))}%2"
        return cluster.attempt(
            *("sbatch", "--parsable", f"--output={logs}", array),
            *("slurm/evaluate.sbatch", "embed", path, "--of", NUM_ELEMENTS),
            cwd=ROOT,
            environment=environment,
            check=True,
        ).stdout.strip()

    write_plan(config)
    generator = random.Random(0)
    victims = sorted(generator.sample(range(NUM_ELEMENTS), NUM_VICTIMS))
    job = submit(list(range(NUM_ELEMENTS)))
    for victim in victims:
        log = tmp_path / f"{victim}.log"
        # One dies before its first block, the others after it.
        sign = "" if victim == victims[0] else "block 1/"
        cluster.poll(lambda log=log, sign=sign: log.exists() and sign in log.read_text())
        cluster.command("scancel", "--signal=KILL", "--full", f"{job}_{victim}")
    # One more starts a second time, as after the failure of its node.
    requeued = max(set(range(NUM_ELEMENTS)) - set(victims))
    log = tmp_path / f"{requeued}.log"
    cluster.poll(lambda: log.exists() and "block 1/" in log.read_text())
    cluster.command("scontrol", "requeue", f"{job}_{requeued}")
    states = cluster.wait(job)
    assert states[f"{job}_{requeued}"] == "COMPLETED"
    assert {states[f"{job}_{victim}"] for victim in victims} <= {"FAILED", "CANCELLED"}
    (model,) = config.models
    lost = missing_blocks(config, model, read_plan(config))
    assert len(plan.block_costs) > len(lost) >= 2

    again = submit(victims)
    assert set(cluster.wait(again).values()) == {"COMPLETED"}
    assert missing_blocks(config, model, read_plan(config)) == []
    ours, theirs = (
        [
            read_plan(each).vectors_path(store_folder(each, model), block).read_bytes()
            for block in range(len(plan.block_costs))
        ]
        for each in (config, undisturbed)
    )
    assert ours == theirs
    assert scores_of(config) == scores_of(undisturbed)
