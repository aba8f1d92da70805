"""A user's own rows on a cluster: `init`, then the chain of docs/slurm.md, to a report."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.new_run import Answers, write_run
from tests.slurm.cluster import Cluster
from tests.tiny_models import tiny_starter
from tests.tools.disturbed_chain import site_settings

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS, NUM_STEPS = 120, 4


def documented_chain(folder: Path) -> dict[str, object]:
    """The chain on the page, for the folder that `init` wrote."""
    page = (ROOT / "docs/slurm.md").read_text()
    (text,) = re.findall(r"^```yaml\n(prepare: faq/data\.yaml\n.*?)^```", page, re.M | re.S)
    tree = yaml.safe_load(text.replace("faq/", f"{folder}/"))
    assert isinstance(tree, dict)
    return tree


def test_own_rows_lead_to_a_report_of_before_and_after_on_the_held_out_ones(
    cluster: Cluster, tmp_path: Path
) -> None:
    rows = [
        {"question": f"where is place {n}", "answer": f"place {n} is here"} for n in range(NUM_ROWS)
    ]
    data, faq = tmp_path / "faq.jsonl", tmp_path / "faq"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tiny_starter(tmp_path / "model", data, num_layers=1))
    answers = Answers(model=model, data=str(data), num_gpus=0, goal="search", holdout=0.1)
    _, train, _ = write_run(faq, answers)
    train.write_text(re.sub(r"num_steps: .*", f"num_steps: {NUM_STEPS}", train.read_text()))
    (faq / "chain.yaml").write_text(yaml.safe_dump(documented_chain(faq)))
    (tmp_path / "cluster.env").write_text(site_settings(prepare_nodes=1))
    site = {"DIFFEMBED_CLUSTER_ENV": str(tmp_path / "cluster.env"), "PYTHONPATH": str(ROOT)}

    def submit() -> dict[str, str]:
        words = (sys.executable, "-m", "pipeline.cli", "submit", "all", faq / "chain.yaml")
        done = cluster.attempt(*words, cwd=ROOT, environment=site, check=True)
        return dict(re.findall(r"^([\w-]+) (\d+) ", done.stdout, re.MULTILINE))

    jobs = submit()
    # Two exports, because the chain scores the untrained model, too.
    assert [name.partition("-")[0] for name in jobs] == [
        *("prepare", "train", "export", "export", "evaluate", "report")
    ]
    cluster.wait(list(jobs.values())[-1])
    ends = {name: set(cluster.states(job).values()) for name, job in jobs.items()}
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(tmp_path.glob("**/*.out")))
    assert set.union(*ends.values()) == {"COMPLETED"}, f"{ends}\n{logs}"

    held_out = faq / "shards/holdout/data-holdout/queries.jsonl"
    num_held_out = len(held_out.read_text().splitlines())
    assert 0 < num_held_out < NUM_ROWS / 2
    (task,) = json.loads((faq / "scores/report/report.json").read_text())["tasks"]
    assert task["name"] == "data-holdout" and task["num_queries"] == num_held_out
    assert {"before", "after"} <= task.keys()
    steps = [json.loads(line)["step"] for line in (faq / "run/metrics.jsonl").open()]
    assert steps == list(range(NUM_STEPS))
    assert (faq / "scores/report/report.md").is_file()
    assert submit() == {}
