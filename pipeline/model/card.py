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
    facts: Mapping[str, Any],
) -> None:
    """Write README.md.

    Args:
        folder: the export.
        config: attention, pooling and base model.
        template: how instructions and texts become strings.
        max_length: tokens after which a text is cut.
        facts: `recipe` (YAML of the training run), `step`, `evaluation` (a Markdown table).
    """
    parts = [_header(), _summary(config, max_length), _usage(config, template)]
    if "evaluation" in facts:
        parts.append(f"## Evaluation\n\n{facts['evaluation']}")
    if "recipe" in facts:
        step = facts.get("step", 0)
        state = f"after {step} optimizer steps" if step else "before training"
        parts.append(f"## Recipe\n\nThese weights are the run {state}:\n\n```yaml\n")
        parts[-1] += f"{facts['recipe'].strip()}\n```"
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _header() -> str:
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "tags:\n- sentence-transformers\n- feature-extraction\n- diffembed\n---"
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


def _usage(config: ModelConfig, template: Template) -> str:
    query = template.query_prefix("Retrieve text that answers the question")
    document = template.document_prefix()
    normalise = "\nvectors = torch.nn.functional.normalize(vectors)" if config.normalize else ""
    return f"""## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries = model.encode(["..."], prompt={query!r})
documents = model.encode(["..."], prompt={document!r})
scores = model.similarity(queries, documents)
```

With transformers alone:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("PATH"), AutoModel.from_pretrained("PATH")
batch = tokenizer(["..."], padding=True, truncation=True, return_tensors="pt")
hidden = model(**batch).last_hidden_state.float()
mask = batch.attention_mask[..., None]
vectors = {_POOLING_CODE[config.pooling]}{normalise}
```"""
