"""Faults of DeepSpeed, silent or hanging, that the trainer handles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import launch_ranks

WORKER = Path(__file__).with_name("trap_worker.py")


def results(mode: str, model_path: Path) -> dict[str, dict[str, Any]]:
    output = launch_ranks(2, WORKER, mode, str(model_path))
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line.pop("case"): line for line in lines}


@pytest.fixture(scope="module")
def numbers(model_path: Path) -> dict[str, dict[str, Any]]:
    return results("numbers", model_path)


@pytest.mark.parametrize("schedule", ["cache", "sweep"])
@pytest.mark.parametrize(
    "zero", ["3", "3 unpadded", "3 hpz", "1 offload", "2 offload", "3 offload"]
)
def test_updates_equal_those_of_plain_torch(
    numbers: dict[str, dict[str, Any]], zero: str, schedule: str
) -> None:
    """Also with 3 chunks on one rank and 5 on the other, and without DeepSpeed's default clipping.

    Rounding grows over three updates, to 1e-5 of the gradient. A gather or a reduction for every
    chunk would hang in the unpadded case; clipping or stale weights would give another run.
    """
    result = numbers[f"updates {zero} {schedule}"]
    assert result["norm"] > 10  # clipping at 1.0 would show
    assert result["gradient_error"] <= 1e-4
    assert result["norm_error"] <= 1e-4
    assert result["weight_error"] <= 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_clipped_update_of_a_sweep_equals_that_of_plain_torch(
    numbers: dict[str, dict[str, Any]], stage: int
) -> None:
    """The norm is that of the whole gradient, which no rank has at any time."""
    result = numbers[f"updates {stage} clipped sweep"]
    assert result["norm"] > 10
    assert result["norm_error"] <= 1e-4
    assert result["weight_error"] <= 1e-5


def test_a_rank_has_the_whole_gradients_of_one_layer_however_many_there_are(
    numbers: dict[str, dict[str, Any]],
) -> None:
    """In fp32, in a sweep at stage 3; the token table comes last, when its layers are gone."""
    held = numbers["gradients held"]
    assert held["2 layers"] == held["6 layers"]
    assert held["one layer"] <= held["6 layers"] < 2 * held["one layer"]


def test_modules_have_no_hooks_and_a_forward_outside_of_hold_fails(
    numbers: dict[str, dict[str, Any]],
) -> None:
    """DeepSpeed's hooks would gather before every use of a module; without them, `hold` has to."""
    assert numbers["outside"]["hooks"] == []
    assert numbers["outside"]["error"]
    assert numbers["outside"]["rows"] == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_parameter_group_finds_its_moments(
    numbers: dict[str, dict[str, Any]], stage: int
) -> None:
    assert numbers[f"moments {stage}"]["error"] <= 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_update_that_is_not_finite_is_left_out_and_not_counted(
    numbers: dict[str, dict[str, Any]], stage: int
) -> None:
    result = numbers[f"moments {stage}"]
    assert result["left_out"]
    assert result["steps"] == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_in_bfloat16_do_not_drift_over_128_chunks(
    numbers: dict[str, dict[str, Any]], stage: int
) -> None:
    """Two roundings to 8 bits remain: each rank's sum, and the reduction."""
    result = numbers[f"drift {stage}"]
    assert result["ours"] <= 2**-8
    assert result["autograd"] > 4 * result["ours"]  # or the case would show nothing


def test_traffic_does_not_grow_with_the_number_of_chunks(model_path: Path) -> None:
    """In units of the model; that anything is gathered shows that no parameter stayed whole."""
    traffic = results("traffic", model_path)
    for chunks in (2, 5):
        cache, sweep = traffic[f"cache {chunks}"], traffic[f"sweep {chunks}"]
        # A tenth of a percent for norms of gradients and other scalars.
        assert cache["gathered"] == pytest.approx(1, abs=1e-3)
        assert cache["reduced"] == pytest.approx(1, abs=1e-3)
        assert 1 < sweep["gathered"] <= 2.001
        assert sweep["reduced"] == pytest.approx(1, abs=1e-3)
        # The next layer is gathered while this one computes.
        assert sweep["live_layers"] <= 2.001


def test_a_rank_that_fails_between_backwards_ends_at_once_with_its_reason() -> None:
    """Leaving DeepSpeed's context would start a reduction that the other rank never joins."""
    with pytest.raises(RuntimeError, match="rank 1 ran out of luck"):
        launch_ranks(2, WORKER, "fail", "")
