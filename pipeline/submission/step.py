"""Submits export, scores and report of one checkpoint while its run continues.

python -m pipeline.submission.step TRAIN_YAML CHECKPOINT EVALUATE_YAML [TEXT_ELEMENTS]
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config import ExportStep
from pipeline.errors import errors_end_the_process
from pipeline.submission.chain import evaluate_chain, export_chain
from pipeline.submission.submit import Submission, submit


def main(words: list[str]) -> None:
    """Submit the chain; what is finished or submitted already is left out."""
    train, checkpoint, evaluate, *texts = words
    chain = export_chain(Path(train), (), (ExportStep(checkpoint=checkpoint),))
    scores = evaluate_chain(
        Path(evaluate),
        text_elements=int(texts[0]) if texts else None,
        # The export is still to come.
        ready=not chain.jobs,
    )
    submit(chain.then(scores), Submission())


if __name__ == "__main__":
    with errors_end_the_process():
        main(sys.argv[1:])
