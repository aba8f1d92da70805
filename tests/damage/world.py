"""The undamaged world: one folder of tiny inputs, and what every command makes of them."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.damage.commands import run

ROOT = Path(__file__).parents[2]
WORDS = ("river", "stone", "cloud", "amber", "forest", "signal", "copper", "meadow", "reed", "bay")
TASK = "BrightBiologyRetrieval"

_TAUGHT = (
    "guide: {margin: 0.1, margin_strategy: absolute}, "
    "distillation: {weight: 0.5, temperature: 0.05, documents: batch}"
)
CONFIGS = {
    "starter.yaml": """
output_dir: made
corpus: [data/rows.jsonl]
vocab_size: 300
hidden_size: 32
num_layers: 2
num_heads: 4
num_kv_heads: 2
intermediate_size: 64
max_position_embeddings: 512
seed: 0
""",
    "prepare.yaml": """
output_dir: made
tokenizer: base
max_query_length: 48
max_document_length: 64
near_duplicates: 0.95
reuse: shards
shard_bytes: 20000
block_bytes: 4000
append_eos: false
template:
  query: "Instruct: {instruction}\\nQuery: {text}"
  document: "{text}"
sources:
- name: rows
  format: columns
  path: data/rows.jsonl
  instruction: Find the place
  columns: {query: query, positives: positive, negatives: negative}
  weight: 2.0
- name: table
  format: columns
  path: data/rows.parquet
  columns: {query: query, positives: positive, negatives: negative}
  max_rows: 10
  max_negatives: 1
- name: beir
  format: mteb
  path: data/beir
decontaminate:
  ngram: 8
  max_overlap: 0.5
  max_ratio: 0.9
  sets:
  - {name: bench, path: data/bench.jsonl, fields: [text], queries: true}
""",
    "train.yaml": """
num_steps: 3
output_dir: run
seed: 7
log_every: 1
non_finite: stop
schedule: auto
model:
  path: base
  dtype: float32
  attention: bidirectional
  pooling: mean
  normalize: true
  pool_instruction: true
data:
  path: shards
  global_batch_size: 8
  num_hard_negatives: 1
  homogeneous: none
  weights: {rows: 1.0}
  mixture_temperature: 1.0
chunks: {max_tokens: 200, min_chunks: 2}
loss: {temperature: 0.1, learn_temperature: true}
optimizer: {lr: 1.0e-3, warmup_steps: 1, weight_decay: 0.01, max_grad_norm: 1.0}
checkpoint: {every: 1, keep_last: 2}
""",
    "mine.yaml": """
output: made
store: fresh
data: shards
texts: decoded
retrievers:
- {name: tiny, path: export, max_length: 64, margin: {relative: 0.999}}
- {name: words, path: bm25, margin: {}}
corpora:
- {name: more, path: data/texts.jsonl}
decontaminate:
  ngram: 8
  sets:
  - {name: bench, path: data/bench.jsonl, fields: [text], queries: true}
near_duplicates: 0.95
window: {first: 1, last: 20}
margin: {absolute: 0.001}
merge: reciprocal
negatives: 2
candidates: 4
choose: bands
bands:
- {name: hard, last: 3, share: 0.5}
- {name: easy, last: 8, share: 0.5}
short: fill
keep_negatives: true
teacher: {kind: bi_encoder, path: export, vectors: true, margin: {relative: 0.9999}}
seed: 5
""",
    "evaluate.yaml": f"""
output_dir: eval
tasks: [{TASK}]
snapshots: hub
max_length: 64
max_tokens: 2048
training_run: run
models:
- {{name: first, path: export}}
- {{name: second, path: export, precision: float32, instructions: {{{TASK}: Find it}}}}
lengths: {{{TASK}: [64]}}
""",
    "probe.yaml": """
output_dir: probed
model: export
train: data/words.txt
test: data/words.jsonl
task: chunk
labels: same_token
merge_subwords: true
max_length: 64
max_tokens: 1024
dropout: 0.1
lr: 1.0e-3
num_epochs: 1
batch_size: 64
seed: 3
""",
    "chain.yaml": """
prepare: prepare.yaml
train: train.yaml
deepspeed: zero.json
exports:
- {checkpoint: latest, output: export}
evaluate: evaluate.yaml
text_elements: 2
""",
    "mined-chain.yaml": """
prepare: again.yaml
mine: mined.yaml
train: taught.yaml
deepspeed: zero.json
exports:
- {checkpoint: latest, output: export}
evaluate: evaluate.yaml
""",
}


def _rows(count: int) -> list[dict[str, Any]]:
    found = []
    for i in range(count):
        first, second = WORDS[i % 10], WORDS[(3 * i + 1) % 10]
        found.append(
            {
                "query": f"where is the {first} {second} number {i}",
                "positive": f"the {first} {second} lies at place {i} " * (1 + i % 4),
                "negative": f"the {second} {first} of number {i} lies elsewhere",
            }
        )
    return found


def _jsonl(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_inputs(folder: Path) -> None:
    """Everything that no command makes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, data = _rows(48), folder / "data"
    _jsonl(data / "rows.jsonl", rows[:24])
    pq.write_table(pa.Table.from_pylist(rows[24:40]), data / "rows.parquet", compression="zstd")
    texts = [{"id": f"t{i}", "text": row["positive"]} for i, row in enumerate(rows[:12])]
    _jsonl(data / "texts.jsonl", texts)
    pq.write_table(pa.Table.from_pylist(texts), data / "texts.parquet")
    _jsonl(data / "bench.jsonl", [{"text": f"what makes {word} so heavy"} for word in WORDS])
    beir = rows[40:]
    _jsonl(
        data / "beir/corpus.jsonl",
        [{"_id": f"d{i}", "title": "", "text": row["positive"]} for i, row in enumerate(beir)],
    )
    _jsonl(
        data / "beir/queries.jsonl",
        [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(beir)],
    )
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(beir)))
    (data / "beir/qrels").mkdir()
    (data / "beir/qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    _write_words(data)
    _write_generations(data)
    for name, text in CONFIGS.items():
        (folder / name).write_text(text.lstrip())
    (folder / "again.yaml").write_text(
        CONFIGS["prepare.yaml"]
        .replace("output_dir: made", "output_dir: shards")
        .replace("reuse: shards\n", "")
        .lstrip()
    )
    (folder / "scored.yaml").write_text(
        CONFIGS["evaluate.yaml"].replace("output_dir: eval", "output_dir: scored").lstrip()
    )
    (folder / "mined.yaml").write_text(
        CONFIGS["mine.yaml"]
        .replace("output: made", "output: mined")
        .replace("store: fresh", "store: store")
        .lstrip()
    )
    (folder / "taught.yaml").write_text(
        CONFIGS["train.yaml"]
        .replace("num_steps: 3", "num_steps: 1")
        .replace("output_dir: run", "output_dir: taught")
        .replace("path: shards", "path: mined\n  candidates: {bands: {hard: 1}}")
        .replace("learn_temperature: true", _TAUGHT)
        .replace("warmup_steps: 1", "warmup_steps: 0")
        .lstrip()
    )
    (folder / "pieced.yaml").write_text(
        CONFIGS["train.yaml"].replace("path: base", "path: pieces").lstrip()
    )
    shutil.copy(ROOT / "ds_configs/zero2.json", folder / "zero.json")
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("__pycache__"))
    _write_hub(folder / "hub")


def _write_words(data: Path) -> None:
    """Tagged sentences, in both formats."""
    rng = random.Random(0)
    sentences = [rng.choices(WORDS, k=4) for _ in range(24)]
    tagged = [[(word, f"T{WORDS.index(word) % 2}") for word in words] for words in sentences]
    blocks = ["".join(f"{word} X {tag} O\n" for word, tag in rows) for rows in tagged]
    (data / "words.txt").write_text("\n".join(blocks))
    _jsonl(
        data / "words.jsonl",
        [{"tokens": [w for w, _ in rows], "chunk_tags": [t for _, t in rows]} for rows in tagged],
    )


def _write_generations(data: Path) -> None:
    concepts = ("Chord Rule", "Root Bound", "Parity Lemma")
    rows = [
        {
            "n": 4 * place + n,
            "domain": "math theorem",
            "concept": concept,
            "generation": f"**Problem**\nProblem sets differ: find item {n} by the {concept}.\n\n"
            f"**Solution**\nSolution steps of {concept} give {n}.",
            "check": "YES",
        }
        for place, concept in enumerate(concepts)
        for n in range(4)
    ]
    _jsonl(data / "generations.jsonl", rows)
    definitions = [
        {
            "domain": "math theorem",
            "concept": concept,
            "definition": f"**Concept**  \n{concept}\n\n**Definition**  \nIt says {concept}.",
        }
        for concept in concepts
    ]
    _jsonl(data / "definitions.jsonl", definitions)


def _write_hub(hub: Path) -> None:
    """One subset of BRIGHT in the hub's layout."""
    documents = [{"id": f"d{i}", "content": f"On {w}: {w} is heavy"} for i, w in enumerate(WORDS)]
    examples = [
        {
            "id": str(i),
            "query": f"Why is {word} heavy?",
            "excluded_ids": ["N/A"],
            "gold_ids": [f"d{i}"],
            "gold_ids_long": [f"d{i}"],
        }
        for i, word in enumerate(WORDS[:4])
    ]
    for repository in ("mteb/BRIGHT", "xlangai/BRIGHT"):
        declared = []
        for config, rows in {"documents": documents, "examples": examples}.items():
            _jsonl(hub / repository / config / "biology.jsonl", rows)
            files = [{"split": "biology", "path": f"{config}/biology.jsonl"}]
            declared.append({"config_name": config, "data_files": files})
        text = "---\n" + json.dumps({"configs": declared}) + "\n---\n"
        (hub / repository / "README.md").write_text(text)


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """One step of building the world: a command, or a function of it, run in a child."""

    work: Callable[[], int]
    code: int = 0


def _command(*argv: str) -> Callable[[], int]:
    return lambda: run(argv)


def _stopping() -> int:
    Path("run").mkdir(exist_ok=True)
    Path("run/stop").touch()
    return run(("train", "train.yaml", "--deepspeed", "zero.json"))


def _keep(made: str, *words: str) -> Callable[[], int]:
    """Run a command that writes to `made/`, and keep that under another name."""

    def work() -> int:
        code = run(words)
        Path("made").rename(made)
        return code

    return work


def _split_weights() -> int:
    """The base in two pieces with an index, as large models are published."""
    from safetensors.torch import load_file, save_file

    shutil.copytree("base", "pieces", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file("base/model.safetensors")
    names, where = sorted(weights), {}
    for piece in range(2):
        file = f"model-0000{piece + 1}-of-00002.safetensors"
        own = {name: weights[name] for name in names[piece::2]}
        save_file(own, f"pieces/{file}", metadata={"format": "pt"})
        where |= dict.fromkeys(own, file)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    Path("pieces/model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return 0


def _write_adapter() -> int:
    import peft
    import torch
    from transformers import Qwen2Config, Qwen2Model

    tree = json.loads(Path("base/config.json").read_text())
    sizes = {k: v for k, v in tree.items() if k not in ("model_type", "architectures")}
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(Qwen2Model(Qwen2Config(**sizes)), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained("adapter")
    return 0


def _begin_encoding() -> int:
    """An encoding that was killed before its parts were put together."""
    from pipeline.evaluation import encode

    def stop(*_: object) -> None:
        raise SystemExit(0)

    encode._assemble = stop  # type: ignore[assignment]
    words = ("encode", "export", "--input", "data/texts.jsonl", "--output", "begun.arrow")
    return run(("diffembed", *words))


def _foreign() -> int:
    """The export as somebody else's sentence-transformers folder."""
    shutil.copytree("export", "foreign")
    Path("foreign/diffembed.json").unlink()
    return 0


def _keep_scored() -> int:
    """The embedded plan as it was before it was scored."""
    shutil.copytree("eval", "scored", ignore=shutil.ignore_patterns("results", "report"))
    for path in Path("scored").glob("**/result.json"):
        path.unlink()
    return 0


STAGES: dict[str, Stage] = {
    "base": Stage(_keep("base", "diffembed", "starter", "starter.yaml")),
    "pieces": Stage(_split_weights),
    "adapter": Stage(_write_adapter),
    "shards": Stage(_command("diffembed", "prepare", "again.yaml")),
    "one step": Stage(_stopping, code=75),
    "two steps": Stage(_stopping, code=75),
    "export": Stage(
        # The check by other libraries takes longer than all other commands together.
        _command("diffembed", "export", "train.yaml", "--output", "export", "--no-check")
    ),
    "foreign": Stage(_foreign),
    "mined": Stage(_command("diffembed", "mine", "mined.yaml", "--workers", "1")),
    "begun": Stage(_begin_encoding),
    "plan": Stage(_command("diffembed", "evaluate", "plan", "evaluate.yaml")),
    "embed": Stage(_command("diffembed", "evaluate", "embed", "evaluate.yaml")),
    "scored plan": Stage(_command("diffembed", "evaluate", "plan", "scored.yaml")),
    "scored embed": Stage(_command("diffembed", "evaluate", "embed", "scored.yaml")),
    "score": Stage(_command("diffembed", "evaluate", "score", "evaluate.yaml")),
    "report": Stage(_command("diffembed", "report", "evaluate.yaml")),
    "problems": Stage(
        _command(
            *("ReasonAug", "templates", "--out", "problems"),
            *("--problems-per-concept", "8", "--max-tokens", "300"),
        )
    ),
}
