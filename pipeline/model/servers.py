"""Describe which programs serve a merged export, and with which settings.

vLLM 0.32 (tests/tools/served_by_vllm.py) and infinity 0.0.78 were run on a CPU with small models of
each family; facts about text-embeddings-inference were read from its source (1.9). None was run on
a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Layers in which a token sees nearby tokens only.

    Attributes:
        size: as in config.json; None if no layer has a window.
        mixed: other layers have none.
    """

    size: int | None = None
    mixed: bool = False

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> Windows:
        """Read config.json."""
        # Families without a list of types, such as Mistral, have the window in every layer.
        kinds = set(hf_config.get("layer_types") or ("sliding_attention",))
        size = hf_config.get("sliding_window")
        if size is None or "sliding_attention" not in kinds:
            return cls()
        return cls(size=int(size), mixed=len(kinds) > 1)


# By model_type of decoders: whether a key of config.json switches the server's causal mask off.
# Models that are not listed are not served, or untried.
_VLLM = {
    **dict.fromkeys(("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3_text"), True),
    **dict.fromkeys(("gemma", "gemma2", "gpt2", "olmo2", "smollm3"), False),
}
_VLLM_ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert", "eurobert")
# By model_type of decoders: whether it honours `is_causal` itself. For the others another key is
# needed.
_TEI = {"qwen2": True, **dict.fromkeys(("llama", "mistral", "qwen3", "gemma3_text"), False)}
_TEI_ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")


def serving_table(
    config: ModelConfig,
    *,
    family: str,
    decoder: bool,
    similarity: str,
    windows: Windows,
) -> str:
    """Return a Markdown table: which program serves a merged export, and with which settings.

    Args:
        config: attention, pooling and normalisation.
        family: `model_type` of the export's config.json.
        decoder: whether that family masks the future by default.
        similarity: `cosine` or `dot`.
        windows: of a decoder's layers.
    """
    bidirectional = decoder and config.attention == "bidirectional"
    # torch's SDPA cannot cap scores, as Gemma 2 does.
    kinds = "`eager`" if family == "gemma2" else "`sdpa` or `eager`"
    attention = f"`transformers >= 5.17`, attention {kinds}" if bidirectional else ""
    rows = [
        ("sentence-transformers", "yes", attention),
        ("transformers", "yes", f"the code above{'; ' * bidirectional}{attention}"),
        ("vLLM", *_vllm(config, family, bidirectional, windows)),
        ("text-embeddings-inference", *_tei(config, family, decoder, bidirectional)),
        ("infinity", *_infinity(bidirectional, similarity)),
    ]
    # Both notes are about silent errors: wrong vectors without a message.
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
        "\nServers put no prompt before a text unless the request names one: send each text with "
        "its prompt. vLLM 0.32 and infinity 0.0.78 were run on a CPU with small models; the row "
        "about text-embeddings-inference was read from its source (1.9)."
    )
    return "\n".join(lines)


def _vllm(
    config: ModelConfig, family: str, bidirectional: bool, windows: Windows
) -> tuple[str, str]:
    if family not in (*_VLLM, *_VLLM_ENCODERS):
        return "untried", "not among the embedding models it names"
    if bidirectional and not _VLLM[family]:
        return "**no**", f"its {family} ignores `is_causal`: the future would be masked"
    if config.pooling == "weighted_mean":
        return "**no**", "it has no weighted mean"
    if not config.pool_instruction:
        return "**no**", "it would pool the instruction"
    if windows.mixed and family in ("qwen2", "qwen3"):
        return "**no**", "it refuses Qwen with a window in some of the layers"
    how = ["`--runner pooling`; reads `1_Pooling`, `modules.json` and `max_seq_length`"]
    if bidirectional and family == "gemma3_text":
        # Its loader replaces `is_causal` by this key, with which transformers makes a window of 2 n
        # one of n + 1; vLLM's two-sided windows end one token earlier than ours.
        size = f' and `"sliding_window": {2 * windows.size}`' if windows.size else ""
        how.append(
            f'**set `"use_bidirectional_attention": true`{size} in a copy of config.json**, or it '
            "masks the future"
        )
    elif bidirectional:
        how.append("honours `is_causal: false`")
        if windows.size:
            how.append(
                f'for texts longer than {windows.size} tokens, set `"sliding_window": '
                f"{windows.size + 1}` in a copy of config.json: its window ends one token earlier"
            )
    return "yes", "; ".join(how)


def _tei(config: ModelConfig, family: str, decoder: bool, bidirectional: bool) -> tuple[str, str]:
    if family not in (*_TEI, *_TEI_ENCODERS):
        return "**no**", f"it has no {family}"
    if config.pooling == "weighted_mean":
        return "**no**", "it has no weighted mean, and reports that"
    if not config.pool_instruction:
        return "**no**", "it would pool the instruction"
    if config.rope_scaling is not None:
        return "untried", "rescaled positions"
    how = ["a GPU with flash attention, `--dtype float16`"] if decoder else []
    if bidirectional and not _TEI[family]:
        how.append(
            '**add `"use_bidirectional_attention": true` to a copy of config.json**, or it masks '
            "the future"
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
