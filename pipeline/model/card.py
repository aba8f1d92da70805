"""Write the model card of an export.

Facts about servers are those of their sources in July 2026 (text-embeddings-inference 1.9, vLLM
0.33, infinity 0.0.78); none of them was run with weights on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from pipeline.config import ModelConfig, Template
from pipeline.errors import blame, say_warning
from pipeline.files import write_text
from pipeline.model.export_folder import Prompt, Prompts, TrainedTexts

# What `license` may say on the hub (hf.co/docs/hub/repositories-licenses); it refuses other words.
HUB_LICENCES = {
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


def base_licence(config: ModelConfig) -> dict[str, Any]:
    """Return the licence keys for the card of a model made from this base; none where unknown.

    A card that cannot be read is no reason to lose an export: it is named on standard error.
    """
    local = Path(config.path)
    source = local / "README.md" if local.is_dir() else config.path
    if local.is_dir() and not source.exists():  # type: ignore[union-attr]
        return {}
    try:
        data = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
        return licence_keys(data)
    except (OSError, HfHubHTTPError):
        return {}  # the hub is out of reach
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
    words = [str(word) for word in (found if isinstance(found, list) else [found]) if word]
    ids = [_hub_id(word) for word in words]
    name, link = data.get("license_name"), data.get("license_link")
    given = {"license_name": name, "license_link": link}
    kept = {key: str(value) for key, value in given.items() if value}
    if not words and not kept:
        return {}
    if words and None not in ids:
        return {"license": ids[0] if len(ids) == 1 else ids, **kept}
    return {"license": "other", "license_name": _slug(" ".join(words) or "unnamed"), **kept}


def licence_words(keys: Mapping[str, Any]) -> str:
    """Return the licence as a reader would name it."""
    found = keys.get("license_name") or keys["license"]
    return " and ".join(f"`{word}`" for word in ([found] if isinstance(found, str) else found))


def _hub_id(word: str) -> str | None:
    slug = _slug(word)
    return slug if slug in HUB_LICENCES else None


def _slug(word: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", word.lower()).strip("-")


# model_type -> whether the server sees that config.json switches the causal mask off. Those it
# lacks are not served, or untried.
_VLLM = {
    **dict.fromkeys(("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3_text"), True),
    **dict.fromkeys(("gemma", "gemma2", "gpt2"), False),
}
_VLLM_ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")
_TEI = {"qwen2": True, **dict.fromkeys(("llama", "mistral", "qwen3", "gemma3_text"), False)}
_TEI_ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")


def serving_table(config: ModelConfig, *, family: str, decoder: bool, similarity: str) -> str:
    """Return the Markdown section of a merged export.

    Args:
        config: attention, pooling and normalisation.
        family: `model_type` of the export's config.json.
        decoder: whether that family masks the future unless told otherwise.
        similarity: `cosine` or `dot`.
    """
    bidirectional = decoder and config.attention == "bidirectional"
    kinds = "`eager`" if family == "gemma2" else "`sdpa` or `eager`"
    attention = f"`transformers >= 5.17`, attention {kinds}" if bidirectional else ""
    rows = [
        ("sentence-transformers", "yes", attention),
        ("transformers", "yes", f"the code above{'; ' * bidirectional}{attention}"),
        ("vLLM", *_vllm(config, family, decoder, bidirectional)),
        ("text-embeddings-inference", *_tei(config, family, decoder, bidirectional, similarity)),
        ("infinity", *_infinity(bidirectional, similarity)),
    ]
    lines = ["| program | serves it | with |", "|---|---|---|"]
    lines += [f"| {name} | {verdict} | {how or '-'} |" for name, verdict, how in rows]
    if bidirectional:
        lines.insert(
            0,
            "This decoder attends in both directions. **A program that ignores `is_causal: false` "
            "in config.json masks the future without an error and returns other vectors**: compare "
            "a few with sentence-transformers before you rely on a server.\n",
        )
    lines.append(
        "\nServers put no prompt before a text unless they are asked to: send each text with its "
        "prompt. What the table says of servers was read from their sources (vLLM 0.33, "
        "text-embeddings-inference 1.9, infinity 0.0.78), not run."
    )
    return "\n".join(lines)


def _vllm(config: ModelConfig, family: str, decoder: bool, bidirectional: bool) -> tuple[str, str]:
    if family not in (*_VLLM, *_VLLM_ENCODERS):
        return "untried", "not among the embedding models it names"
    if bidirectional and not _VLLM[family]:
        return "**no**", f"its {family} ignores `is_causal`: the future would be masked"
    if config.pooling == "weighted_mean":
        return "**no**", "it has no weighted mean"
    if not config.pool_instruction:
        return "**no**", "it would pool the instruction"
    how = "`--runner pooling`; reads `1_Pooling`, `modules.json` and `max_seq_length`"
    return "yes", how + ("; honours `is_causal: false`" if bidirectional else "")


def _tei(
    config: ModelConfig, family: str, decoder: bool, bidirectional: bool, similarity: str
) -> tuple[str, str]:
    if family not in (*_TEI, *_TEI_ENCODERS):
        return "**no**", f"it has no {family}"
    if config.pooling == "weighted_mean":
        return "**no**", "it has no weighted mean, and says so"
    if not config.pool_instruction:
        return "**no**", "it would pool the instruction"
    if config.rope_scaling is not None:
        return "untried", "rescaled positions"
    how = ["a GPU with flash attention, `--dtype float16`"] if decoder else []
    if bidirectional and not _TEI[family]:
        how.append(
            '**add `"use_bidirectional_attention": true` to a copy of config.json**, by which it '
            "knows, or it masks the future"
        )
    elif bidirectional:
        how.append("honours `is_causal: false`")
    how.append("`prompt_name` of a request, or `--default-prompt-name`")
    if not config.normalize:
        how.append('`"normalize": false` in each request')
    return "yes", "; ".join(how)


def _infinity(bidirectional: bool, similarity: str) -> tuple[str, str]:
    if bidirectional:
        return (
            "**no**",
            "it needs sentence-transformers < 4, whose transformers ignores `is_causal`",
        )
    if similarity == "dot":
        return "**no**", "it always normalises vectors"
    return "yes", "`--engine torch`; it knows no prompts"


_EVALUATION = "## Evaluation"
_POOLING_CODE = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "weighted_mean": "(hidden * (w := mask * places)).sum(1) / w.sum(1)",
    "last_token": "hidden[range(len(hidden)), batch.attention_mask.sum(1) - 1]",
    "first_token": "hidden[range(len(hidden)), mask[..., 0].float().argmax(1)]",
}
# Attention that transformers has for a family, where it is not the usual.
_KERNELS = {"gemma2": "Attention `eager` (the default; there is no `sdpa`)"}
# Instructions that a card lists.
_MOST_INSTRUCTIONS = 20


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
        facts: `texts` (`TrainedTexts`), `prompts` (`Prompts`), `family` (its model_type),
            `similarity`, `decoder` (whether the model has a causal mask that could be on by
            mistake), `plain_base` (whether transformers alone loads the base model as the one that
            was trained); optionally `recipe` (YAML of the training run), `step`, `data` (a Markdown
            table), `checks` (what was found, by library).
    """
    licence = base_licence(config)
    parts = [_header(config, licence, adapter_only), _summary(config, max_length)]
    parts.append(f"## Needs\n\n{_needs(config, adapter_only, facts)}")
    parts.append(f"## Use\n\n{_usage(config, template, adapter_only, facts)}")
    parts.append(f"## Prompts\n\n{_prompts(template, facts, adapter_only)}")
    if not adapter_only:
        table = serving_table(
            config,
            family=facts["family"],
            decoder=facts["decoder"],
            similarity=facts["similarity"],
        )
        parts.append(f"## Serve\n\n{table}")
    if facts.get("checks"):
        lines = [f"- {library}: {found}." for library, found in facts["checks"].items()]
        parts.append("## Checked when it was written\n\n" + "\n".join(lines))
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
    with blame(f"{path}: the scores are not in it", fix=f"delete it, or export {folder} again"):
        before, found, after = path.read_text(encoding="utf-8").partition(f"{_EVALUATION}\n")
    if found:
        _, heading, rest = after.partition("\n## ")
        write_text(path, f"{before}{_EVALUATION}\n\n{table.strip()}\n{heading}{rest}")


def _header(config: ModelConfig, licence: Mapping[str, Any], adapter_only: bool) -> str:
    library = "peft" if adapter_only else "sentence-transformers"
    tree: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "sentence-similarity",
        "tags": [library, "feature-extraction", "diffembed"],
    }
    tree.update(licence)
    if not Path(config.path).exists():  # a name on the hub
        tree["base_model"] = config.path
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}---"


def _licence_text(config: ModelConfig, licence: Mapping[str, Any]) -> str:
    name = Path(config.path).name
    if not licence:
        return f"That of the base model, {name}, whose card was not at hand, and of the data."
    words = licence_words(licence)
    return f"The base model, {name}, is under {words}; the data have licences of their own."


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
        "silently mask the future. "
        f"{_KERNELS.get(facts['family'], 'Attention `sdpa` (the default) or `eager`')}: "
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


def _usage(
    config: ModelConfig, template: Template, adapter_only: bool, facts: Mapping[str, Any]
) -> str:
    """Code for each library that loads the export, with the prompts of training."""
    prompts, suffix = facts["prompts"], template.query_suffix()
    if adapter_only and not facts["plain_base"]:
        return _own_usage(template, prompts)
    loading = _ADAPTER_LOADING if adapter_only else _LOADING
    plain = _transformers_usage(config, loading, prompts, suffix)
    if adapter_only:
        return plain
    usage = _sentence_transformers_usage(config, template, prompts)
    return f"{usage}\n\nWith transformers alone:\n\n{plain}"


def _sentence_transformers_usage(config: ModelConfig, template: Template, prompts: Prompts) -> str:
    query, document = prompts.example, prompts.document
    queries, documents = (
        f"[{prompt.joint + '...' + suffix!r}]"
        + (f", prompt={prompt.before!r}" * bool(prompt.before))
        for prompt, suffix in (
            (query, template.query_suffix()),
            (document, template.document_suffix()),
        )
    )
    notes = ""
    if query.joint or document.joint:
        notes += "\n\nThe space between prompt and text belongs to the text, as here."
    if template.query_suffix() or template.document_suffix():
        notes += (
            "\n\nWhat stands behind a text belongs to it, as here. In training it was kept when a "
            "text was cut; sentence-transformers cuts it off: keep texts short of the limit."
        )
    return f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries = model.encode({queries})
documents = model.encode({documents})
scores = model.similarity(queries, documents)
```{notes}"""


def _prompts(template: Template, facts: Mapping[str, Any], adapter_only: bool) -> str:
    """What training put before queries and documents, and what of it the folder stores."""
    texts: TrainedTexts = facts["texts"]
    query: Prompt = facts["prompts"].query
    instruction, counts = texts.instruction, texts.instructions
    if instruction is None:
        listed = sorted(counts.items(), key=lambda item: -item[1])
        lines = [
            f"Queries had {len(counts)} instructions in training. `prompts` in "
            "config_sentence_transformers.json names none of them, so `encode_query` writes none: "
            "give the one that fits your task as `prompt`, in the form above.\n",
            "| instruction | queries |",
            "|---|---|",
            *(f"| {_cell(text)} | {count:,} |" for text, count in listed[:_MOST_INSTRUCTIONS]),
        ]
        if left := len(listed) - _MOST_INSTRUCTIONS:
            lines += [f"\n{left:,} more."] if left > 0 else []
        text = "\n".join(lines)
    elif prefix := template.query_prefix(instruction):
        text = f"All queries began with {prefix!r} in training."
        if not adapter_only:
            text += ' `encode_query` and `prompt_name="query"` write it'
            text += ", up to the space that belongs to the text." if query.joint else "."
    else:
        text = "Queries had no instruction in training: embed them as they are."
    prefixes = texts.document_prefixes or {template.document_prefix(): 0}
    if list(prefixes) == [""]:
        return f"{text}\n\nDocuments had no prompt."
    told = ", ".join(f"{prefix!r}" if prefix else "nothing" for prefix in prefixes)
    return f"{text}\n\nDocuments began with {told}."


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ") or "(none)"


def _own_usage(template: Template, prompts: Prompts) -> str:
    frames = (
        (prompts.example, template.query_suffix()),
        (prompts.document, template.document_suffix()),
    )
    queries, documents = (
        f"prefix={prompt.before + prompt.joint!r}" + (f", suffix={suffix!r}" if suffix else "")
        for prompt, suffix in frames
    )
    return f"""```python
from pipeline.model.load_export import load_export

model = load_export("PATH")
queries = model.encode_texts(["..."], {queries})
documents = model.encode_texts(["..."], {documents})
scores = queries @ documents.T
```"""


_LOADING = """from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("PATH")"""
_ADAPTER_LOADING = """from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoTokenizer

config = AutoConfig.from_pretrained("{base}")
config.is_causal = {causal}
model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}", config=config), "PATH")"""


def _transformers_usage(config: ModelConfig, loading: str, prompts: Prompts, suffix: str) -> str:
    prompt = prompts.example
    loading = loading.format(base=config.path, causal=config.attention == "causal")
    offsets, skip = "", ""
    if not config.pool_instruction:
        offsets = ", return_offsets_mapping=True"
        # Tokens from the first that ends behind the prompt on.
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
prompt, texts = {prompt.before!r}, [{prompt.joint + "..." + suffix!r}]
strings = [prompt + text for text in texts]
batch = tokenizer(strings, padding=True, truncation=True, return_tensors="pt"{offsets})
mask = batch.attention_mask[..., None]{places if config.pooling == "weighted_mean" else ""}{skip}
hidden = model.eval()(**batch).last_hidden_state.float()
vectors = {_POOLING_CODE[config.pooling]}{cut}{normalise}
```"""
