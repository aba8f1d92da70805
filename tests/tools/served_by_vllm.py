"""Serve small exports by a real vLLM, and compare its vectors with ours.

python -m tests.tools.served_by_vllm VLLM/bin/python [CASE ...]

The argument is the Python of an environment that holds vLLM, which needs other packages than ours;
on a CPU, its CPU build. Each family and kind of attention is exported with random weights, with the
changes of config.json that its card asks for, and embeds texts that are longer than its windows.
Exits with 1 if vectors differ that should be equal, or agree where the card says that the future is
masked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers as hf

from pipeline.config import ModelConfig
from pipeline.model.load_export import load_export
from tests.tiny_models import export_tiny, tiny_starter

SIZES = {
    **{"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "max_position_embeddings": 514, "pad_token_id": 0},
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = 64
TEXT_LENGTHS = (1, 3, 9, 20, 33, 60, 5, 41)  # in words
EQUAL = 1e-5
# What vLLM runs: it embeds the texts in the folder of the export, whose vectors it adds.
SERVER = """\
import json, sys
from vllm import LLM
if __name__ == "__main__":
    model = LLM(model=sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True,
                max_model_len=256, gpu_memory_utilization=0.4)
    found = model.embed(json.load(open(sys.argv[2])))
    json.dump([one.outputs.embedding for one in found], open(sys.argv[3], "w"))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An export, what its card asks to change in config.json, and whether it is then equal."""

    config: Callable[..., Any]
    sizes: dict[str, Any]
    attention: Any = "bidirectional"
    pooling: Any = "mean"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    masked: bool = False


def decoder(config: Callable[..., Any], **more: Any) -> Case:
    names = {field.name for field in dataclasses.fields(Case)}
    own = {key: value for key, value in more.items() if key in names}
    rest = {key: value for key, value in more.items() if key not in names}
    return Case(config=config, sizes={**GROUPED, **rest}, **own)


NEAR = {"sliding_window": WINDOW}
GEMMA_3 = {"use_bidirectional_attention": True, "sliding_window": 2 * WINDOW}
GPT2 = {"vocab_size": 300, "n_positions": 514, "n_embd": 128, "n_layer": 3, "n_head": 4}
CASES = {
    "bert": Case(config=hf.BertConfig, sizes=SIZES),
    "bert-first": Case(config=hf.BertConfig, sizes=SIZES, pooling="first_token"),
    "roberta": Case(config=hf.RobertaConfig, sizes={**SIZES, "pad_token_id": 1}),
    "xlm-roberta": Case(config=hf.XLMRobertaConfig, sizes={**SIZES, "pad_token_id": 1}),
    "modernbert": Case(
        config=hf.ModernBertConfig,
        sizes={**GROUPED, "local_attention": WINDOW, "global_attn_every_n_layers": 2},
    ),
    "eurobert": decoder(hf.EuroBertConfig, mask_token_id=3),
    "qwen2": decoder(hf.Qwen2Config),
    "qwen2-causal": decoder(hf.Qwen2Config, attention="causal", pooling="last_token"),
    "qwen3": decoder(hf.Qwen3Config, head_dim=32),
    "llama": decoder(hf.LlamaConfig),
    "llama-causal": decoder(hf.LlamaConfig, attention="causal", pooling="last_token"),
    "mistral": decoder(hf.MistralConfig, sliding_window=None),
    "mistral-near": decoder(hf.MistralConfig, **NEAR, changes={"sliding_window": WINDOW + 1}),
    "mistral-near-causal": decoder(hf.MistralConfig, **NEAR, attention="causal"),
    "phi3": decoder(hf.Phi3Config),
    "phi3-near": decoder(hf.Phi3Config, **NEAR, changes={"sliding_window": WINDOW + 1}),
    "gemma3": decoder(
        hf.Gemma3TextConfig, **NEAR, head_dim=32, sliding_window_pattern=2, changes=GEMMA_3
    ),
    "gemma3-unchanged": decoder(hf.Gemma3TextConfig, **NEAR, head_dim=32, masked=True),
    "gemma3-causal": decoder(hf.Gemma3TextConfig, **NEAR, head_dim=32, attention="causal"),
    "gemma-causal": decoder(hf.GemmaConfig, head_dim=32, attention="causal"),
    "gemma": decoder(hf.GemmaConfig, head_dim=32, masked=True),
    "gemma2": decoder(hf.Gemma2Config, **NEAR, head_dim=32, masked=True),
    "gemma2-causal": decoder(hf.Gemma2Config, **NEAR, head_dim=32, attention="causal"),
    "gpt2": Case(config=hf.GPT2Config, sizes=GPT2, masked=True),
    "gpt2-causal": Case(config=hf.GPT2Config, sizes=GPT2, attention="causal"),
    "olmo2": decoder(hf.Olmo2Config, masked=True),
    "olmo2-causal": decoder(hf.Olmo2Config, attention="causal"),
    "smollm3": decoder(hf.SmolLM3Config, masked=True),
    "smollm3-causal": decoder(hf.SmolLM3Config, attention="causal"),
}


def make(case: Case, folder: Path, texts: list[str]) -> tuple[Path, np.ndarray]:
    """Export random weights; returns the folder with the changes of its card, and our vectors."""
    (folder / "corpus.txt").write_text("\n".join(texts))
    base = tiny_starter(folder / "base", folder / "corpus.txt")
    (base / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(case.config(**case.sizes))
    for weight in model.parameters():
        # Large enough that attention and positions matter.
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.08)
    model.save_pretrained(base)
    config = ModelConfig(
        path=str(base), attention=case.attention, pooling=case.pooling, dtype="float32"
    )
    export = export_tiny(config, folder / "export", max_length=256)
    vectors = load_export(export).encode_texts(texts)
    path = export / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | case.changes))
    return export, vectors


def serve(python: str, export: Path, texts: list[str]) -> np.ndarray:
    """Return vLLM's vectors of the texts."""
    given, found = export.parent / "texts.json", export.parent / "vectors.json"
    given.write_text(json.dumps(texts))
    program = export.parent / "serve.py"
    program.write_text(SERVER)
    own = ("PYTHON", "VIRTUAL_ENV", "CUDA_VISIBLE", "DS_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    for _ in range(3):
        done = subprocess.run(
            [python, program, export, given, found],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode >= 0:  # its CPU build sometimes aborts
            break
    if done.returncode:
        sys.exit(f"vLLM ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return np.array(json.loads(found.read_text()))


def main(python: str, names: list[str]) -> int:
    """Print a line for each case; returns 1 if one is not as its card says."""
    rng = random.Random(0)
    words = [f"w{number}" for number in range(50)]
    texts = [" ".join(rng.choices(words, k=length)) for length in TEXT_LENGTHS]
    wrong = 0
    for name in names or CASES:
        with TemporaryDirectory(prefix="diffembed-") as folder:
            export, ours = make(CASES[name], Path(folder), texts)
            error = float(np.abs(serve(python, export, texts) - ours).max())
        right = (error > 1e-2) if CASES[name].masked else (error < EQUAL)
        wrong += not right
        verdict = "masked" if CASES[name].masked else "equal"
        print(f"{name:<22} {error:.1e}  {verdict if right else f'NOT {verdict}'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
