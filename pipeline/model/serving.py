"""Which programs serve an export, with which keys: the table on its card.

Facts about servers are those of their sources in July 2026 (text-embeddings-inference 1.9, vLLM
0.33, infinity 0.0.78); none of them was run with weights on a GPU.
"""

from __future__ import annotations

from pipeline.config import ModelConfig

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
