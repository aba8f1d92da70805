"""One way to load a tokenizer, for preparing data, for exports and for evaluation; no torch."""

from __future__ import annotations

from typing import Any

from pipeline.errors import UserError


def load_tokenizer(path: str) -> Any:
    """Load a Hugging Face tokenizer folder or hub name, never running code that comes with it.

    Raises:
        UserError: nothing there that transformers can read by itself.
    """
    # Inside, because importing transformers takes seconds.
    from transformers import AutoTokenizer, PretrainedConfig, Qwen2Tokenizer

    # Dream's tokenizer is remote code around Qwen2's files.
    native = {"Dream": Qwen2Tokenizer}
    try:
        model_type = PretrainedConfig.get_config_dict(path)[0].get("model_type", "")
    except OSError:
        model_type = ""  # a tokenizer without a model
    kind = native.get(model_type, AutoTokenizer)
    try:
        return kind.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"tokenizer: cannot load {path!r} ({reason})",
            allowed="a folder with tokenizer.json, or a model name in the local cache",
        ) from error
