"""The walks of docs/extend.md, made to copies of the files that they name."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import mteb
import pytest
import yaml

from pipeline.config import EvaluateConfig, SourceConfig, build_config
from pipeline.data import sources
from pipeline.evaluation import tasks
from pipeline.evaluation.run import run_element
from pipeline.model import architectures
from tests.evaluation import benchmark_replicas
from tests.evaluation.evaluation_support import load_letters
from tests.loss import test_contrastive as loss_tests
from tests.model import test_architectures as model_tests

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extend.md"
# The walks say in words where a block goes: these lines follow it.
FOLLOWED_BY = {
    "A backbone": ("_DECODER = Family(", '    "eurobert":', '    "olmo2":'),
    "A source format": ("def parse_lines(", '    "lines":'),
    "A loss term": (
        "    matryoshka_dims: tuple",
        "        return score_grad_P, log_mass_grad_R",
        "    return total\n\n\ndef _cross_entropy",
    ),
    "A benchmark": ('    "BRIGHT-v1":', "    **_BRIGHT_INSTRUCTIONS,"),
}


def section(heading: str) -> str:
    return re.split(r"^## ", PAGE.read_text().partition(f"## {heading}\n")[2], flags=re.M)[0]


def edited_files(heading: str) -> dict[str, str]:
    """Return the text of each file that a walk edits, by path; the files stay as they are."""
    edits = re.findall(r"^```python (\S+)\n(.*?)^```", section(heading), re.DOTALL | re.M)
    texts: dict[str, str] = {}
    for (path, block), following in zip(edits, FOLLOWED_BY[heading], strict=True):
        text = texts.setdefault(path, (ROOT / path).read_text())
        assert text.count(following) == 1, f"{path}: {following}"
        gap = "\n\n" if block.startswith("def ") else ""
        texts[path] = text.replace(following, block + gap + following)
    return texts


def run_edited(files: dict[str, str], path: str) -> ModuleType:
    # The real name, by which dataclasses look up the types of their fields.
    module = ModuleType(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    exec(compile(files[path], path, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("heading", FOLLOWED_BY)
def test_a_walk_is_shorter_than_forty_lines(heading: str) -> None:
    assert len(section(heading).splitlines()) < 40


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_walk_to_a_backbone_ends_at_transformers_vectors_and_gradients(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = edited_files("A backbone")
    families = run_edited(files, "pipeline/model/architectures.py").FAMILIES
    monkeypatch.setitem(architectures.FAMILIES, "granite", families["granite"])
    cases = run_edited(files, "tests/model/model_support.py").CASES
    monkeypatch.setitem(model_tests.CASES, "granite", cases["granite"])
    model_tests.test_packed_rows_equal_transformers_padded_batch("granite", attention, tmp_path)


def test_the_walk_to_a_source_format_ends_at_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = edited_files("A source format")
    table = run_edited(files, "pipeline/data/sources/__init__.py").FORMATS
    monkeypatch.setattr(sources, "FORMATS", table)
    path = tmp_path / "articles.jsonl"
    path.write_text('{"title": "Foxes", "body": "A fox is red."}\n')
    source = SourceConfig(name="news", format="titles", path=str(path), instruction="Find it")
    (block,) = sources.plan_source(source, block_bytes=2**20)
    rows = [row for _, row in sources.read_rows(source, block, None)]
    assert rows == [sources.Row(query="Foxes", positives=("A fox is red.",), instruction="Find it")]


def test_the_walk_to_a_loss_term_ends_at_the_references_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = edited_files("A loss term")
    config_class = run_edited(files, "pipeline/config/training.py").LossConfig
    loss = run_edited(files, "pipeline/loss/contrastive.py")
    reference = run_edited(files, "tests/loss/reference.py")
    monkeypatch.setattr(loss_tests, "contrastive_loss", loss.contrastive_loss)
    monkeypatch.setattr(loss_tests, "naive_loss", reference.naive_loss)
    case = reference.make_case()
    losses = []
    for penalty in (0.0, 0.1):
        config = config_class(similarity="dot", temperature=5, score_penalty=penalty)
        (share,) = loss_tests.loss_of_rank(case, [config], loss_tests.TINY)
        loss_tests.assert_equal_to_naive(case, config, [share])
        losses.append(float(share.output.loss))
    assert losses[1] > losses[0] + 0.01


def test_the_walk_to_a_benchmark_ends_at_scores_of_mtebs_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = run_edited(edited_files("A benchmark"), "pipeline/evaluation/tasks.py")
    names = {task.metadata.name for task in mteb.get_benchmark("R2MED").tasks}
    assert set(edited.BENCHMARKS["R2MED"]) == names
    for table in ("BENCHMARKS", "INSTRUCTIONS"):
        monkeypatch.setitem(getattr(tasks, table), "R2MED", getattr(edited, table)["R2MED"])
    (text,) = re.findall(r"^```yaml \S+\n(.*?)^```", section("A benchmark"), re.DOTALL | re.M)
    tree: dict[str, Any] = yaml.safe_load(text) | {"snapshots": str(tmp_path), "max_length": 64}
    tree |= {"output_dir": str(tmp_path / "scores")}
    tree["models"][0]["path"] = str(tmp_path / "export")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_text("letters")
    config = build_config(EvaluateConfig, tree, origin="extend.md")
    _write_set(tmp_path, "R2MED/Biology")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

    assert {element.task for element in tasks.list_elements(config)} == names
    result = run_element(config, 0, load=load_letters)
    assert (result["task"], result["benchmark"]) == ("R2MEDBiologyRetrieval", "R2MED")
    assert result["instruction"].startswith("Given a medical question")
    assert 0 < result["score"] <= 1


def _write_set(root: Path, repository: str) -> None:
    """Write a data set in R2MED's layout on the hub."""
    documents = benchmark_replicas.documents_of(repository)
    benchmark_replicas.write_dataset(
        root,
        repository,
        {
            "corpus": {"corpus": [{"id": name, "text": text} for name, _, text in documents]},
            "query": {"query": [{"id": "q", "text": "Why do honey bees dance?"}]},
            "qrels": {
                "qrels": [
                    {"q_id": "q", "p_id": name, "score": 1}
                    for name, topic, _ in documents
                    if topic == "honey bees"
                ]
            },
        },
    )
