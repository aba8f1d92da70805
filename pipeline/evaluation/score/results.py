"""What a finished element wrote, and whether it is still what its inputs would give."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.evaluation.models.fingerprints import model_fingerprint
from pipeline.evaluation.tasks.elements import Element
from pipeline.evaluation.tasks.instructions import instruction_for


def element_key(config: EvaluateConfig, element: Element) -> str:
    """A hash of everything an element's scores depend on.

    A finished element with another key is stale and runs again.
    """
    inputs = {
        "model": model_fingerprint(element.model),
        "instruction": instruction_for(element.task, element.model, config),
        "max_length": element.max_length,
        "snapshots": str(config.snapshots),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def read_result(element: Element) -> dict[str, Any] | None:
    """What a finished element wrote, or None."""
    if not element.result_path.is_file():
        return None
    result: dict[str, Any] = json.loads(element.result_path.read_text())
    return result
