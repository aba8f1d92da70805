"""The plan of a run before it starts: memory, the schedule that follows from it, its text."""

from __future__ import annotations

import dataclasses
import json
import operator
from pathlib import Path

import pytest
import transformers

from pipeline.config import (
    ChunkConfig,
    DataConfig,
    LoraConfig,
    MaskedDiffusionConfig,
    ModelConfig,
    ObjectiveConfig,
    PrepareConfig,
    SourceConfig,
    TrainConfig,
)
from pipeline.data.prepare import prepare
from pipeline.errors import UserError
from pipeline.loss.tiles import TOKEN_TILE_BYTES
from pipeline.model.encoder import build_encoder
from pipeline.planning import largest_batch, plan_run
from pipeline.planning.architecture import read_architecture
from pipeline.planning.describe import describe
from pipeline.planning.memory import (
    CUDA_CONTEXT,
    NCCL_BUFFERS,
    RankWorkload,
    Schedule,
    Target,
    choose_schedule,
    gpu_named,
    graphs_that_fit,
    host_memory,
    loading_peak,
    memory_terms,
    needed,
    peak,
    sum_of,
)
from pipeline.planning.shape import ModelShape, saved_by_layer
from pipeline.training.collectives import buffer_bytes
from pipeline.training.ds_config import resolve_ds_config
from tests.model.model_support import CASES, save_model
from tests.tiny_models import tiny_starter

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "hidden_act": "silu",
}
BASE = ModelConfig(path="Qwen/Qwen2.5-7B", pooling="mean")
SEVEN_B = ModelShape.planned(QWEN_7B, BASE)
WITH_LORA = ModelShape.planned(QWEN_7B, dataclasses.replace(BASE, lora=LoraConfig()))
WORKLOAD = RankWorkload(
    world_size=128,
    stage=3,
    dtype="bfloat16",
    rank_tokens=147_000,
    chunk_tokens=8192,
    gradient_checkpointing=False,
)
GIB = 2**30


def sizes(
    schedule: Schedule, shape: ModelShape = SEVEN_B, workload: RankWorkload = WORKLOAD
) -> dict[str, float]:
    """Bytes by part and name."""
    terms = memory_terms(shape, workload, schedule)
    return {f"{term.part}: {term.name}": term.size for term in terms}


def test_known_sizes_of_a_7b_model_come_out() -> None:
    """Against a hand calculation: 14.1 GB of weights, 6.4 MB of graph a token."""
    assert SEVEN_B.parameters == 7_070_619_136
    memory = sizes("cache")
    assert memory["gathered: weights"] == pytest.approx(14.1e9, rel=0.01)
    assert memory["gradients: fp32 sums"] == pytest.approx(28.3e9, rel=0.01)
    assert memory["optimizer: fp32 weights and moments"] == pytest.approx(0.66e9, rel=0.01)
    assert memory["activations: one chunk"] / 8192 == pytest.approx(6.4e6, rel=0.02)
    sweep = sizes("sweep")
    assert sweep["boundaries: inputs of all layers, all chunks"] == pytest.approx(30e9, rel=0.05)
    # Two layers of 0.47 GB and the token embedding of 1.09 GB.
    assert sweep["gathered: weights"] == pytest.approx(2.02e9, rel=0.01)
    # 545 million weights of the embedding and 466 million of two layers, in 4 bytes.
    assert sweep["gradients: fp32 sums"] == pytest.approx(4.04e9, rel=0.01)
    assert sweep["gathered: gather buffer"] == buffer_bytes(128)
    # 500 million elements of DeepSpeed's bucket.
    assert memory["buckets: reduce bucket"] == 1e9


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2", "llama"])
def test_a_continued_adapter_counts_as_a_fresh_one(kind: str, tmp_path: Path) -> None:
    """Layers of one name differ in size: three of a BERT block are called `dense`."""
    folder = save_model(CASES[kind][0], tmp_path / "model")
    fresh = ModelConfig(path=str(folder), lora=LoraConfig(rank=3, targets="all-linear"))
    encoder = build_encoder(fresh, meta=False)
    encoder.save_adapter(tmp_path / "adapter")
    continued = ModelConfig(
        path=str(folder), adapter=str(tmp_path / "adapter"), adapter_use="continue"
    )

    found = ModelShape.of(build_encoder(continued, meta=True), continued).adapters
    wanted = ModelShape.of(encoder, fresh).adapters

    assert found is not None and wanted is not None
    key = operator.attrgetter("name", "inputs", "outputs")
    assert sorted(found.linears, key=key) == sorted(wanted.linears, key=key)
    assert (found.rank, found.dropout) == (wanted.rank, wanted.dropout)


def test_a_layer_of_7b_saves_what_was_measured_on_its_proportions() -> None:
    """KiB a token that autograd kept: full fine-tuning, and LoRA without and with dropout."""
    undropped = dataclasses.replace(BASE, lora=LoraConfig(dropout=0.0))
    assert saved_by_layer(SEVEN_B, 2) == pytest.approx(220.1 * 1024, rel=0.001)
    shape = ModelShape.planned(QWEN_7B, undropped)
    assert saved_by_layer(shape, 2) == pytest.approx(206.3 * 1024, rel=0.001)
    # Seven dropped inputs and their masks of bytes, 18 h + 3 i, instead of three inputs, 4 h + 2 i.
    assert saved_by_layer(WITH_LORA, 2) - saved_by_layer(shape, 2) == 14 * 3584 + 18944


def test_schedules_are_taken_in_the_order_of_their_flops() -> None:
    few = dataclasses.replace(WORKLOAD, rank_tokens=8192)
    assert choose_schedule(SEVEN_B, few, 130 * GIB) == "plain"
    assert choose_schedule(SEVEN_B, WORKLOAD, 130 * GIB) == "cache"
    assert choose_schedule(SEVEN_B, WORKLOAD, 80 * GIB) == "sweep"


def test_the_peak_is_that_of_one_moment() -> None:
    """The optimizer's temporary is not added to activations, which are gone by then."""
    few = dataclasses.replace(WORKLOAD, world_size=8)
    terms = memory_terms(SEVEN_B, few, "cache")
    update = next(term for term in terms if term.name == "fp32 gradient")
    assert (update.moments, update.size) == (("update",), 4 * SEVEN_B.parameters / 8)
    assert peak(terms) == ("passes", sum_of(terms, "passes"))
    assert peak(terms)[1] < sum(term.size for term in terms)
    for moment in ("passes", "loss", "reduce", "update"):
        assert sum_of(terms, moment) <= peak(terms)[1]


def test_boundaries_on_the_host_make_room_on_the_device() -> None:
    on_host = dataclasses.replace(WORKLOAD, boundaries_on_host=True, ranks_per_host=8)
    assert choose_schedule(SEVEN_B, on_host, 24 * GIB) == "sweep"
    boundaries = sizes("sweep")["boundaries: inputs of all layers, all chunks"]
    # Of a chunk and layer 56 MiB, in pinned memory 64; the last chunk is shorter.
    pinned = host_memory(SEVEN_B, on_host, "sweep")["boundaries"]
    assert pinned == pytest.approx(8 * boundaries * 64 / 56, rel=0.05)
    with pytest.raises(UserError, match=r"fits into 24.0 GiB per rank") as refused:
        choose_schedule(SEVEN_B, WORKLOAD, 24 * GIB)
    assert "chunks.boundaries: host (sweep needs" in str(refused.value)


def test_an_error_names_the_keys_that_make_a_schedule_fit() -> None:
    """Each named change does, with the memory that it leads to."""
    few = dataclasses.replace(WORKLOAD, world_size=8, rank_tokens=400_000)
    with pytest.raises(UserError, match=r"none that fits into 71\.2 GiB per rank, h100") as refused:
        choose_schedule(SEVEN_B, few, 71.2 * GIB, assumed="h100")
    changed = dataclasses.replace(few, gradient_checkpointing=True)
    size = needed(SEVEN_B, changed, "cache") / GIB
    assert size < 71.2
    text = f"model.gradient_checkpointing: true (cache needs {size:.1f} GiB)"
    assert text in str(refused.value)
    # No single change is enough here.
    with pytest.raises(UserError, match=" with "):
        choose_schedule(SEVEN_B, dataclasses.replace(few, stage=2), 24 * GIB)


def test_graphs_are_kept_where_there_is_room() -> None:
    one = sizes("cache")["activations: one chunk"]
    base = sum_of(memory_terms(SEVEN_B, WORKLOAD, "cache"), "passes")
    assert graphs_that_fit(SEVEN_B, WORKLOAD, base - 1, 18) == 0
    assert graphs_that_fit(SEVEN_B, WORKLOAD, base + 2.5 * one, 18) == 2
    assert graphs_that_fit(SEVEN_B, WORKLOAD, base + 99 * one, 18) == 18
    kept = memory_terms(SEVEN_B, WORKLOAD, "cache", 2)
    assert sum_of(kept, "passes") == base + 2 * one


def test_stage_2_holds_all_weights_and_stage_3_its_share() -> None:
    two = sizes("cache", workload=dataclasses.replace(WORKLOAD, stage=2))
    assert two["weights: whole model"] == pytest.approx(14.1e9, rel=0.01)
    assert "gathered: weights" not in two
    three = sizes("cache")
    assert three["weights: partition"] == pytest.approx(14.1e9 / 128, rel=0.01)
    copied = sizes("cache", workload=dataclasses.replace(WORKLOAD, hpz=8))
    assert copied["weights: second copy"] == pytest.approx(14.1e9 / 8, rel=0.01)


def test_stage_3_loads_a_share_and_a_piece_and_stage_2_the_model_and_a_flat_copy() -> None:
    stage_2 = dataclasses.replace(WORKLOAD, stage=2)
    assert loading_peak(SEVEN_B, stage_2) == pytest.approx(2 * 14.1e9, rel=0.01)
    # Of adapters, the copy is small.
    assert loading_peak(WITH_LORA, stage_2) == pytest.approx(14.3e9, rel=0.01)
    # The token embedding is the largest piece: 152,064 x 3,584 numbers.
    assert loading_peak(SEVEN_B, WORKLOAD) == pytest.approx(14.1e9 / 128 + 1.09e9, rel=0.01)


def test_lora_keeps_optimizer_state_for_its_adapters_only() -> None:
    assert WITH_LORA.trainable == 40_370_176
    memory = sizes("cache", WITH_LORA)
    assert memory["gradients: fp32 sums"] == 4 * 40_370_176
    assert memory["optimizer: fp32 weights and moments"] == 12 * 40_370_176 / 128


def test_activation_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    """28 inputs of 3,584 numbers in two bytes are 200,704 bytes a token."""
    name = "activations: one chunk"
    kept = sizes("cache")[name]
    checkpointed = dataclasses.replace(WORKLOAD, gradient_checkpointing=True)
    saved = sizes("cache", workload=checkpointed)[name]
    assert saved == kept + (200_704 - 27 * saved_by_layer(SEVEN_B, 2)) * 8192


def test_an_optimizer_on_the_host_takes_nothing_of_the_device() -> None:
    offloaded = dataclasses.replace(WORKLOAD, offload_optimizer=True, ranks_per_host=8)
    assert not [name for name in sizes("cache", workload=offloaded) if name.startswith("optimizer")]
    host = host_memory(SEVEN_B, offloaded, "cache")
    assert host["optimizer"] == pytest.approx(8 * 18 * SEVEN_B.parameters / 128)


def test_fp32_takes_twice_the_bytes_except_for_what_is_in_fp32_anyway() -> None:
    half = sizes("cache")
    full = sizes("cache", workload=dataclasses.replace(WORKLOAD, dtype="float32", share_bytes=4))
    for name in ("weights: partition", "gathered: weights", "gradients: reduced partition"):
        assert full[name] == 2 * half[name]
    for name in ("gradients: fp32 sums", "optimizer: fp32 weights and moments"):
        assert full[name] == half[name]
    single = dataclasses.replace(WORKLOAD, dtype="float32")
    assert loading_peak(SEVEN_B, single) == 2 * loading_peak(SEVEN_B, WORKLOAD)


def test_a_cpu_has_no_context_and_maps_only_the_used_part_of_a_bucket() -> None:
    cpu = sizes("cache", WITH_LORA, dataclasses.replace(WORKLOAD, on_gpu=False))
    assert not [name for name in cpu if name.startswith("context")]
    assert cpu["buckets: reduce bucket"] == 2 * 40_370_176
    gpu = sizes("cache", WITH_LORA)
    assert gpu["context: CUDA"] + gpu["context: NCCL"] == CUDA_CONTEXT + NCCL_BUFFERS


def test_no_schedule_combines_sweep_with_activation_checkpointing() -> None:
    checkpointed = dataclasses.replace(WORKLOAD, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"found none .*needs plain [0-9.]+, cache [0-9.]+\)"):
        choose_schedule(SEVEN_B, checkpointed, 40 * GIB)


@pytest.mark.parametrize(
    ("name", "gib"), [("h100", 79.1), ("H200", 139.7), ("a100-40", 39.4), ("24", 24)]
)
def test_a_gpu_is_named_or_given_in_gib(name: str, gib: float) -> None:
    assert Target.gpu(name).available == pytest.approx(0.9 * gib * GIB)


@pytest.mark.parametrize("name", ["gtx", "0", "-4", "inf", "nan", ""])
def test_an_unknown_gpu_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"--gpu .*allowed: h100, h200, a100-80, a100-40, l40s"):
        Target.gpu(name)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """20 lines of 40 words, in blocks of 32 tokens."""
    raw = tmp_path / "lines.txt"
    raw.write_text("".join(f"{number} " + "far and near " * 13 + "\n" for number in range(20)))
    model = str(tiny_starter(tmp_path / "model", raw))
    source = SourceConfig(name="lines", format="lines", path=str(raw))
    shards = PrepareConfig(output_dir=tmp_path / "shards", tokenizer=model, sources=(source,))
    return TrainConfig(
        output_dir=tmp_path / "run",
        num_steps=10,
        model=ModelConfig(path=model, dtype="float32"),
        data=DataConfig(
            path=prepare(shards, num_workers=1),
            global_batch_size=8,
            homogeneous="none",
            block_length=32,
        ),
        chunks=ChunkConfig(max_tokens=64),
        objective=ObjectiveConfig(masked_diffusion=MaskedDiffusionConfig()),
    )


def test_the_plan_counts_blocks_the_head_and_a_tile_of_its_scores(config: TrainConfig) -> None:
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 3}}, config, world_size=2)
    target = Target(available=8 * GIB, name="a GPU")
    plan = plan_run(config, ds_config, world_size=2, target=target)
    body = sum(p.numel() for p in build_encoder(config.model, meta=True).parameters())
    assert plan.shape.parameters == plan.shape.trainable == body + 300 * 32
    assert (plan.schedule, plan.keep_graphs) == ("cache", 0)
    assert (plan.workload.rank_tokens, plan.workload.chunk_tokens) == (128, 64)
    tile = next(term for term in plan.terms if term.part == "loss")
    assert tile.size == TOKEN_TILE_BYTES["cuda"]
    text = describe(plan, config)
    assert "masked_diffusion" in text
    assert "8 texts" in text
    assert f"10 x 8 = 80 texts = {80 / plan.num_examples:.2f} epochs of" in text
    assert "cache, chosen" in text and "sweep, fits too" in text
    size = peak(plan.terms)[1] / GIB
    assert f"{size:.1f} GiB (passes)" in text
    small = Target(available=TOKEN_TILE_BYTES["cuda"], name="a small GPU")
    with pytest.raises(UserError, match=r"none that fits into 2\.0 GiB per rank, a small GPU"):
        plan_run(config, ds_config, world_size=2, target=small)
    # The same plan from config.json alone, as on a machine that has no torch.
    assert plan_run(config, ds_config, world_size=2, target=target, build=False).terms == plan.terms


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("h100", "h100"),
        ("NVIDIA-H200", "h200"),
        ("nvidia_a100-sxm4-80gb", "a100-80"),
        ("a100_pcie_40g", "a100-40"),
        ("a100", None),  # of either size
        ("NVIDIA GH200 480GB", None),  # an H100 by its chip, of 96 or 144 GB
        ("nvidia_h100_80gb_hbm3_1g.10gb", None),  # a part of the GPU
        ("nvidia-h100-80gb-hbm3-mig-3g-40gb", None),  # as a calibration's file
        ("v100", None),
        ("", None),
    ],
)
def test_a_site_has_its_own_names_of_gpus(name: str, gpu: str | None) -> None:
    assert gpu_named(name) == gpu


def test_the_largest_batch_fits_and_the_next_one_does_not(config: TrainConfig) -> None:
    """In a sweep, the inputs of all layers grow with the batch: here two batches of 128 tokens."""
    config = dataclasses.replace(config, schedule="sweep")
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 3}}, config, world_size=2)
    target = Target(available=8 * GIB, name="a GPU")
    plan = plan_run(config, ds_config, world_size=2, target=target, build=False)
    times, rest = divmod(largest_batch(plan, config), 8)
    assert times > 1 and rest == 0

    def size(times: int) -> float:
        larger = dataclasses.replace(plan.workload, rank_tokens=128 * times)
        return peak(memory_terms(plan.shape, larger, "sweep"))[1]

    assert size(times) <= target.available < size(times + 1)


def test_what_a_published_config_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    """The whole `text_config` of Gemma 3 4B; its other widths are defaults."""
    text = {
        **{"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240},
        **{"num_hidden_layers": 34, "sliding_window": 1024},
    }
    published = {"model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = ModelConfig(path=str(tmp_path))

    planned = ModelShape.planned(published, config)

    assert planned == ModelShape.of(build_encoder(config, meta=True), config)
    assert planned.parameters == pytest.approx(3.88e9, rel=0.001)
    # By default, some families tie the head to the token table.
    names = ("Qwen2", "Qwen3", "Llama", "Mistral", "Gemma", "Gemma2", "Gemma3Text")
    for name in (*names, "Olmo2", "Phi3", "SmolLM3", "GPT2"):
        default = getattr(transformers, f"{name}Config")(pad_token_id=None)
        tree = {**default.to_dict(), "num_hidden_layers": 2}
        for tied in (True, False):
            given = {**tree, "tie_word_embeddings": tied}
            assert read_architecture(given).tied == tied
        del tree["tie_word_embeddings"]
        assert read_architecture(tree).tied == default.tie_word_embeddings, name


def test_a_model_with_its_own_code_is_counted_from_the_model_only() -> None:
    """Its keys may have any names; activations are an upper bound from the usual ones."""
    own = {"model_type": "own", "hidden_size": 64, "intermediate_size": 100, "n_blocks": 3}
    found = read_architecture(own)
    assert (found.block, found.hidden_size, found.intermediate_size) == (None, 64, 100)
    shape = dataclasses.replace(SEVEN_B, architecture=found)
    assert saved_by_layer(shape, 2) == (18 * 64 + 4 * 100) * 2
    with pytest.raises(UserError, match=r"model_type 'own' .*allowed: qwen2, .*--dry-run"):
        ModelShape.planned(own, BASE)
    with pytest.raises(UserError, match="hidden_size: 'wide'"):
        read_architecture({**QWEN_7B, "hidden_size": "wide"})
