"""Configs are read strictly and faults are named by file and key."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies
from pydantic import TypeAdapter

from pipeline.config import (
    ChainConfig,
    EvaluateConfig,
    MineConfig,
    PrepareConfig,
    ProbeConfig,
    StarterConfig,
    Template,
    TrainConfig,
    dump_config,
    load_config,
)
from pipeline.config.loading import UserPath, dump_yaml, expand_path, parse_yaml
from pipeline.errors import UserError

MINIMAL = "output_dir: run\nnum_steps: 10\nmodel: {path: m}\ndata: {path: d}\n"


KINDS: tuple[Any, ...] = (
    *(TrainConfig, PrepareConfig, MineConfig, EvaluateConfig, ProbeConfig),
    *(StarterConfig, ChainConfig),
)
RECIPES = Path(__file__).parents[1] / "launch" / "recipes"


def fields_of(kind: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config, also of the sections below it, with its type."""
    names = vars(sys.modules[kind.__module__])
    for field in dataclasses.fields(kind):
        key, types = above + field.name, [eval(field.type, names)]
        yield key, types[0]
        while types:
            one = types.pop()
            types += typing.get_args(one)
            if isinstance(one, type) and dataclasses.is_dataclass(one):
                yield from fields_of(one, f"{key}.")


def keys_in(tree: Any, above: str = "") -> Iterator[str]:
    """Every key that a YAML file sets, without the numbers of lists."""
    if isinstance(tree, list):
        for item in tree:
            yield from keys_in(item, above)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield above + key
            yield from keys_in(value, f"{above}{key}.")


def numbers_in(node: Any, schema: dict[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number that a JSON schema allows somewhere, with its key and its own schema."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if node.get("type") in ("integer", "number"):
        yield key, node
    for name, child in node.get("properties", {}).items():
        yield from numbers_in(child, schema, f"{key}.{name}" if key else name)
    inside = [node[part] for part in ("items", "additionalProperties") if part in node]
    for child in [*node.get("anyOf", []), *node.get("prefixItems", []), *inside]:
        if isinstance(child, dict):
            yield from numbers_in(child, schema, key)


# Any number makes sense there, or a rule with its own message decides.
UNBOUNDED = {"loss.false_negative_margin", "loss.matryoshka_dims", "sources.where", "corpora.where"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_number_of_a_config_has_a_least_value(kind: Any) -> None:
    schema = TypeAdapter(kind).json_schema()
    numbers = list(numbers_in(schema, schema))
    unbounded = {key for key, node in numbers if not {"minimum", "exclusiveMinimum"} & node.keys()}
    assert numbers
    assert unbounded <= UNBOUNDED


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
        ("loss.temperature=0", "loss.temperature: 0 . allowed: a number > 0$"),
        ("data.weights={a: -1}", "data.weights.a: -1 . allowed: a number >= 0$"),
        ("data.mixture_cap=0", "data.mixture_cap: 0 . allowed: an integer >= 1, or null$"),
        ("data.block_length=1", r"data.block_length: 1 .*: an integer >= 2 \(tokens\), or null$"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1: 1 . allowed: a number >= 0 and < 1$"),
        ("optimizer.eps=0", "optimizer.eps: 0 . allowed: a number > 0$"),
        ("seed=-1", "seed: -1 . allowed: an integer >= 0$"),
        (
            "evaluate={every: 5, config: e.yaml, text_elements: 0}",
            "evaluate.text_elements: 0 . allowed: an integer >= 1, or null$",
        ),
        ("chunks.keep_graphs=-1", "chunks.keep_graphs: -1 . allowed: an integer >= 0 or 'auto'$"),
        ("model.lora.dropout=1", "model.lora.dropout: 1 . allowed: a number >= 0 and < 1$"),
        (
            "model.rope_scaling={kind: ntk, factor: 1}",
            "scaling.factor: 1 .* number > 1$",
        ),
        ("model.trust_remote_code=true", "model.revision"),
        ("objective={}", r"objective: \[\].*exactly one of mntp, masked_diffusion, next_token"),
        ("objective={mntp: {}, next_token: {}}", r"objective: \['mntp', 'next_token'\].*exactly"),
        ("objective.mntp.mask_rate=1", "objective.mntp.mask_rate: 1.*a number > 0 and < 1"),
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


def test_an_override_opens_a_section_that_the_file_leaves_out_or_sets_to_null(
    path: Path, tmp_path: Path
) -> None:
    config = load_config(TrainConfig, path)
    assert config.model.lora is None
    dumped = tmp_path / "dumped.yaml"  # as a run's config.yaml, in which every key stands
    dumped.write_text(dump_config(config))
    assert "lora: null" in dumped.read_text()
    for file in (path, dumped):
        changed = load_config(TrainConfig, file, ("model.lora.rank=4", "loss.guide.margin=0.1"))
        assert changed.model.lora is not None and changed.model.lora.rank == 4
        assert changed.loss.guide is not None and changed.loss.guide.margin == 0.1


def test_an_override_changes_one_item_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        "output_dir: out\ntasks: [FollowIR]\nmodels:\n"
        "  - {name: a, path: a, template: &both {query: 'Q {text}'}}\n"
        "  - {name: b, path: b, template: *both}\n"
    )
    given = ("models.1.path=c", "models.1.template.query=R {text}", "tasks.0=BRIGHT")
    config = load_config(EvaluateConfig, path, given)
    assert [str(model.path) for model in config.models] == ["a", "c"]
    # The alias of the file does not carry the change to the other item.
    assert [model.template.query for model in config.models if model.template] == [
        "Q {text}",
        "R {text}",
    ]
    assert config.tasks == ("BRIGHT",)
    for override, message in (
        ("models.2.path=c", r"'2' in a list of 2 . allowed: .*0 to 1 . fix: give the whole list"),
        ("models.path=c", r"'path' in a list of 2 .*0 to 1"),
        ("models.-1.path=c", "'-1' in a list of 2"),
        ("tasks.0.name=c", "'0' holds a value, not keys"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(EvaluateConfig, path, (override,))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.temperature=0.1", "loss: 'given together with objective'.*remove loss"),
        ("schedule=plain", "schedule, chunks.keep_graphs: .*auto, cache or sweep"),
        ("chunks.keep_graphs=2", "schedule, chunks.keep_graphs: .*and 0, with"),
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


@pytest.mark.parametrize("value", ["[en, de]", "{en: de}"])
def test_a_value_of_no_allowed_type_is_named_by_its_key(tmp_path: Path, value: str) -> None:
    path = tmp_path / "prepare.yaml"
    source = f"{{name: a, format: columns, path: a.jsonl, where: {{meta.lang: {value}}}}}"
    path.write_text(f"output_dir: out\ntokenizer: t\nsources: [{source}]\n")
    with pytest.raises(
        UserError, match=r"sources\.0\.where\.meta\.lang = .*boolean or .* or a text"
    ):
        load_config(PrepareConfig, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_config(TrainConfig, tmp_path / "nowhere.yaml")


def test_a_config_states_only_what_differs_from_those_it_extends(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text("model: {path: m, pooling: last_token}\n")
    (tmp_path / "parts" / "task.yaml").write_text(
        "extends: shared.yaml\nnum_steps: 10\ndata: {path: d, weights: {a: 1, b: 2}}\n"
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
        ("extends: 3\n", r"base.yaml: extends = 3 \| allowed: the path of a YAML file, or a list"),
        ("extends:\n", r"base.yaml: extends = None \| allowed: the path of a YAML file, or a list"),
        ("extends: [a.yaml, 3]\n", r"base.yaml: extends = \['a.yaml', 3\] \| allowed: the path"),
        ("extends: nowhere.yaml\n", r"base.yaml: extends: .*nowhere.yaml: no such file"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nseed: 2\n", "line 6: key 'seed' is given twice, first in line 5"),
        ("optimizer:\n  lr: 1\n  eps: 1\n  'lr': 2\n", "line 8: key 'lr' is given twice"),
        ("optimizer: {lr: 1, lr: 2}\n", "line 5: key 'lr' is given twice"),
        ("a: &a {seed: 1}\n<<: *a\n<<: *a\n", "key '<<' is given twice"),
        ("optimizer: {lr: .nan}\n", "optimizer.lr: nan is not a finite number"),
        ("optimizer: {lr: 1e999}\n", "optimizer.lr: inf is not a finite number"),
        ("seed: 99999999999999999999\n", "seed: an integer beyond 64 bits"),
        ("seed: true\n", "seed: a switch .true or false. . allowed: a number"),
        ("optimizer: {betas: [true, 0.9]}\n", "optimizer.betas.0: a switch"),
        ("seed: no\n", "seed = 'no' . allowed: a valid integer"),
        ("seed: 1:30\n", "seed = '1:30' . allowed: a valid integer"),
        ("seed: 2024-01-01\n", "seed = '2024-01-01' . allowed: a valid integer"),
        ("chunks: {keep_graphs: most}\n", "chunks.keep_graphs = 'most'.*integer.* or 'auto'"),
        ("trackers: wandb\n", "trackers = 'wandb' . allowed: a list"),
        ("optimizer:\n", "optimizer = None . allowed: a section of keys"),
        ("seed: !!int x\n", "not a YAML file"),
        ("seed: !!timestamp x\n", "not a YAML file"),
        ("seed: !!python/name:os.system\n", "not a YAML file .line 5: could not determine"),
        ("trackers: &a [*a]\n", "line 5: an anchor contains itself"),
        ("seed: " + "[" * 5000 + "\n", "nested too deeply"),
        ("? [a]\n: 1\n", "not a YAML file"),
        ("1: 2\n", "1 = 1 . allowed: "),
        ('trackers: ["a\\0b"]\n', "trackers.0: .*holds a character"),
        ('trackers: ["\\ud800"]\n', "trackers.0: .*holds a character"),
        ("seed: x\nbogus: 1\noptimizer: {lrr: 2}\n", "'optimizer.lrr' .and 2 more: bogus, seed. "),
        ("---\nseed: 1\n", "not a YAML file .line 5: but found another document"),
        ("#" * 2**20, "more than a megabyte"),
    ],
)
def test_yaml_that_would_be_misread_is_refused(path: Path, content: str, message: str) -> None:
    path.write_text(MINIMAL + content)
    with pytest.raises(UserError, match=message) as error:
        load_config(TrainConfig, path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    assert len(str(error.value)) < 600


def test_a_file_of_many_aliases_is_refused_at_once(path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 8)}]" for k in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 50,000 values"):
        load_config(TrainConfig, path)


def test_duplicate_keys_are_found_in_bases_and_overrides_too(path: Path) -> None:
    (path.parent / "base.yaml").write_text("seed: 1\nseed: 1\n")
    path.write_text("extends: [base.yaml]\n" + MINIMAL)
    with pytest.raises(UserError, match=r"base\.yaml: line 2: key 'seed' is given twice"):
        load_config(TrainConfig, path)
    path.write_text(MINIMAL)
    for overrides, message in (
        (("optimizer={lr: 1, lr: 2}",), "override .*line 1: key 'lr' is given twice"),
        (("seed=1", "seed=2"), "override 'seed=1': seed is given again after it"),
        (("optimizer.lr=1", "optimizer={eps: 1}"), "'optimizer.lr=1': optimizer is given again"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(TrainConfig, path, overrides)
    changed = load_config(TrainConfig, path, ("optimizer={eps: 1}", "optimizer.lr=1"))
    assert (changed.optimizer.eps, changed.optimizer.lr) == (1, 1)


def test_plain_words_and_numbers_are_what_they_look_like(path: Path) -> None:
    path.write_text(
        MINIMAL.replace("{path: m}", "{path: no, revision: 0123456, normalize: off}")
        + "seed: 0123\noptimizer: {lr: 1e-3, eps: 1E-9}\nloss: {temperature: .5}\n"
    )
    config = load_config(TrainConfig, path, ("data.mixture_cap=1e6", "data.path=2024-01-01"))
    assert (config.model.path, config.model.revision) == ("no", "0123456")
    assert (config.model.normalize, config.seed) == (False, 123)
    assert (config.optimizer.lr, config.optimizer.eps, config.loss.temperature) == (1e-3, 1e-9, 0.5)
    assert (config.data.mixture_cap, config.data.path) == (10**6, Path("2024-01-01"))
    again = path.with_name("again.yaml")
    again.write_text(dump_config(config))
    assert load_config(TrainConfig, again) == config


def test_a_key_may_replace_one_that_comes_by_a_merge(path: Path) -> None:
    path.write_text(
        MINIMAL + "optimizer: &o {lr: 1, eps: 2}\nloss: {temperature: 3}\n"
        "chunks: {<<: &c {max_tokens: 5, min_chunks: 2}, max_tokens: 7}\n"
    )
    config = load_config(TrainConfig, path)
    assert (config.chunks.max_tokens, config.chunks.min_chunks) == (7, 2)


@given(
    strategies.recursive(
        strategies.none()
        | strategies.booleans()
        | strategies.integers(-(2**63) + 1, 2**63 - 1)
        | strategies.floats(allow_nan=False, allow_infinity=False)
        | strategies.text(strategies.characters(codec="utf-8", exclude_characters="\0"))
        | strategies.sampled_from(
            ["no", "1e3", "0123", "1:30", "~", "<<", "=", "2024-01-01", ".5"]
        ),
        lambda inner: (
            strategies.lists(inner, max_size=4)
            | strategies.dictionaries(strategies.text("abc", min_size=1), inner, max_size=4)
        ),
        max_leaves=8,
    )
)
@settings(max_examples=150)
def test_every_value_that_is_dumped_reads_back_equal(value: object) -> None:
    assert parse_yaml(dump_yaml(value), origin="dump") == value


@pytest.mark.parametrize(
    ("given_path", "expected"),
    [
        ("~/shards", "/opt/me/shards"),
        ("$DATA/shards", "/data/shards"),
        ("${DATA}/shards", "/data/shards"),
        ("a~b/$", "a~b/$"),
        ("$MISSING/shards", None),
        ("~nobody-here/shards", None),
        ("''", None),
    ],
)
def test_home_and_variables_are_written_out_in_every_path(
    path: Path, monkeypatch: pytest.MonkeyPatch, given_path: str, expected: str | None
) -> None:
    monkeypatch.setenv("HOME", "/opt/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("MISSING", raising=False)
    for key in ("output_dir", "model.path", "data.path", "checkpoint.mirror", "model.adapter"):
        override = (f"{key}={given_path}",)
        if expected is None:
            with pytest.raises(UserError, match=f"{key} = .*allowed: a path"):
                load_config(TrainConfig, path, override)
        else:
            value = load_config(TrainConfig, path, override)
            for part in key.split("."):
                value = getattr(value, part)
            assert str(value) == expected
    assert expand_path("hub:~/rows") == "hub:/opt/me/rows"
    assert expand_path("s3://bucket/$x") == "s3://bucket/$x"


def test_no_path_of_a_config_is_left_as_it_is_written() -> None:
    types = [type_ for kind in KINDS for _, type_ in fields_of(kind)]
    while types:
        one = types.pop()
        assert one is not Path, "a config has a path of type Path; UserPath expands `~`"
        if one != UserPath:
            types += typing.get_args(one)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfes\x00", "byte 1 is not UTF-8.*save the file as UTF-8"),
        (b"seed: \xe9\n", "byte 7 is not UTF-8"),
        (b"\xef\xbb\xbf" + MINIMAL.encode() + b"seed: x", "seed = 'x'"),
        (b"seed: \x00", "not a YAML file"),
    ],
)
def test_bytes_that_are_no_text_are_named(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(TrainConfig, path)


def test_a_folder_as_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a folder .*name the file inside it"):
        load_config(TrainConfig, tmp_path)


def test_faults_of_a_config_come_before_heavy_packages(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("bogus: 1\n")
    code = """
import sys
from pipeline.cli import app
from pipeline.errors import UserError

for command in sys.argv[2:]:
    try:
        app([*command.split(), sys.argv[1]], standalone_mode=False)
    except UserError as error:
        assert "unknown key 'bogus'" in str(error), (command, error)
    else:
        sys.exit(f"{command}: no error")
heavy = {"torch", "transformers", "datasets", "mteb", "pyarrow", "tokenizers", "numpy"}
sys.exit(", ".join(heavy & sys.modules.keys()) or None)
"""
    commands = ["starter", "prepare", "mine", "export", "probe", "report", "plan run"]
    commands += [f"evaluate {name}" for name in ("count", "run", "prefetch", "plan", "score")]
    done = subprocess.run(
        [sys.executable, "-c", code, path, *commands],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_config_key_is_set_by_a_shipped_recipe() -> None:
    recipes = RECIPES.rglob("*.yaml")
    shown = {key for path in recipes for key in keys_in(yaml.safe_load(path.read_text()))}
    keys = {key for kind in KINDS for key, _ in fields_of(kind)}
    assert len(keys) > 150
    assert sorted(keys - shown) == []


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((TrainConfig, name) for name in ("training", "objective", "teacher")),
        (PrepareConfig, "shards"),
        *((EvaluateConfig, "evaluation"), (ProbeConfig, "probe"), (ChainConfig, "chain")),
        (MineConfig, "mining"),
    ],
)
def test_a_recipe_of_options_is_a_whole_config(kind: Any, name: str) -> None:
    config = load_config(kind, RECIPES / "options" / f"{name}.yaml")
    folder = {"chain": "train", "mining": "output"}.get(name, "output_dir")
    assert str(getattr(config, folder)).count("/") >= 2
