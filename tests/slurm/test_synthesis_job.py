"""`slurm/synthesize.sbatch` on a real Slurm, with a local server in place of a language model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import BatchJob, Cluster
from tests.support import PATIENCE

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
# The site's file: every server is the one of tests/reasonaug, in the way that $ENDING names.
SITE = """\
source {root}/slurm/cluster.env
SYNTHESIZE_FLAGS=(--nodes=2 --ntasks-per-node=1 --cpus-per-task=2)
SERVER_NODES=${{NODES:-1}}
SERVER_SECONDS=${{SECONDS_TO_ANSWER:-300}}
start_server() {{
  echo "model $1, rank $SERVER_RANK of $SERVER_NODES, head $SERVER_HEAD, port $SERVER_PORT"
  case ${{ENDING:-}}:$SERVER_RANK in
    broken:*) echo "no GPU found" >&2; exit 3 ;;
    mute:*) exec sleep 3600 ;;
    *:1) exec sleep 3600 ;;
  esac
  exec python -m tests.reasonaug.language_server --port "$SERVER_PORT" \\
    --behaviour "${{BEHAVIOUR:-{{\\}}}}"
}}
"""


class SynthesisJob(BatchJob):
    """`slurm/synthesize.sbatch` with a small config.

    Args:
        cluster: runs it.
        folder: holds its config, site file, log and results.
        environment: variables of the job.
    """

    def __init__(self, cluster: Cluster, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir()
        concepts = {"physics theorem": ["Snell's Law", "Ideal Gas Law"]}
        (folder / "concepts.yaml").write_text(json.dumps(concepts))
        self.run = folder / "run"
        config = {
            "output_dir": str(self.run),
            "model": {"name": "template"},
            "concepts": {"files": [str(folder / "concepts.yaml")]},
            "problems": {"per_concept": 2},
            "limits": {"concurrency": 2, "timeout": 60},
            # The server knows the results of its own problems only, not another server's.
            "checks": {"solution": False},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "cluster.env").write_text(SITE.format(root=ROOT))
        super().__init__(cluster, folder / "log")
        self.id = cluster.attempt(
            *("sbatch", "--parsable", f"--output={self.log}", "--nodes=2", "--ntasks-per-node=1"),
            *("--cpus-per-task=2", "--mem=2000"),
            *("slurm/synthesize.sbatch", folder / "config.yaml"),
            check=True,
            cwd=ROOT,
            environment={
                "DIFFEMBED_CLUSTER_ENV": str(folder / "cluster.env"),
                "PYTHONPATH": str(ROOT),
                # A proxy of the site, which does not know the nodes.
                "http_proxy": "http://127.0.0.1:1",
                **environment,
            },
        ).stdout.strip()

    def servers(self) -> list[str]:
        """Return the logs of its servers."""
        return [path.read_text() for path in sorted((self.run / "jobs").glob("server-*.out"))]


@pytest.fixture(scope="module")
def jobs(
    session_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, SynthesisJob]]:
    """All jobs at once: most of their time is waiting."""
    folder = tmp_path_factory.mktemp("synthesis")
    wanted: dict[str, dict[str, str]] = {
        "out of time": {"BEHAVIOUR": json.dumps({"delay": 1.5})},
        "cancelled": {"NODES": "2", "BEHAVIOUR": json.dumps({"delay": PATIENCE})},
        "broken": {"ENDING": "broken"},
        "mute": {"ENDING": "mute", "SECONDS_TO_ANSWER": "1"},
    }
    started = {
        name: SynthesisJob(session_cluster, folder / name.replace(" ", "-"), environment)
        for name, environment in wanted.items()
    }
    yield started
    session_cluster.cancel_all()


def test_a_server_that_does_not_start_ends_the_job_with_its_last_line(
    jobs: dict[str, SynthesisJob],
) -> None:
    job = jobs["broken"]

    assert job.end() == "FAILED"
    assert job.find(r"DiffembedError: the server at http://127\.0\.0\.1:\d+/v1 ended before it ")
    assert job.find(
        r"fix: read .*/server-\d+-\d\.out; start_server in slurm/cluster\.env starts it"
    )
    assert "no GPU found" in "".join(job.servers())


def test_a_server_that_never_answers_ends_the_job_at_the_limit(
    jobs: dict[str, SynthesisJob],
) -> None:
    job = jobs["mute"]

    assert job.end() == "FAILED"
    assert job.find("did not answer within SERVER_SECONDS=1: .* fix: read .*, or raise")


def test_a_job_out_of_time_is_requeued_and_asks_nothing_twice(
    jobs: dict[str, SynthesisJob], session_cluster: Cluster
) -> None:
    job = jobs["out of time"]
    session_cluster.poll(lambda: len(ledger(job)) > 2)

    # As `--signal=B:USR1@120` two minutes before the time limit.
    session_cluster.command("scancel", "--batch", "--signal=USR1", job.id)

    assert job.end() == "COMPLETED"
    assert job.find("^requeued: out of time")
    assert job.find("not requeued: finished")
    keys = ledger(job)
    assert len(keys) == len(set(keys))
    assert len((job.run / "rows.jsonl").read_text().splitlines()) > 10


def test_the_nodes_of_a_job_are_divided_into_servers(jobs: dict[str, SynthesisJob]) -> None:
    job = jobs["out of time"]
    job.end()

    ports = set()
    for text in job.servers():
        (port,) = set(re.findall(r"model template, rank 0 of 1, head 127.0.0.1, port (\d+)", text))
        ports.add(port)
    assert len(ports) == 2


def test_a_cancelled_job_stays_cancelled_and_leaves_no_server(
    jobs: dict[str, SynthesisJob], session_cluster: Cluster
) -> None:
    job = jobs["cancelled"]
    session_cluster.poll(lambda: job.find("answers after") != [])

    session_cluster.command("scancel", job.id)

    assert job.end() == "CANCELLED"
    # One server on both nodes.
    (text,) = job.servers()
    found = re.findall(r"rank (\d) of 2, head 127.0.0.1, port (\d+)", text)
    assert sorted(rank for rank, _ in found) == ["0", "1"]
    mark = f"--port\0{found[0][1]}\0"
    session_cluster.poll(lambda: not any(mark in words for words in commands()))


def ledger(job: SynthesisJob) -> list[str]:
    """The keys of all recorded answers."""
    files = (job.run / "ledger").glob("*.jsonl")
    lines = [line for path in files for line in path.read_text().splitlines(keepends=True)]
    return [json.loads(line)["key"] for line in lines if line.endswith("\n")]


def commands() -> list[str]:
    """The command lines of all processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found
