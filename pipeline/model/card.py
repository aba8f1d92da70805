"""The model card of an export: what it is, how to use it, what made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from pipeline.config import ModelConfig, Template
from pipeline.run_dir import write_text

_EVALUATION = "## Evaluation"
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
        facts: `recipe` (YAML of the training run), `step`, `data` (a Markdown table), `decoder`
            (whether the model has a causal mask that could be on by mistake), `plain_base` (whether
            transformers alone loads the base model as the one that was trained).
    """
    licence = base_licence(config)
    parts = [_header(config, licence, adapter_only), _summary(config, max_length)]
    parts.append(f"## Needs\n\n{_needs(config, adapter_only, facts)}")
    if adapter_only and facts["plain_base"]:
        parts.append(f"## Use\n\n{_transformers_usage(config, _ADAPTER_LOADING)}")
    elif adapter_only:
        parts.append(f"## Use\n\n{_own_usage(template)}")
    else:
        parts += [
            f"## Use\n\n{_sentence_transformers_usage(config, template)}",
            f"With transformers alone:\n\n{_transformers_usage(config, _LOADING)}",
        ]
    parts.append(f"{_EVALUATION}\n\nNot evaluated yet.")
    if "data" in facts:
        parts.append(f"## Training data\n\n{facts['data']}")
    parts.append(f"## Licence\n\n{_licence_text(config, licence)}")
    if "recipe" in facts:
        step = facts.get("step", 0)
        state = f"after {step} optimizer steps" if step else "before training"
        parts.append(f"## Recipe\n\nThese weights are the run {state}:\n\n```yaml\n")
        parts[-1] += f"{facts['recipe'].strip()}\n```"
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def add_evaluation(folder: Path, table: str) -> None:
    """Put a Markdown table of scores into the card of an export, in the place of an earlier one."""
    path = folder / "README.md"
    before, found, after = path.read_text().partition(f"{_EVALUATION}\n")
    if found:
        _, heading, rest = after.partition("\n## ")
        write_text(path, f"{before}{_EVALUATION}\n\n{table.strip()}\n{heading}{rest}")


def base_licence(config: ModelConfig) -> str | None:
    """The licence that the base model's own card names; None where no card is at hand."""
    try:
        if Path(config.path).is_dir():
            card = ModelCard.load(Path(config.path) / "README.md")
        else:
            card = ModelCard.load(config.path)
    except (OSError, ValueError, HfHubHTTPError):
        return None
    data = card.data.to_dict()
    licence = data.get("license_name") or data.get("license")
    return None if licence is None else str(licence)


def _header(config: ModelConfig, licence: str | None, adapter_only: bool) -> str:
    library = "peft" if adapter_only else "sentence-transformers"
    tree: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "sentence-similarity",
        "tags": [library, "feature-extraction", "diffembed"],
    }
    if licence is not None:
        tree["license"] = licence
    if not Path(config.path).exists():  # a name on the hub
        tree["base_model"] = config.path
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}---"


def _licence_text(config: ModelConfig, licence: str | None) -> str:
    name = Path(config.path).name
    if licence is None:
        return f"That of the base model, {name}, whose card was not at hand, and of the data."
    return f"The base model, {name}, is under `{licence}`; the data have licences of their own."


def _needs(config: ModelConfig, adapter_only: bool, facts: Mapping[str, Any]) -> str:
    """The least that loads these vectors."""
    if adapter_only and not facts["plain_base"]:
        return (
            "The base model and `diffembed`: transformers alone does not load that base as the "
            "model that was trained. A merged export needs neither."
        )
    if adapter_only:
        return (
            "The base model, `peft`, and the code below, which also sets the attention: an adapter "
            "alone has no place to say so."
        )
    if not facts["decoder"] or config.attention == "causal":
        return "Any version of transformers that knows the model type in config.json."
    return (
        "`transformers >= 5.17`: earlier versions ignore `is_causal` in config.json and would "
        "silently mask the future. Attention `sdpa` (the default) or `eager`: "
        "`flash_attention_2` goes by the causal flag of the attention modules instead. "
        "No remote code."
    )


def _summary(config: ModelConfig, max_length: int) -> str:
    norm = "normalised to length 1" if config.normalize else "not normalised"
    cut = f" of {config.dimensions} numbers" if config.dimensions else ""
    instruction = "" if config.pool_instruction else " without the instruction's tokens"
    return (
        f"# Text embedder from {Path(config.path).name}\n\n"
        f"A language model with {config.attention} attention, fine-tuned to embed text: "
        f"{config.pooling.replace('_', ' ')} pooling{instruction}, vectors{cut} {norm}, texts cut "
        f"at {max_length} tokens."
    )


def _sentence_transformers_usage(config: ModelConfig, template: Template) -> str:
    query = template.query_prefix("Retrieve text that answers the question")
    document = template.document_prefix()
    spaces, note = ["", ""], ""
    if not config.pool_instruction:
        # Their count of a prompt's tokens is right where the prompt does not end in a space, which
        # most tokenizers join with the word behind it.
        spaces = [prefix[len(prefix.rstrip()) :] for prefix in (query, document)]
        query, document = query.rstrip(), document.rstrip()
        note = "\n\nThe space between prompt and text belongs to the text, as here."
    return f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries = model.encode([{spaces[0] + "..."!r}], prompt={query!r})
documents = model.encode([{spaces[1] + "..."!r}], prompt={document!r})
scores = model.similarity(queries, documents)
```{note}"""


def _own_usage(template: Template) -> str:
    query = template.query_prefix("Retrieve text that answers the question")
    return f"""```python
from pipeline.model.load import load_export

model = load_export("PATH")
queries = model.encode_texts(["..."], prefix={query!r})
documents = model.encode_texts(["..."], prefix={template.document_prefix()!r})
scores = queries @ documents.T
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
