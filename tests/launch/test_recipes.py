"""Every recipe can be read and planned on a model of its real size, and agrees with the paper."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from published_data import prepare_recipe, word_tokenizer, write_raw
from published_figures import ARCHITECTURES, PUBLISHED, RANK_16, SHAPES, WHOLE

from pipeline import planning
from pipeline.config import EvaluateConfig, LoraConfig, PrepareConfig, TrainConfig, load_config
from pipeline.data.shards import Dataset
from pipeline.evaluation.tasks import list_elements
from pipeline.model import encoder
from pipeline.planning.described_data import write_shards
from pipeline.planning.memory import Target, peak
from pipeline.tokenizer import load_tokenizer, tokenizer_fingerprint
from pipeline.training.ds_config import load_ds_config, resolve_ds_config
from tests.tiny_models import tiny_starter
from tests.training.trainer_command import run_trainer

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch" / "recipes"
TRAINING = sorted(
    path.relative_to(RECIPES)
    for folder in ("published", "baselines")
    for path in (RECIPES / folder).rglob("*.yaml")
)
DATA = sorted(path for path in (RECIPES / "data").glob("*.yaml") if path.stem != "common")
EVALUATION = sorted((RECIPES / "evaluate").rglob("*.yaml"))
# Models whose texts are chat turns in the published code, and the characters around each text.
CHATS = {
    "llama3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral": ("[INST] ", " [/INST]"),
}
GIB = 2**30
LARGE = "-large-batch"
SUPERVISED = ("instruction", "long", "reason", "theorem")


def read(recipe: Path | str) -> TrainConfig:
    return load_config(TrainConfig, RECIPES / recipe)


def head_of(name: str) -> int:
    """Parameters of the head, which only the prediction of tokens needs."""
    config = ARCHITECTURES[name]
    return int(config["vocab_size"] * config["hidden_size"])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe's config with local stand-ins of the published sizes for what lies on the hub."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "corpus.jsonl").write_text('{"text": "a few words"}\n')
    tokenizer = tiny_starter(folder / "starter", folder / "corpus.jsonl")
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(tokenizer)))
    for name, config in ARCHITECTURES.items():
        (folder / name).mkdir(parents=True)
        for file in tokenizer.glob("*token*"):
            shutil.copy(file, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config))
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=layers)
    adapter.save_pretrained(str(folder / "adapter"))
    shards = {
        task: write_shards(folder / "shards" / task, shape, tokenizer=fingerprint)
        for task, shape in SHAPES.items()
    }

    def localise(recipe: Path) -> TrainConfig:
        config = read(recipe)
        model = dataclasses.replace(
            config.model,
            path=str(folder / config.model.path),
            adapter=config.model.adapter and str(folder / "adapter"),
            merged_adapters=tuple(str(folder / "adapter") for _ in config.model.merged_adapters),
        )
        data = dataclasses.replace(config.data, path=shards[recipe.parts[1]])
        return dataclasses.replace(config, model=model, data=data)

    return localise


def dry_run(config: TrainConfig) -> planning.RunPlan:
    """As `--dry-run` does on eight ranks with 80 GiB each."""
    ds_config = load_ds_config(ROOT / "ds_configs" / "zero2.json")
    resolved = resolve_ds_config(ds_config, config, world_size=8)
    return planning.plan_run(config, resolved, world_size=8, target=Target.gpu("h100"))


def test_every_recipe_is_planned_at_its_real_size(
    local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prints the table: `pytest -s`."""
    share_models(monkeypatch)
    print("\n| recipe | trained | global batch | steps | tokens a step | schedule | GiB a rank |")
    print("|---|---|---|---|---|---|---|")
    for recipe in TRAINING:
        published, config = read(recipe), local(recipe)
        plan = dry_run(config)
        name = published.model.path
        trained = RANK_16[name] * (2 if config.model.lora and config.model.lora.rank == 32 else 1)
        head = 0 if config.objective is None else head_of(name)
        assert plan.shape.trainable == trained, recipe
        assert plan.shape.parameters == WHOLE[name] - head_of(name) + head + trained, recipe
        batch = plan.batch
        groups = Dataset.open(config.data.path).manifest.groups
        if config.objective is None:
            assert batch.num_queries == published.data.global_batch_size, recipe
            # One task per global batch, for any number of ranks.
            ends = np.cumsum([group.count for group in groups])
            drawn = np.unique(np.searchsorted(ends, batch.example_ids, side="right"))
            assert len({groups[number].source for number in drawn}) == 1, recipe
        needed = peak(plan.terms)[1]
        assert needed <= plan.target.available, recipe
        print(
            f"| {recipe.with_suffix('')} | {trained:,} | {published.data.global_batch_size:,} | "
            f"{config.num_steps:,} | {batch.tokens:,} | {plan.schedule} | {needed / GIB:.0f} |"
        )


def share_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes whose models have one shape build it once."""
    build = encoder.build_model
    models: dict[str, Any] = {}

    def build_model(config: TrainConfig, *, meta: bool) -> Any:
        model = config.model
        continued = model.adapter if model.adapter_use == "continue" else None
        key = repr((model.path, model.lora, continued, config.objective))
        if key not in models:
            models[key] = build(config, meta=meta)
        return models[key]

    monkeypatch.setattr(encoder, "build_model", build_model)


def test_published_recipes_have_the_published_arithmetic() -> None:
    supervised = {
        str(path) for path in TRAINING if path.parts[0] == "published" and path.parts[1] != "mntp"
    }
    assert supervised == {
        f"published/{name}{variant}.yaml" for name in PUBLISHED for variant in ("", LARGE)
    }
    for name, (rows, batch, lr, decay, warmup, rank, negatives, mntp) in PUBLISHED.items():
        config = read(f"published/{name}.yaml")
        assert config.data.global_batch_size == batch, name
        assert config.num_steps == -(-rows // batch), name
        found = config.optimizer
        assert (found.lr, found.decay, found.warmup_steps) == (lr, decay, warmup), name
        assert negatives_per_query(config) == negatives, name
        if config.model.lora is not None:
            assert (config.model.lora.rank, config.model.lora.alpha) == (rank, 2 * rank), name
        adapters = (*config.model.merged_adapters, config.model.adapter or "")
        assert any(adapter.endswith("-mntp") for adapter in adapters) == mntp, name
        assert (config.model.attention, config.model.pooling) == ("bidirectional", "mean"), name
        assert config.seed == 42 and config.model.dtype == "bfloat16", name


def test_mntp_masks_as_published() -> None:
    """Blocks a step, steps, and which share of the tokens is masked how."""
    wanted = {
        "llama3": (32, 1000, 0.2, "bert"),
        "mistral": (32, 1000, 0.8, "all"),
        "qwen2.5": (16, 4000, 0.2, "bert"),
    }
    assert {path.stem for path in TRAINING if path.parts[1] == "mntp"} == set(wanted)
    for name, (batch, steps, rate, replace) in wanted.items():
        config = read(f"published/mntp/{name}.yaml")
        assert (config.data.global_batch_size, config.num_steps) == (batch, steps), name
        assert config.data.block_length == 512 and config.model.lora == LoraConfig(), name
        assert config.objective is not None and config.objective.mntp is not None
        mntp = config.objective.mntp
        assert (mntp.mask_rate, mntp.replace, mntp.mask_token) == (rate, replace, "_"), name


def negatives_per_query(config: TrainConfig) -> int:
    own = config.data.num_hard_negatives
    return own if config.loss.negatives == "own" else config.data.global_batch_size * (1 + own) - 1


def test_a_large_batch_variant_contrasts_thousands_of_queries_and_lets_the_planner_choose() -> None:
    variants = [path for path in TRAINING if path.stem.endswith(LARGE)]
    assert len(variants) == len(PUBLISHED)
    for path in variants:
        config = read(path)
        assert 2048 <= config.data.global_batch_size <= 8192, path
        assert config.loss.negatives == "batch" and config.schedule == "auto", path
        base = read(path.with_stem(path.stem.removesuffix(LARGE)))
        assert config.model.path == base.model.path, path
        assert config.output_dir != base.output_dir, path


def test_baselines_see_only_the_past_and_pool_the_eos() -> None:
    baselines = [path for path in TRAINING if path.parts[0] == "baselines"]
    assert len(baselines) == 9
    for path in baselines:
        config = read(path)
        assert (config.model.attention, config.model.pooling) == ("causal", "last_token"), path
        assert config.data.path.name.endswith("-eos"), path
        assert config.model.adapter is None and not config.model.merged_adapters, path
        # As many rows, in the same batches and with the same loss, as the bidirectional models.
        dream = read(f"published/{path.parts[1]}/dream.yaml")
        assert dataclasses.replace(dream.data, path=config.data.path) == config.data, path
        assert (dream.num_steps, dream.loss) == (config.num_steps, config.loss), path


def test_every_run_has_a_folder_of_its_own_and_shards_that_a_recipe_makes() -> None:
    configs = {path: read(path) for path in TRAINING}
    assert len({config.output_dir for config in configs.values()}) == len(configs)
    made = {load_config(PrepareConfig, path).output_dir.parent for path in DATA}
    for path, config in configs.items():
        # Below the data set's folder, one for each tokenizer.
        assert config.data.path.parent in made, path


@pytest.mark.parametrize("chat", CHATS)
def test_models_with_a_published_chat_template_have_shards_and_scores_in_its_words(
    chat: str,
) -> None:
    before, after = CHATS[chat]
    shards = {}
    for path in sorted((RECIPES / "data" / chat).glob("*.yaml")):
        if path.stem != "common":
            config = load_config(PrepareConfig, path)
            shards[config.output_dir] = config
            plain = load_config(PrepareConfig, RECIPES / "data" / path.name)
            assert config.sources == plain.sources, path
    # All but the two unsupervised trainings, which take bare sentences.
    runs = [path for path in TRAINING if path.parts[0] == "published"]
    runs = [path for path in runs if path.stem.startswith(chat) and path.parts[1] in SUPERVISED]
    assert {read(path).data.path for path in runs} == set(shards)
    for config in shards.values():
        assert config.tokenizer in {read(path).model.path for path in runs}
        template = config.template
        assert template.format_query("q", "find it") == f"{before}find it; q{after}"
        assert template.format_document("d") == f"{before}d{after}"
    for path in EVALUATION:
        if path.parent.name == chat:
            for model in load_config(EvaluateConfig, path).models:
                assert model.template is not None
                assert model.template.format_query("q", "find it:") == f"{before}find it: q{after}"
                assert model.template.format_document("d") == f"{before}d{after}"


def test_unsupervised_contrast_decays_over_three_epochs_of_a_million_sentences() -> None:
    for name, batch in (("dream", 64), ("llama3-mntp", 128), ("mistral-mntp", 128)):
        config = read(f"published/simcse/{name}.yaml")
        assert config.optimizer.decay_steps == 3 * (-(-1_000_000 // batch)), name
    assert read("published/simcse/qwen2.5-mntp.yaml").optimizer.decay_steps == 3 * 15_625


def test_data_recipes_read_the_published_layouts(tmp_path: Path) -> None:
    raw, tokenizer = tmp_path / "raw", word_tokenizer(tmp_path / "tokenizer")
    write_raw(raw, 12)
    for recipe in DATA:
        folder = prepare_recipe(
            recipe, raw=raw, tokenizer=tokenizer, output_dir=tmp_path / recipe.stem
        )
        manifest = Dataset.open(folder, verify=True).manifest
        assert all(source.examples for source in manifest.sources), recipe
        per_example = (manifest.num_documents, manifest.num_examples)
        if recipe.stem == "instruction":
            assert per_example == (16 * 12, 12)
            assert (manifest.max_query_length, manifest.max_document_length) == (304, 196)


def test_evaluation_recipes_name_tasks_and_runs_that_exist() -> None:
    runs = {read(path).output_dir for path in TRAINING}
    for path in EVALUATION:
        config = load_config(EvaluateConfig, path)
        assert list_elements(config)
        assert {model.path.parent for model in config.models} <= runs, path
        assert config.training_run in runs, path


def test_the_readme_lists_every_recipe_as_it_is() -> None:
    text = (RECIPES / "README.md").read_text()
    missing = [line for line in readme_table() if line not in text.splitlines()]
    assert not missing, "launch/recipes/README.md lacks:\n" + "\n".join(missing)
    assert text.count("\n| [") == len(TRAINING)


def readme_table() -> list[str]:
    """The lines of the README's table that follow from the recipes."""
    lines = []
    for path in TRAINING:
        config = read(path)
        learns = ["masked tokens", "-"]
        if config.objective is None:
            loss = config.loss
            learns = [
                f"{loss.similarity} / {loss.temperature:g}",
                f"{negatives_per_query(config):,}",
            ]
        cells = [
            f"[{path.with_suffix('')}]({path})",
            start_of([*config.model.merged_adapters, config.model.adapter]),
            f"{config.data.global_batch_size:,} x {config.num_steps:,}",
            f"{config.optimizer.lr:g}",
            *learns,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def start_of(adapters: list[str | None]) -> str:
    kinds = [name.rsplit("-", 1)[-1] for name in adapters if name]
    return ", ".join(kinds) or "the model itself"


def test_the_command_prints_the_whole_config_and_the_plan(local: Any) -> None:
    recipe = Path("published/long/dream.yaml")
    config = local(recipe)
    done = run_trainer(
        *(RECIPES / recipe, "--deepspeed", "ds_configs/zero2.json", "--dry-run"),
        *("--world-size", "8", "--gpu", "h100", "schedule=cache"),
        *(f"model.path={config.model.path}", f"data.path={config.data.path}"),
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "  decay_steps: 6000",  # from parts/long.yaml
        "    - gate_proj",  # a default
        "7,110,989,312 parameters, 40,370,176 trained, bfloat16, bidirectional, mean pooling",
        "1000 x 16 = 16,000 queries",
        "5e-05 after 100 warm-up steps",
    ):
        assert line in done.stdout, done.stdout
