"""Configs are read strictly and faults are named by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Template, TrainConfig, dump_config, load_config
from pipeline.errors import UserError

MINIMAL = "output_dir: run\nnum_steps: 10\nmodel: {path: m}\ndata: {path: d}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_dumped_config_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, path, ("model.lora.rank=4", "optimizer.betas=[0.8, 0.9]"))
    assert config.model.lora is not None
    assert config.model.lora.rank == 4
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(TrainConfig, again) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.path=x", "unknown key 'modle'.*allowed: .*model"),
        ("model.lora.rnk=3", r"unknown key 'model.lora.rnk'.*allowed: rank, alpha"),
        ("model.load_in_4bit=true", r"unknown key 'model.load_in_4bit'.*fix: .*4-bit.*ZeRO-3"),
        ("model.lora.adapter_dtype=float32", "adapters in model.dtype.*fp32 copy"),
        ("num_steps=many", "num_steps = 'many'"),
        ("model.pooling=men", r"model.pooling = 'men'.*'mean'"),
        ("data.global_batch_size=1", "data.global_batch_size: 1.*>= 2"),
        ("optimizer.warmup_steps=10", r"optimizer.warmup_steps: 10.*less than num_steps \(10\)"),
        ("optimizer.decay_steps=9", r"optimizer.decay_steps: 9.*at least num_steps \(10\)"),
        ("loss.temperature=0", "loss.temperature"),
        ("model.trust_remote_code=true", "model.revision"),
        ("objective={}", r"objective: \[\].*exactly one of mntp, masked_diffusion, next_token"),
        ("objective={mntp: {}, next_token: {}}", r"objective: \['mntp', 'next_token'\].*exactly"),
        ("objective.mntp.mask_rate=1", "objective.mntp.mask_rate: 1.*0 < mask_rate < 1"),
        ("objective.mntp.rate=0.1", "unknown key 'objective.mntp.rate'.*allowed: mask_rate"),
        ("objective.next_token={}", "model.attention: 'bidirectional'.*allowed: causal"),
        ("data.block_length=512", "data.block_length: 512.*null without an objective"),
        ("nonsense", "key.sub=value"),
        ("num_steps.deep=1", "holds a value"),
    ],
)
def test_a_wrong_override_is_one_clear_line(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(TrainConfig, path, (override,))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.temperature=0.1", "loss: 'given beside objective'.*remove loss"),
        ("schedule=plain", "schedule, chunks.keep_graphs: .*auto, cache or sweep"),
        ("chunks.keep_graphs=2", "schedule, chunks.keep_graphs: .*and 0, beside"),
    ],
)
def test_what_the_prediction_of_tokens_would_ignore_is_refused(
    path: Path, override: str, message: str
) -> None:
    assert load_config(TrainConfig, path, ("objective.masked_diffusion={}",)).objective is not None
    with pytest.raises(UserError, match=message):
        load_config(TrainConfig, path, ("objective.masked_diffusion={}", override))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_steps: [", "not a YAML file"),
        ("- a\n- b\n", "list at the top"),
        ("num_steps: 10\n", "key 'output_dir' is missing"),
        ("", "key 'output_dir' is missing"),
    ],
)
def test_a_wrong_file_is_named(path: Path, content: str, message: str) -> None:
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_config(TrainConfig, path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml: no such file"):
        load_config(TrainConfig, tmp_path / "nowhere.yaml")


def test_a_config_states_only_what_differs_from_those_it_extends(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text("model: {path: m, pooling: last_token}\n")
    (tmp_path / "parts" / "task.yaml").write_text(
        "extends: [shared.yaml]\nnum_steps: 10\ndata: {path: d, weights: {a: 1, b: 2}}\n"
    )
    (tmp_path / "parts" / "shared.yaml").write_text(
        "num_steps: 7\nseed: 3\nmodel: {path: shared, normalize: false}\n"
    )
    path = tmp_path / "train.yaml"
    path.write_text(
        "extends: [parts/model.yaml, parts/task.yaml]\n"
        "output_dir: run\nmodel: {lora: {rank: 4}}\ndata: {weights: {b: 5}}\n"
    )
    config = load_config(TrainConfig, path, ("optimizer.lr=1",))
    assert (config.num_steps, config.seed, config.optimizer.lr) == (10, 3, 1.0)
    assert config.model.path == "shared"  # task.yaml comes after model.yaml, with all it extends
    assert (config.model.pooling, config.model.normalize) == ("last_token", False)
    assert config.model.lora is not None and config.model.lora.rank == 4
    assert config.data.weights == {"a": 1, "b": 5}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("extends: nowhere.yaml\n", r"base.yaml: extends = 'nowhere.yaml' \| allowed: a list"),
        ("extends: [nowhere.yaml]\n", r"base.yaml: extends: .*nowhere.yaml: no such file"),
        ("extends: [train.yaml]\n", r"base.yaml: extends: .*circle.*train.yaml -> base.yaml"),
        ("- a\n", "base.yaml: list at the top"),
        ("modle: {}\n", "train.yaml: unknown key 'modle'"),
    ],
)
def test_a_wrong_base_is_named(path: Path, base: str, message: str) -> None:
    path.write_text("extends: [base.yaml]\n" + MINIMAL)
    (path.parent / "base.yaml").write_text(base)
    with pytest.raises(UserError, match=message) as error:
        load_config(TrainConfig, path)
    assert "\n" not in str(error.value)


def test_template_puts_the_instruction_once_and_only_where_there_is_one() -> None:
    template = Template(query="Instruct: {instruction}\nQuery: {text}", document="{text}")
    assert template.format_query("q", "find it") == "Instruct: find it\nQuery: q"
    assert template.format_query("q") == "q"
    assert template.document_prefix() == ""
    assert template.document_prefix("find it") == "Instruct: find it\nQuery: "
    for wrong in ("{text} {instruction}", "{instruction}", "{text} {text}"):
        with pytest.raises(UserError, match=r"template\.query"):
            Template(query=wrong)
    with pytest.raises(UserError, match=r"template\.document"):
        Template(document="{instruction} {text}")


def test_a_template_that_wraps_a_text_does_so_with_an_instruction_and_without() -> None:
    template = Template(
        query="[INST] {instruction}; {text} [/INST]", document="[INST] {text} [/INST]"
    )
    assert template.format_query("q", "find it") == "[INST] find it; q [/INST]"
    assert template.format_query("q") == template.format_document("q") == "[INST] q [/INST]"
    assert template.format_document("d", "find it") == "[INST] find it; d [/INST]"


def test_a_query_template_without_an_instruction_holds_for_every_query() -> None:
    template = Template(query="query: {text}", document="passage: {text}")
    assert template.format_query("q") == template.format_query("q", "find it") == "query: q"
