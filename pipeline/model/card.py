"""The model card of an export: what it is, how to use it, what made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import ModelConfig, Template
from pipeline.run_dir import write_text

_POOLING_CODE = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "weighted_mean": "(hidden * (w := mask * mask.cumsum(1))).sum(1) / w.sum(1)",
    "last_token": "hidden[range(len(hidden)), batch.attention_mask.sum(1) - 1]",
    "first_token": "hidden[:, 0]",
}


def write_card(
    folder: Path,
    *,
    config: ModelConfig,
    template: Template,
    max_length: int,
    adapter_only: bool,
    facts: Mapping[str, Any],
) -> None:
    """Write README.md.

    Args:
        folder: the export.
        config: attention, pooling and base model.
        template: how instructions and texts become strings.
        max_length: tokens after which a text is cut.
        adapter_only: the folder lacks the weights its adapter belongs to.
        facts: `recipe` (YAML of the training run), `step`, `evaluation` (a Markdown table).
    """
    parts = [_header(adapter_only), _summary(config, max_length)]
    if adapter_only:
        parts.append(f"## Use\n\n{_transformers_usage(config, _ADAPTER_LOADING)}")
    else:
        parts += [
            f"## Use\n\n{_sentence_transformers_usage(template)}",
            f"With transformers alone:\n\n{_transformers_usage(config, _LOADING)}",
        ]
    if "evaluation" in facts:
        parts.append(f"## Evaluation\n\n{facts['evaluation']}")
    if "recipe" in facts:
        step = facts.get("step", 0)
        state = f"after {step} optimizer steps" if step else "before training"
        parts.append(f"## Recipe\n\nThese weights are the run {state}:\n\n```yaml\n")
        parts[-1] += f"{facts['recipe'].strip()}\n```"
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _header(adapter_only: bool) -> str:
    library = "peft" if adapter_only else "sentence-transformers"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: sentence-similarity\n"
        f"tags:\n- {library}\n- feature-extraction\n- diffembed\n---"
    )


def _summary(config: ModelConfig, max_length: int) -> str:
    norm = "normalised to length 1" if config.normalize else "not normalised"
    return (
        f"# Text embedder from {Path(config.path).name}\n\n"
        f"A language model with {config.attention} attention, fine-tuned to embed text: "
        f"{config.pooling.replace('_', ' ')} pooling, vectors {norm}, texts cut at "
        f"{max_length} tokens.\n\n"
        "Needs `transformers >= 5.17`: earlier versions ignore `is_causal` in config.json and "
        "would silently mask the future. No remote code."
    )


def _sentence_transformers_usage(template: Template) -> str:
    query = template.query_prefix("Retrieve text that answers the question")
    return f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries = model.encode(["..."], prompt={query!r})
documents = model.encode(["..."], prompt={template.document_prefix()!r})
scores = model.similarity(queries, documents)
```"""


_LOADING = """from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("PATH")"""
_ADAPTER_LOADING = """from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoTokenizer

config = AutoConfig.from_pretrained("{base}")
config.is_causal = {causal}
model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}", config=config), "PATH")"""


def _transformers_usage(config: ModelConfig, loading: str) -> str:
    loading = loading.format(base=config.path, causal=config.attention == "causal")
    cut = f"\nvectors = vectors[:, :{config.dimensions}]" if config.dimensions else ""
    normalise = "\nvectors = torch.nn.functional.normalize(vectors)" if config.normalize else ""
    return f"""```python
import torch
{loading}
tokenizer = AutoTokenizer.from_pretrained("PATH")
batch = tokenizer(["..."], padding=True, truncation=True, return_tensors="pt")
hidden = model.eval()(**batch).last_hidden_state.float()
mask = batch.attention_mask[..., None]
vectors = {_POOLING_CODE[config.pooling]}{cut}{normalise}
```"""
