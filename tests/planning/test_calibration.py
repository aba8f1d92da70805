"""Seconds from measured constants, the files that hold them, and the measurement itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_planning import BASE, QWEN_7B, SEVEN_B, WORKLOAD
from typer.testing import CliRunner

from pipeline import train
from pipeline.cli import app
from pipeline.config import LoraConfig, TrainConfig, load_config
from pipeline.errors import UserError
from pipeline.launch import discover_world, processor_name
from pipeline.measuring import calibrate as measure
from pipeline.planning import RunPlan, plan_run, seconds_of
from pipeline.planning.calibration import (
    FOLDER_VARIABLE,
    VERSION,
    Attention,
    Both,
    Calibration,
    Constants,
    DtypeSpeed,
    EngineSpeed,
    Line,
    Product,
    default_path,
    find,
    load,
    save,
)
from pipeline.planning.describe import describe as describe_plan
from pipeline.planning.measured import (
    attention_seconds,
    forward_seconds,
    interpolate,
    measured_seconds,
    num_tensors,
)
from pipeline.planning.memory import Target
from pipeline.planning.shape import ModelShape
from pipeline.planning.speed import StepWork, forwards_of, step_flops
from pipeline.training.ds_config import resolve_ds_config
from tests.gpu.part_calibrate import TINY
from tests.support import output_of_code, run_ranks

ROOT = Path(__file__).resolve().parents[2]
# Every linear layer at 1 PFLOP/s, attention at half of it; nothing else takes time.
SPEED = 1e15
NONE = Line(fixed=0.0, each=0.0)
FREE = Both(forward=NONE, backward=NONE)
LENGTHS = np.full(4, 2048)
WORK = StepWork(
    workload=dataclasses.replace(WORKLOAD, rank_tokens=int(2 * LENGTHS.sum())),
    chunks=(LENGTHS, LENGTHS),
    causal=False,
    kept=0.0,
    loss=None,
    network=50e9,
)


def constants(ranks: int = 8) -> Constants:
    products = [
        Product(
            tokens=tokens,
            inputs=inputs,
            outputs=outputs,
            **dict.fromkeys(
                ("forward", "by_input", "by_weight"), 2.0 * tokens * inputs * outputs / SPEED
            ),
        )
        for tokens in (16, 4096)
        for inputs in (16, 4096)
        for outputs in (16, 4096)
    ]
    attention = [
        Attention(length=length, head_width=width, forward=flops, backward=2.5 * flops)
        for length in (16, 4096)
        for width in (64, 128)
        for flops in [4.0 * length**2 * width / SPEED * 2]
    ]
    speed = DtypeSpeed(
        products=products,
        attention=attention,
        dropped_attention=attention,
        rest={"rms": FREE, "layer": FREE},
        outside=FREE,
        adapters=FREE,
        dropout=FREE,
    )
    engine = EngineSpeed(gather=NONE, reduce=NONE, update=NONE)
    return Constants(
        ranks=ranks,
        dtypes={"bfloat16": speed, "float32": speed},
        engine={"2": engine, "3": engine},
        add=0.0,
        table=0.0,
        agreement=0.0,
        loss=NONE,
        search=Line(fixed=2e-6, each=1e-13),
        host=50e9,
    )


def machine(*found: Constants, **changes: Any) -> Calibration:
    return Calibration(
        **{
            "version": VERSION,
            "device": "NVIDIA H100 80GB HBM3",
            "on_gpu": True,
            "memory": 80e9,
            "threads": 1,
            "torch": torch.__version__,
            "date": "2026-11-29",
            "constants": list(found or (constants(),)),
            **changes,
        }
    )


def seconds(schedule: str, found: Constants, shape: ModelShape = SEVEN_B, **changes: Any) -> dict:
    parts = measured_seconds(shape, WORK, schedule, machine(found, **changes))  # type: ignore[arg-type]
    return {part.part: part.seconds for part in parts}


# --- seconds ---------------------------------------------------------------------------------


def test_a_point_of_the_grid_is_itself_and_the_middle_is_the_middle_of_logarithms() -> None:
    grid = {(1, 1): 1.0, (1, 100): 4.0, (10, 1): 16.0, (10, 100): 64.0}
    for at, value in grid.items():
        assert interpolate(grid, at) == pytest.approx(value)
    assert interpolate(grid, (1, 10)) == pytest.approx(2.0)
    # Outside, the nearest point counts.
    assert interpolate(grid, (1000, 1000)) == pytest.approx(64.0)


def test_layers_at_one_speed_take_their_flops_and_attention_its_own() -> None:
    attention = 4.0 * 3584 * WORK.squares * SEVEN_B.num_layers
    for schedule, forwards in (("plain", 1), ("cache", 1), ("sweep", 2)):
        flops = step_flops(SEVEN_B, WORK, schedule)  # type: ignore[arg-type]
        # At half the speed, attention takes its time once more.
        expected = (flops + attention * (forwards + 2.5)) / SPEED
        assert seconds(schedule, constants())["compute"] == pytest.approx(expected, rel=1e-3)


def test_frozen_weights_have_no_gradient_and_adapters_add_their_own() -> None:
    lora = ModelShape.planned(QWEN_7B, dataclasses.replace(BASE, lora=LoraConfig(rank=16)))
    attention = 4.0 * 3584 * WORK.squares * SEVEN_B.num_layers
    flops = step_flops(lora, WORK, "cache")
    expected = (flops + attention * 3.5) / SPEED
    assert seconds("cache", constants(), lora)["compute"] == pytest.approx(expected, rel=5e-3)


def test_dropouts_of_adapters_and_of_the_model_count_by_their_numbers() -> None:
    line = Line(fixed=0.0, each=1e-9)
    found = constants()
    dropping = dataclasses.replace(
        found.dtypes["bfloat16"], dropout=Both(forward=line, backward=line)
    )
    dropping_too = dataclasses.replace(found, dtypes={"bfloat16": dropping})

    def added(shape: ModelShape) -> float:
        with_it, without = (
            seconds("cache", each, shape)["compute"] for each in (dropping_too, found)
        )
        return with_it - without

    assert added(SEVEN_B) == 0
    lora = LoraConfig(rank=16, dropout=0.0)
    assert added(ModelShape.planned(QWEN_7B, dataclasses.replace(BASE, lora=lora))) == 0
    adapted = ModelShape.planned(QWEN_7B, dataclasses.replace(BASE, lora=LoraConfig(rank=16)))
    assert adapted.adapters is not None
    tokens = sum(float(lengths.sum()) for lengths in WORK.chunks)
    passes = 1 + forwards_of(WORK, "cache")
    numbers = tokens * sum(linear.inputs for linear in adapted.adapters.linears)
    assert added(adapted) == pytest.approx(passes * adapted.num_layers * numbers * 1e-9)
    masked = dataclasses.replace(
        SEVEN_B, architecture=dataclasses.replace(SEVEN_B.architecture, masks=2)
    )
    numbers = 2 * tokens * SEVEN_B.hidden_size
    assert added(masked) == pytest.approx(passes * SEVEN_B.num_layers * numbers * 1e-9)
    # Nothing is dropped where texts are embedded.
    alone = [
        forward_seconds(shape, WORK.chunks[0], machine(each), dtype="bfloat16", causal=False)
        for shape in (SEVEN_B, masked, adapted)
        for each in (found, dropping_too)
    ]
    assert alone[:4] == pytest.approx([alone[0]] * 4)
    assert alone[5] == pytest.approx(alone[4])


def test_attention_with_dropout_has_its_own_speed_in_training() -> None:
    found = constants().dtypes["bfloat16"]
    slow = [
        dataclasses.replace(row, forward=3 * row.forward, backward=3 * row.backward)
        for row in found.attention
    ]
    speed = dataclasses.replace(found, dropped_attention=slow)
    each = dataclasses.replace(constants(), dtypes={"bfloat16": speed})
    dropped = dataclasses.replace(BASE, attention_dropout=0.1)
    base, slower = (
        seconds("plain", each, ModelShape.planned(QWEN_7B, model))["compute"]
        for model in (BASE, dropped)
    )
    attention = 3.5 * 4.0 * 3584 * WORK.squares * SEVEN_B.num_layers / SPEED * 2
    assert slower - base == pytest.approx(2 * attention, rel=1e-3)
    # A published dropout counts, unless the config sets another one.
    for published, chosen, expected in ((0.1, None, slower), (0.1, 0.0, base), (0.0, 0.1, slower)):
        tree = {**QWEN_7B, "attention_dropout": published}
        model = dataclasses.replace(BASE, attention_dropout=chosen)
        assert seconds("plain", each, ModelShape.planned(tree, model))["compute"] == expected


def test_a_fixed_time_adds_up_on_a_cpu_and_hides_behind_kernels_on_a_gpu() -> None:
    base = seconds("cache", constants())["compute"]
    line = Line(fixed=1e-6, each=0.0)
    speed = dataclasses.replace(
        constants().dtypes["bfloat16"], rest={"rms": Both(forward=line, backward=line)}
    )
    slower = dataclasses.replace(constants(), dtypes={"bfloat16": speed})
    assert seconds("cache", slower)["compute"] == pytest.approx(base)
    layers = 2 * 2 * SEVEN_B.num_layers  # forward and backward of two chunks
    on_cpu = seconds("cache", slower, on_gpu=False)["compute"]
    assert on_cpu == pytest.approx(base + layers * 1e-6)


def test_gather_and_reduction_count_tensors_and_numbers_and_a_sweep_gathers_layers_twice() -> None:
    gather = Line(fixed=1e-3, each=1e-12)
    engine = EngineSpeed(gather=gather, reduce=NONE, update=NONE)
    found = dataclasses.replace(constants(), engine={"2": engine, "3": engine})
    once = num_tensors(SEVEN_B, trained=False) * 1e-3 + SEVEN_B.parameters * 1e-12 / 2
    assert seconds("cache", found)["gather"] == pytest.approx(once)
    # On a CPU nothing hides it: layers twice, the rest once.
    outer = SEVEN_B.outer_parameters / SEVEN_B.parameters
    swept = seconds("sweep", found, on_gpu=False)["gather"]
    assert swept == pytest.approx(once * (2 - outer))


def test_constants_are_of_as_many_ranks_as_share_the_machine() -> None:
    found = machine(constants(1), constants(4))
    assert [found.of(ranks).ranks for ranks in (1, 2, 4, 8)] == [1, 1, 4, 4]
    with pytest.raises(UserError, match=r"calibration of 1 rank on NVIDIA .* calibrate --ranks 8"):
        measured_seconds(SEVEN_B, WORK, "cache", machine(constants(1)))


def test_auto_takes_the_fastest_schedule_that_fits_and_a_resumed_run_keeps_its_own(
    recipe: Path, tmp_path: Path
) -> None:
    """A sweep computes a third more, and hides a reduction that the others wait for."""
    config = load_config(TrainConfig, recipe, ("chunks.keep_graphs=0", "model.dtype=bfloat16"))
    model = tmp_path / "deep"
    shutil.copytree(config.model.path, model)
    tree = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 16}
    (model / "config.json").write_text(json.dumps(tree))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=str(model)), schedule="auto"
    )
    zero = resolve_ds_config({"zero_optimization": {"stage": 3}}, config, world_size=8)
    target = Target.gpu("h100", ranks_per_host=8)

    def plan(reduce: float, **more: Any) -> RunPlan:
        line = Line(fixed=0.0, each=reduce)
        engine = EngineSpeed(gather=NONE, reduce=line, update=NONE)
        speed = machine(dataclasses.replace(constants(), engine={"2": engine, "3": engine}))
        return plan_run(config, zero, world_size=8, target=target, build=False, speed=speed, **more)

    fast = plan(0.0)
    assert [schedule for schedule, _ in fast.considered] == ["plain", "cache", "sweep"]
    (_, least), (_, more), _ = fast.considered
    assert f"plain (auto: {least:.3g} s a step, the least of what fits; cache {more:.3g} s)" in (
        describe_plan(fast, config)
    )
    # As long as two thirds of the plain step: half a sweep's backward hides nearly all of it.
    slow = plan(least * 2 / 3 / (fast.shape.trainable / 2))
    assert slow.schedule == "sweep"
    seconds = dict(slow.considered)
    assert seconds["sweep"] < seconds["plain"] < seconds["cache"]
    assert plan(0.0, earlier="sweep").schedule == "sweep"
    assert (
        plan_run(config, zero, world_size=8, target=target, build=False, earlier="cache").schedule
        == "cache"
    )


# --- files -----------------------------------------------------------------------------------


def test_a_file_is_found_by_the_gpu_and_one_of_another_device_or_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert find("h100", None, None) == (None, "")
    path = default_path("NVIDIA H100 80GB HBM3")
    save(machine(), path)
    assert path.parent == tmp_path
    assert find("h100", None, None) == find(None, "NVIDIA H100 80GB HBM3", None) == (machine(), "")
    assert find("a100-80", None, None) == (None, "")
    found, warning = find("a100-80", None, path)
    assert found is None and "measured on NVIDIA H100" in warning and "not used" in warning
    save(machine(torch="1.0"), path)
    found, warning = find("h100", None, None)
    assert found is not None and "measured with torch 1.0, not " in warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(date="2020-01-01"), "damaged"),
        (lambda tree: tree["constants"][0].pop("add"), "damaged"),
        (lambda tree: tree.clear(), r"damaged \("),
        (lambda tree: (tree.clear(), tree.update(json.loads(OLD))), "of version 0"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "machine.json"
    save(machine(), path)
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and "diffembed plan calibrate" in str(error.value)


OLD = json.dumps(dataclasses.asdict(machine(version=0)))


def test_commands_plan_with_a_calibration_and_say_so_without_torch(
    recipe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "machine.json"
    save(machine(constants(1), constants(2)), path)
    words = [str(recipe), "--deepspeed", str(ROOT / "ds_configs/zero3.json")]
    words += ["--calibration", str(path)]
    code = (
        f"import sys; from pipeline.cli import app; app(['plan', 'run', *{words!r}, "
        "'--gpus-per-node', '2'], standalone_mode=False); sys.exit(int('torch' in sys.modules))"
    )
    printed = output_of_code(code)
    label = "measured on NVIDIA H100 80GB HBM3 with 1 and 2 ranks, 2026-11-29"
    assert label in printed
    assert "a projection" not in printed
    scaled = CliRunner().invoke(app, ["plan", "scale", *words, "--gpus-per-node", "512"])
    assert scaled.exit_code == 0, scaled.output
    assert f"From {label}" in scaled.output
    foreign = CliRunner().invoke(app, ["plan", "run", *words, "--gpu", "l40s"])
    assert "measured on NVIDIA H100 80GB HBM3, not on l40s; not used" in foreign.stderr
    assert "a projection for l40s" in foreign.stdout


def test_a_run_knows_what_a_step_should_take_where_the_machine_was_calibrated(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_config(TrainConfig, recipe, ("schedule=cache", "chunks.keep_graphs=0"))
    zero = resolve_ds_config({"zero_optimization": {"stage": 3}}, config, world_size=1)
    world = discover_world()
    assert train.predict(config, zero, world) == {}
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    path = default_path(processor_name())
    found = machine(constants(1), device=processor_name(), on_gpu=False)
    save(found, path)
    predicted = train.predict(config, zero, world)
    plan = plan_run(
        config,
        zero,
        world_size=1,
        target=Target(available=1e12, name="", on_gpu=False, ranks_per_host=1),
        build=False,
    )
    parts = seconds_of(plan, config, found, network=400.0)
    assert predicted == {"seconds": sum(part.seconds for part in parts)}
    with monkeypatch.context() as patch:  # the plan that chose the schedule is enough
        patch.setattr("pipeline.planning.plan_run", None)
        assert train.predict(config, zero, world, plan=plan) == predicted
    # A file that cannot be read ends no run.
    capsys.readouterr()
    path.write_text("{}")
    assert train.predict(config, zero, world) == {}
    assert "no prediction of a step: " in capsys.readouterr().out


# --- the measurement -------------------------------------------------------------------------


def measure_tiny(folder: str) -> None:
    measure.SIZES["cpu"] = TINY
    measure._measure_here(Path(folder) / "2.json")


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in numbers(value)]
    return [tree] if isinstance(tree, int | float) else []


def test_two_ranks_measure_everything_and_the_file_predicts_a_step(tmp_path: Path) -> None:
    run_ranks(2, measure_tiny, str(tmp_path))
    found = load(tmp_path / "2.json")
    (measured,) = found.constants
    assert measured.ranks == 2 and not found.on_gpu
    assert set(measured.engine) == {"2", "3"} and set(measured.dtypes) == {"float32"}
    assert min(numbers(dataclasses.asdict(measured))) >= 0
    workload = dataclasses.replace(WORKLOAD, dtype="float32", world_size=2, ranks_per_host=2)
    parts = measured_seconds(SEVEN_B, dataclasses.replace(WORK, workload=workload), "cache", found)
    assert {"compute", "gather", "reduce", "update"} <= {part.part for part in parts}


def test_of_several_ranks_the_slowest_counts() -> None:
    fast = dataclasses.asdict(constants())
    slow = dataclasses.asdict(machine(constants()).changed(compute=0.5, link=1.0).constants[0])
    slow["host"] = 1e9
    assert measure._slowest([fast, slow]) == measure._slowest([slow, fast]) == slow


def test_calibrate_writes_one_rank_and_all_to_the_file_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(command: list[str], number: int) -> int:
        save(machine(constants(number)), Path(command[-1]))
        return 0

    monkeypatch.setattr(measure, "run_ranks", start)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    done = CliRunner().invoke(app, ["plan", "calibrate", "--ranks", "4"])
    assert done.exit_code == 0, done.output
    path = tmp_path / "nvidia-h100-80gb-hbm3.json"
    assert load(path) == machine(constants(1), constants(4))
    assert f"next: diffembed plan run CONFIG --calibration {path}" in done.output
    monkeypatch.setattr(measure, "run_ranks", lambda *_: 1)
    done = CliRunner().invoke(app, ["plan", "calibrate"])
    assert "1 rank ended with exit code 1" in str(done.exception)


def test_attention_of_longer_rows_takes_longer() -> None:
    rows = constants().dtypes["float32"].attention
    short, long = (attention_seconds(rows, np.array([n]), 64)[0] for n in (512, 1024))
    assert long == pytest.approx(4 * short)
