"""Write the model card of an export, and add the scores of an evaluation to it.

    header           YAML for the hub: library, tags, licence, base model, results of evaluations
    Needs, Use       the oldest version of each library, and code that gives the trained vectors
    Prompts          the instructions and prefixes of training
    Serve            per server: whether it serves this model, and with which settings (servers.py)
    Checked          the result of comparing vectors with other libraries (export_check.py)
    Evaluation       a table of scores, replaced by each new report
    Training data, Licence, Recipe

The code under Use is run when an export is checked, so a card that misleads its reader fails.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from pipeline.config import ModelConfig, Template
from pipeline.errors import blame, say_warning
from pipeline.files import write_text
from pipeline.model.export_folder import Prompts, TrainedTexts
from pipeline.model.servers import Windows, serving_table

_EVALUATION = "## Evaluation"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """The facts that a model card states.

    Attributes:
        config: attention, pooling and base model.
        template: how instructions and texts become strings.
        max_length: tokens after which a text is cut.
        adapter_only: the folder lacks the weights of the base model.
        family: `model_type` of the model.
        decoder: whether the model has a causal mask, which another program could leave on.
        windows: of a decoder's layers.
        plain_base: whether transformers alone loads the base model as it was trained.
        similarity: `cosine` or `dot`.
        texts: the prefixes that training saw.
        prompts: of queries and documents.
        recipe: YAML of the training run.
        step: number of optimizer steps.
        data: a Markdown table of the training data.
        checks: the result of the check by library; empty if nothing was checked.
    """

    config: ModelConfig
    template: Template
    max_length: int
    adapter_only: bool
    family: str
    decoder: bool
    windows: Windows
    plain_base: bool
    similarity: str
    texts: TrainedTexts
    prompts: Prompts
    lower_case: bool = False
    recipe: str | None = None
    step: int = 0
    data: str | None = None
    checks: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md of an export."""
    licence = _base_licence(facts.config)
    sections = [
        _summary(facts.config, facts.max_length),
        f"## Needs\n\n{_needs(facts)}",
        f"## Use\n\n{_usage(facts)}",
        f"## Prompts\n\n{_prompts(facts)}",
    ]
    if not facts.adapter_only:
        table = serving_table(
            facts.config,
            family=facts.family,
            decoder=facts.decoder,
            similarity=facts.similarity,
            windows=facts.windows,
        )
        sections.append(f"## Serve\n\n{table}")
    if facts.checks:
        lines = [f"- {library}: {result}." for library, result in facts.checks.items()]
        sections.append("## Checked when it was written\n\n" + "\n".join(lines))
    sections.append(f"{_EVALUATION}\n\nNot evaluated yet.")
    if facts.data is not None:
        sections.append(f"## Training data\n\n{facts.data}")
    sections.append(f"## Licence\n\n{_licence_text(facts.config, licence)}")
    if facts.recipe is not None:
        state = f"after {facts.step} optimizer steps" if facts.step else "before training"
        sections.append(
            f"## Recipe\n\nThese weights are the run {state}:\n\n```yaml\n"
            f"{facts.recipe.strip()}\n```"
        )
    # ModelCard parses the header again, so a value that YAML would misread fails here.
    header = _header(facts, licence).to_yaml()
    body = "\n\n".join(sections)
    write_text(folder / "README.md", str(ModelCard(f"---\n{header}\n---\n\n{body}\n")))


def _header(facts: CardFacts, licence: Mapping[str, Any]) -> ModelCardData:
    library = "peft" if facts.adapter_only else "sentence-transformers"
    path = facts.config.path
    return ModelCardData(
        library_name=library,
        pipeline_tag="sentence-similarity",
        tags=[library, "feature-extraction", "diffembed"],
        # The path of a folder would mean nothing to others.
        base_model=None if Path(path).exists() else path,
        **licence,
    )


def add_evaluation(folder: Path, table: str, *, name: str, results: Sequence[EvalResult]) -> None:
    """Put scores into the card of an export, in the place of earlier ones.

    Args:
        folder: the export.
        table: of scores, in Markdown.
        name: of the model in the evaluation.
        results: the same scores for the header, where the hub looks for them.

    Raises:
        UserError: the card is damaged.
    """
    path = folder / "README.md"
    with blame(f"{path}: the scores are not in it", fix=f"delete it, or export {folder} again"):
        card = ModelCard.load(path, ignore_metadata_errors=True)
    before, found, after = card.text.partition(f"{_EVALUATION}\n")
    if found:  # not where the reader has removed that section
        _, heading, rest = after.partition("\n## ")
        card.text = f"{before}{_EVALUATION}\n\n{table.strip()}\n{heading}{rest}"
        # The hub shows these as `model-index`.
        card.data["model_name"], card.data["eval_results"] = name, list(results)
        write_text(path, str(card))


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


# The attention kernels of families that lack the usual ones.
_KERNELS = {"gemma2": "Attention `eager` (the default; there is no `sdpa`)"}


def _needs(facts: CardFacts) -> str:
    """Return what must be installed to get these vectors."""
    if facts.adapter_only and not facts.plain_base:
        return (
            "The base model and `diffembed`: transformers alone does not load that base as the "
            "model that was trained. A merged export needs neither."
        )
    if facts.adapter_only:
        return (
            "The base model, `peft`, and the code below, which also sets the attention: an adapter "
            "alone has no file to hold it."
        )
    if not facts.decoder or facts.config.attention == "causal":
        return "Any version of transformers that knows the model type in config.json."
    return (
        "`transformers >= 5.17`: earlier versions ignore `is_causal` in config.json and would "
        "silently mask the future. "
        f"{_KERNELS.get(facts.family, 'Attention `sdpa` (the default) or `eager`')}: "
        "`flash_attention_2` goes by the causal flag of the attention modules instead. "
        "No remote code."
    )


def _usage(facts: CardFacts) -> str:
    """Return code for each library that loads the export, with the prompts of training."""
    if facts.adapter_only and not facts.plain_base:
        return _own_usage(facts.template, facts.prompts)
    plain = _transformers_usage(facts)
    if facts.adapter_only:
        return plain
    usage = _sentence_transformers_usage(facts.template, facts.prompts)
    return f"{usage}\n\nWith transformers alone:\n\n{plain}"


def _sentence_transformers_usage(template: Template, prompts: Prompts) -> str:
    query, document = prompts.example, prompts.document
    queries, documents = (
        f"[{prompt.space + '...' + suffix!r}]"
        + (f", prompt={prompt.prefix!r}" * bool(prompt.prefix))
        for prompt, suffix in (
            (query, template.query_suffix()),
            (document, template.document_suffix()),
        )
    )
    notes = ""
    if query.space or document.space:
        notes += "\n\nThe space between prompt and text belongs to the text, as here."
    if template.query_suffix() or template.document_suffix():
        notes += (
            "\n\nThe template's words after a text are part of the text, as here. Training kept "
            "them when it cut a text; sentence-transformers cuts them off: keep texts below the "
            "limit."
        )
    return f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries = model.encode({queries})
documents = model.encode({documents})
scores = model.similarity(queries, documents)
```{notes}"""


def _own_usage(template: Template, prompts: Prompts) -> str:
    """Return code for an adapter whose base only this package loads."""
    frames = (
        (prompts.example, template.query_suffix()),
        (prompts.document, template.document_suffix()),
    )
    queries, documents = (
        f"prefix={prompt.prefix + prompt.space!r}" + (f", suffix={suffix!r}" if suffix else "")
        for prompt, suffix in frames
    )
    return f"""```python
from pipeline.model.load_export import load_export

model = load_export("PATH")
queries = model.encode_texts(["..."], {queries})
documents = model.encode_texts(["..."], {documents})
scores = queries @ documents.T
```"""


# As one line of the card's code: mask and places (1, 2, ... in each row) are (C, L, 1), hidden is
# (C, L, D). Padding is on the right, as an exported tokenizer pads.
_POOLING_CODE = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "weighted_mean": "(hidden * (w := mask * places)).sum(1) / w.sum(1)",
    "last_token": "hidden[range(len(hidden)), batch.attention_mask.sum(1) - 1]",
    "first_token": "hidden[range(len(hidden)), mask[..., 0].float().argmax(1)]",
}
_LOADING = """from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("PATH")"""
_ADAPTER_LOADING = """from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoTokenizer

config = AutoConfig.from_pretrained("{base}"{revision})
config.is_causal = {causal}
base = AutoModel.from_pretrained("{base}", config=config{revision})
model = PeftModel.from_pretrained(base, "PATH")"""


def _transformers_usage(facts: CardFacts) -> str:
    # `outside_program` finds this code on the card by its words, edits some and runs it.
    config, prompt, suffix = facts.config, facts.prompts.example, facts.template.query_suffix()
    loading = _ADAPTER_LOADING if facts.adapter_only else _LOADING
    loading = loading.format(
        base=config.path,
        causal=config.attention == "causal",
        revision=f", revision={config.revision!r}" if config.revision else "",
    )
    offsets, skip = "", ""
    if not config.pool_instruction:
        offsets = ", return_offsets_mapping=True"
        # Keep every token from the first one on that ends after the prompt. By a running sum,
        # because special tokens after the text, which are pooled, have the offset (0, 0).
        skip = """
ends = batch.pop("offset_mapping")[..., 1]
mask = mask * ((ends > len(prompt)).cumsum(1) > 0)[..., None]"""
    places = "\nplaces = batch.attention_mask.cumsum(1)[..., None]"
    cut = f"\nvectors = vectors[:, :{config.dimensions}]" if config.dimensions else ""
    normalise = "\nvectors = torch.nn.functional.normalize(vectors)" if config.normalize else ""
    return f"""```python
import torch
{loading}
tokenizer = AutoTokenizer.from_pretrained("PATH")
prompt, texts = {prompt.prefix!r}, [{prompt.space + "..." + suffix!r}]
strings = [{"(prompt + text).lower()" if facts.lower_case else "prompt + text"} for text in texts]
batch = tokenizer(strings, padding=True, truncation=True, return_tensors="pt"{offsets})
mask = batch.attention_mask[..., None]{places if config.pooling == "weighted_mean" else ""}{skip}
hidden = model.eval()(**batch).last_hidden_state.float()
vectors = {_POOLING_CODE[config.pooling]}{cut}{normalise}
```"""


# Instructions that a card lists, at most.
_MOST_INSTRUCTIONS = 20


def _prompts(facts: CardFacts) -> str:
    """Describe the prefixes of training, and which of them the folder stores."""
    texts, template = facts.texts, facts.template
    if texts.instruction is None:
        queries = _instruction_table(texts.instructions)
    elif prefix := template.query_prefix(texts.instruction):
        queries = f"All queries started with {prefix!r} in training."
        if not facts.adapter_only:
            space = facts.prompts.query.space
            queries += ' `encode_query` and `prompt_name="query"` write it'
            queries += ", up to the space that belongs to the text." if space else "."
    else:
        queries = "Queries had no instruction in training: embed them unchanged."
    prefixes = texts.document_prefixes or {template.document_prefix(): 0}
    if list(prefixes) == [""]:
        return f"{queries}\n\nDocuments had no prompt."
    listed = ", ".join(f"{prefix!r}" if prefix else "nothing" for prefix in prefixes)
    return f"{queries}\n\nDocuments started with {listed}."


def _instruction_table(counts: Mapping[str, int]) -> str:
    """List the most frequent instructions of training."""
    listed = sorted(counts.items(), key=lambda item: -item[1])
    lines = [
        f"Queries had {len(counts)} instructions in training. `prompts` in "
        "config_sentence_transformers.json names none of them, so `encode_query` writes none: "
        "give the one that fits your task as `prompt`, in the form above.\n",
        "| instruction | queries |",
        "|---|---|",
        *(f"| {_cell(text)} | {count:,} |" for text, count in listed[:_MOST_INSTRUCTIONS]),
    ]
    if (left := len(listed) - _MOST_INSTRUCTIONS) > 0:
        lines.append(f"\n{left:,} more.")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Escape a text for one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ") or "(none)"


# The values of `license` that the hub accepts (hf.co/docs/hub/repositories-licenses); it refuses a
# card with any other, and its client does not know them.
_HUB_LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0",
    "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license",
    "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
    "grok2-community", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c",
    "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openmdw-1.0", "openrail",
    "openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl",
    "zlib",
}  # fmt: skip


def _base_licence(config: ModelConfig) -> dict[str, Any]:
    """Return the licence keys for the card of a model made from this base; none if unknown.

    A base card that cannot be read is reported on standard error; the export is still written.
    """
    local = Path(config.path)
    source = local / "README.md" if local.is_dir() else config.path
    if local.is_dir() and not source.exists():  # type: ignore[union-attr]
        return {}
    try:
        data = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
        return licence_keys(data)
    except (OSError, HfHubHTTPError):
        return {}  # the hub cannot be reached
    except (ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say_warning(
            f"the model card of {config.path} cannot be read ({reason}); the export's card names "
            "no licence"
        )
        return {}


def licence_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `license`, `license_name` and `license_link` as the hub accepts them.

    Args:
        data: the header of the base model's card.
    """
    found = data.get("license")
    # The hub's own field is a word or a list of words; older cards hold free text.
    words = [str(word) for word in (found if isinstance(found, list) else [found]) if word]
    ids = [slug if (slug := _slug(word)) in _HUB_LICENCES else None for word in words]
    name, link = data.get("license_name"), data.get("license_link")
    given = {"license_name": name, "license_link": link}
    kept = {key: str(value) for key, value in given.items() if value}
    if not words and not kept:
        return {}
    # One unknown licence makes the whole field "other": the hub takes no list with it.
    if words and None not in ids:
        return {"license": ids[0] if len(ids) == 1 else ids, **kept}
    return {"license": "other", "license_name": _slug(" ".join(words) or "unnamed"), **kept}


def _licence_text(config: ModelConfig, licence: Mapping[str, Any]) -> str:
    name = Path(config.path).name
    if not licence:
        return (
            f"The card of the base model, {name}, was not available, so its licence is not known "
            "here; the training data have their own licences."
        )
    found = licence.get("license_name") or licence["license"]
    words = " and ".join(f"`{word}`" for word in ([found] if isinstance(found, str) else found))
    return f"The base model, {name}, is under {words}; the training data have their own licences."


def _slug(word: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", word.lower()).strip("-")
