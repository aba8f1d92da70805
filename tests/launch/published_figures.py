"""Figures of the hub and the paper about models and configurations that the recipes repeat."""

from __future__ import annotations

from typing import Any

from pipeline.planning.described_data import Lengths, Shape

# The config.json of each published model, as far as shapes go.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Dream-org/Dream-v0-Instruct-7B": {
        "model_type": "Dream", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "mistralai/Mistral-7B-Instruct-v0.2": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "sliding_window": None,
    },
}  # fmt: skip
# Published counts of whole models.
WHOLE = {
    "Dream-org/Dream-v0-Instruct-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
}
# Trainable parameters by peft's count, for rank 16 on all seven linear layers.
RANK_16 = {
    "Dream-org/Dream-v0-Instruct-7B": 40_370_176,
    "Qwen/Qwen2.5-7B-Instruct": 40_370_176,
    "meta-llama/Meta-Llama-3-8B-Instruct": 41_943_040,
    "mistralai/Mistral-7B-Instruct-v0.2": 41_943_040,
}
# The published configurations: rows in all, rows a step, learning rate, decay, warm-up steps,
# adapter rank, negatives a query, and whether the weights went through MNTP first.
PUBLISHED: dict[str, tuple[int, int, float, str, int, int, int, bool]] = {
    "instruction/dream": (16_000, 128, 1e-4, "linear", 20, 32, 15, False),
    "instruction/llama3": (16_000, 128, 1e-4, "linear", 20, 32, 15, False),
    "instruction/llama3-mntp": (16_000, 128, 1e-4, "linear", 20, 32, 15, True),
    "instruction/mistral": (16_000, 128, 1e-4, "linear", 20, 32, 15, False),
    "instruction/mistral-mntp": (16_000, 128, 1e-4, "linear", 20, 32, 15, True),
    "instruction/qwen2.5": (16_000, 128, 1e-4, "linear", 20, 32, 15, False),
    "instruction/qwen2.5-mntp": (16_000, 128, 1e-4, "linear", 20, 32, 15, True),
    "long/dream": (16_000, 16, 5e-5, "linear", 100, 16, 31, False),
    "long/llama3-mntp": (16_000, 16, 5e-5, "linear", 200, 16, 31, True),
    "long/mistral": (16_000, 16, 1e-4, "linear", 100, 16, 31, False),
    "long/qwen2.5": (16_000, 16, 1e-4, "linear", 100, 16, 31, False),
    "theorem/dream": (10_896, 16, 1e-4, "linear", 100, 16, 31, False),
    "theorem/qwen2.5": (10_896, 16, 1e-4, "linear", 100, 16, 31, False),
    "theorem/llama3-simcse": (10_896, 16, 1e-4, "linear", 100, 16, 31, True),
    "theorem/mistral-simcse": (10_896, 16, 1e-4, "linear", 100, 16, 31, True),
    "reason/dream": (60_000, 16, 1e-5, "constant", 0, 16, 31, False),
    "reason/llama3-mntp": (60_000, 16, 1e-5, "constant", 0, 16, 31, True),
    "reason/qwen2.5-mntp": (60_000, 16, 1e-5, "constant", 0, 16, 31, True),
    "simcse/dream": (64_000, 64, 3e-5, "linear", 0, 16, 63, False),
    "simcse/llama3-mntp": (128_000, 128, 3e-5, "linear", 0, 16, 127, True),
    "simcse/mistral-mntp": (128_000, 128, 3e-5, "linear", 0, 16, 127, True),
    "simcse/qwen2.5-mntp": (128_000, 64, 3e-5, "linear", 0, 16, 63, True),
}


def e5_sets(rows: int) -> tuple[tuple[str, str, int], ...]:
    return tuple((f"e5.{name}", name, rows) for name in ("nq", "quora_duplicates"))


# Lengths from the paper's table of data statistics.
SHAPES = {
    "instruction": Shape(
        groups=(("msmarco", "Retrieve", 4096),),
        query=Lengths(mean=83, deviation=76, limit=304),
        document=Lengths(mean=92, deviation=41, limit=196),
        num_negatives=15,
    ),
    "long": Shape(
        groups=e5_sets(2048),
        query=Lengths(mean=39, deviation=19, limit=4096),
        document=Lengths(mean=366, deviation=1062, limit=4096),
        num_negatives=1,
    ),
    "theorem": Shape(
        groups=tuple(("reasonaug", f"kind {k}", 1362) for k in range(8)),
        query=Lengths(mean=230, deviation=244, limit=4096),
        document=Lengths(mean=508, deviation=427, limit=4096),
        num_negatives=1,
    ),
    "reason": Shape(
        groups=(("vl", "kind 0", 2048), ("vl", "kind 1", 2048), *e5_sets(4096)),
        query=Lengths(mean=84, deviation=91, limit=4096),
        document=Lengths(mean=281, deviation=715, limit=4096),
        num_negatives=1,
    ),
    "simcse": Shape(
        groups=(("wiki1m", "", 8192),),
        query=Lengths(mean=25, deviation=14, limit=128),
        document=Lengths(mean=25, deviation=14, limit=128),
        num_negatives=0,
    ),
    "mntp": Shape(
        groups=(("wikitext", "", 100),),
        query=Lengths(mean=300, deviation=100, limit=4096),
        document=Lengths(mean=300, deviation=100, limit=4096),
        num_negatives=0,
    ),
}
