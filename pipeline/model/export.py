"""Write an encoder as a folder that transformers and sentence-transformers load without us.

The round trip: an export takes its place only after other programs have reproduced its vectors.

    trained encoder --- write ---> .NAME.PID.tmp/ --- load ---> a process without this package
          |                              |                      (export_check, outside_program):
          |                              |                      sentence-transformers, and the
          | a ragged batch, float32      |                      code of the card for transformers
          v                              |                                  |
       ours (N, D)  <----- equal within a thousandth of their length -----> theirs (N, D)
                                         |
                    equal: renamed to NAME; otherwise one error line, and an earlier NAME stays
                                         |
                                       NAME/ --- load_export ---> evaluate, encode

The folder needs no remote code: names of published code are dropped, a decoder's attention is
written as `is_causal`, and rotary positions are written in the old form as well as in the new one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tokenizers import processors

from pipeline.config import ModelConfig, Template, as_tree
from pipeline.errors import UserError, say_warning
from pipeline.files import write_json
from pipeline.model.backbones import has_other_names, read_config
from pipeline.model.card import CardFacts, write_card
from pipeline.model.encoder import Encoder
from pipeline.model.export_check import (
    NOT_CHECKED,
    OutsideProcess,
    available_bytes,
    check_vectors,
)
from pipeline.model.export_folder import (
    SETTINGS,
    Prompts,
    TrainedTexts,
    check_replaceable,
    is_export,
    replace_folder,
    write_sentence_transformers_files,
)
from pipeline.model.load_export import LoadedExport
from pipeline.model.servers import Windows
from pipeline.model_limits import limits_of
from pipeline.tokenizer import load_tokenizer, lower_casing_file


class TokenizerSource(Protocol):
    """The tokenizer of the training data, as a manifest records it."""

    @property
    def path(self) -> str:
        """Folder or hub name."""

    @property
    def append_eos(self) -> bool:
        """True if texts got an end-of-sequence token."""


def export_encoder(
    encoder: Encoder,
    *,
    config: ModelConfig,
    tokenizer: TokenizerSource,
    template: Template,
    max_length: int,
    output_dir: Path,
    card: Mapping[str, Any],
    texts: TrainedTexts | None = None,
    similarity: Literal["cosine", "dot"] = "cosine",
    adapter_only: bool = False,
    outside: OutsideProcess | None = None,
) -> Path:
    """Write weights, tokenizer, pooling, prompts and model card.

    The attention is written as `is_causal` into config.json, which decoders of transformers honour,
    so a bidirectional model needs no remote code. An adapter alone has no config.json to hold it:
    its folder is for peft and for `load_export`, and its card shows how to take the mask off.

    Args:
        encoder: whole weights on one process; unless `adapter_only`, adapters are merged in place.
            A checked encoder is left in float32.
        config: the model section that the encoder was built from.
        tokenizer: the tokenizer of the training data.
        template: how instructions and texts become strings.
        max_length: tokens after which a text is cut; fewer where the model has fewer positions.
        output_dir: the folder to write; an earlier export there is replaced.
        card: facts of the run for card and settings: `recipe` (YAML), `step`, `checkpoint` (its
            digest), `data` (a Markdown table).
        texts: the prefixes that training saw; none if not given.
        similarity: how vectors were compared in training.
        adapter_only: write the adapter without the weights of its base model.
        outside: a process that loads the folder as others will; None: the vectors are not checked.

    Raises:
        UserError: `output_dir` holds something that is not an export, the tokenizer is missing, the
            model needs its own code, there is no adapter to write, or other libraries give
            other vectors.
    """
    _check_form(config, adapter_only)
    texts = texts or TrainedTexts()
    hf_config = encoder.model.config.to_dict()
    limits = limits_of(hf_config)
    max_length = limits.cut_length(max_length, where="the export")
    model = LoadedExport(
        encoder=encoder,
        tokenizer=tokenizer_to_write(
            tokenizer.path,
            appends_eos=tokenizer.append_eos,
            max_length=max_length,
            num_embeddings=int(encoder.model.config.vocab_size),
        ),
        template=template,
        similarity="cosine" if config.normalize else similarity,  # of unit vectors they are equal
        max_length=max_length,
        limits=limits,
        num_dimensions=encoder.num_dimensions,
    )
    facts = CardFacts(
        config=config,
        template=template,
        max_length=max_length,
        adapter_only=adapter_only,
        family=encoder.model.config.model_type,
        decoder=encoder.family.decoder,
        windows=Windows.of(hf_config),
        plain_base=_is_plain(encoder, config),
        similarity=model.similarity,
        texts=texts,
        prompts=Prompts.of(template, texts, pooled=config.pool_instruction),
        lower_case=lower_casing_file(tokenizer.path) is not None,
        recipe=card.get("recipe"),
        step=card.get("step", 0),
        data=card.get("data"),
    )
    check_output(output_dir)
    with replace_folder(output_dir) as folder:
        _write_files(folder, model, facts, run={"step": None, "checkpoint": None, **card})
        write_card(folder, facts)  # before the check, which runs the card's code
        if outside is not None:
            checks = _check(outside, folder, model, facts)
            write_card(folder, dataclasses.replace(facts, checks=checks))
    return output_dir


def _check_form(config: ModelConfig, adapter_only: bool) -> None:
    """Refuse an adapter that does not exist, and a merged model that only its own code loads."""
    if adapter_only:
        if config.lora is None and config.adapter_use != "continue":
            raise UserError("adapter-only export of a run without adapter", fix="export it merged")
    elif config.trust_remote_code:
        raise UserError(
            f"merged export of {config.path}, whose code is not part of transformers",
            fix="train with model.lora and export the adapter alone",
        )


def _is_plain(encoder: Encoder, config: ModelConfig) -> bool:
    """Return True if transformers alone loads the base model as it was trained."""
    return (
        read_config(config)["model_type"] == encoder.model.config.model_type
        and not has_other_names(config)
        and not config.trust_remote_code
        and config.rope_scaling is None
        and not config.all_merged
    )


def _write_files(
    folder: Path, model: LoadedExport, facts: CardFacts, run: Mapping[str, Any]
) -> None:
    """Write everything but the card."""
    encoder = model.encoder
    if facts.adapter_only:
        encoder.save_adapter(folder)
    else:
        encoder.save_backbone(folder)
        finish_config(folder / "config.json")
        write_sentence_transformers_files(
            folder,
            width=encoder.model.config.hidden_size,
            config=facts.config,
            max_length=model.max_length,
            prompts=facts.prompts,
            similarity=model.similarity,
            lower_case=facts.lower_case,
        )
    model.tokenizer.save_pretrained(folder)
    write_json(
        folder / SETTINGS,
        {
            "version": 1,
            "template": as_tree(model.template),
            "max_length": model.max_length,
            "step": run["step"],
            "checkpoint": run["checkpoint"],
            "similarity": model.similarity,
            "model": as_tree(facts.config),
            # transformers loads most tokenizers without the rule for it in tokenizer.json.
            **({"do_lower_case": True} if facts.lower_case else {}),
        },
    )


# The keys of the two bases, of families with two kinds of layers, before transformers 5: of layers
# that see the whole text, then of layers with a window.
_TWO_BASES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}


def finish_config(path: Path) -> None:
    """Rewrite a saved config.json for readers without its code, and for older versions.

    The names of a published model's code are dropped, because the folder has no such code. Rotary
    positions are added in the form before transformers 5: earlier versions, and servers built on
    them, ignore `rope_parameters` and would silently rotate by the family's default base.
    """
    tree = json.loads(path.read_text())
    tree.pop("auto_map", None)
    if tree["model_type"] == "xlm-roberta":
        # transformers 5 no longer writes it, and vLLM 0.32 cannot start without it.
        tree.setdefault("position_embedding_type", "absolute")
    write_json(path, {**tree, **_old_rope_keys(tree)})


def _old_rope_keys(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that old readers look for instead of `rope_parameters`."""
    rope = hf_config.get("rope_parameters")
    if not rope:
        return {}
    kind = hf_config["model_type"]
    if kind in _TWO_BASES:
        full, window = rope["full_attention"], rope["sliding_attention"]
        bases = dict(zip(_TWO_BASES[kind], (full["rope_theta"], window["rope_theta"]), strict=True))
    else:
        full, bases = rope, {"rope_theta": rope["rope_theta"]}
    rest = {key: value for key, value in full.items() if key != "rope_theta"}
    if "partial_rotary_factor" in rest:
        bases["partial_rotary_factor"] = rest.pop("partial_rotary_factor")
    # ModernBERT never read `rope_scaling`; newer versions would rescale all of its layers by it.
    plain = rest.get("rope_type") == "default" or kind == "modernbert"
    return bases if plain else {**bases, "rope_scaling": rest}


# Tokens that vocabularies reserve for padding, for models that declare no padding token.
_PAD_NAMES = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",  # Llama 3.1 and later
    "<|endoftext|>",  # Qwen
)


def tokenizer_to_write(
    path: str, *, appends_eos: bool, max_length: int, num_embeddings: int
) -> Any:
    """Return the tokenizer of the training data, ready to be saved with a model.

    Raises:
        UserError: it has no EOS token although texts got one, or no token to pad with.
    """
    tokenizer = load_tokenizer(path)
    if appends_eos:
        append_eos(tokenizer)
    _give_pad_token(tokenizer, num_embeddings)
    # The folder has no code of the published model, and needs none.
    tokenizer.init_kwargs.pop("auto_map", None)
    # As the training data were made; the published tokenizer may declare another side.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = max_length
    # A setting of the published tokenizer.json would be saved with it.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def append_eos(tokenizer: Any) -> None:
    """Make a tokenizer end every text with its EOS, within the length it truncates to.

    Leaves a tokenizer alone that already does.

    Raises:
        UserError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token is None:
        raise UserError("tokenizer: it has no EOS token", fix="prepare with append_eos: false")
    ids, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    if ids[-1] == tokenizer.eos_token_id:
        return
    # One template for all special tokens: of two templates in a row the library applies only the
    # first. `start` is where the text's own tokens begin.
    start = next(k for k in range(len(ids)) if ids[k : k + len(bare)] == bare)
    before, after = ids[:start], [*ids[start + len(bare) :], tokenizer.eos_token_id]
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in (*before, *after)}
    template = processors.TemplateProcessing(
        single=[*(names[token] for token in before), "$A", *(names[token] for token in after)],
        special_tokens=[(name, token) for token, name in names.items()],
    )
    backend = tokenizer.backend_tokenizer
    # The old template is in the new one; only steps that change offsets are kept.
    kept = [processors.ByteLevel(**options) for options in _byte_level_options(backend)]
    backend.post_processor = processors.Sequence([*kept, template])


def _byte_level_options(backend: Any) -> list[dict[str, Any]]:
    """Return the options of post-processors that only change offsets; others add tokens."""
    tree = json.loads(backend.to_str())["post_processor"] or {}
    steps = tree.get("processors", [tree])
    return [
        {key: value for key, value in step.items() if key != "type"}
        for step in steps
        if step.get("type") == "ByteLevel"
    ]


def _give_pad_token(tokenizer: Any, num_embeddings: int) -> None:
    """Give a tokenizer without a padding token one that changes no text.

    A token reserved for padding if the vocabulary has one, otherwise EOS, BOS or the unknown token.
    It must be special already, or texts that contain it would get other ids; and it must have a row
    in the embedding, which is looked up before padding is masked.

    Raises:
        UserError: there is no such token.
    """
    special = {
        str(token)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number < num_embeddings
    }
    if str(tokenizer.pad_token) in special:
        return
    named = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    reserved = [name for name in _PAD_NAMES if name in special]
    for name in (*reserved, *named, *sorted(special)):
        if name in special:
            tokenizer.pad_token = name
            return
    raise UserError(
        f"tokenizer: {tokenizer.name_or_path} has no special token to pad a batch with",
        fix="give it an eos_token or a pad_token with a row in the model's embedding",
    )


def check_output(output_dir: Path) -> None:
    """Refuse a folder that an export could not replace, before any work for it.

    Raises:
        UserError: it holds something else, or cannot be written to.
    """
    check_replaceable(output_dir, key="--output", is_own=is_export, kind="an export")


# A ragged batch, so that faults of padding, truncation and word boundaries show in the vectors.
_CHECKED_TEXTS = (
    "amber",
    "The river is 31 km long; two bridges cross it.",
    "Naïve café, x = a * b. " * 40,
)
# Tokens. Of exports that take longer texts, cutting is not checked: it would take long on a CPU.
_LONGEST_CUT = 512
# Memory of the process that checks, without the weights: its libraries.
_LIBRARY_BYTES = 2**30


def _check(
    outside: OutsideProcess, folder: Path, model: LoadedExport, facts: CardFacts
) -> dict[str, str]:
    """Compare the vectors that others get from the folder with the trained encoder's.

    On the CPU and in float32, where equal models give equal vectors. That takes two float32 copies
    of the weights; where memory is short the export is written unchecked, with a warning.

    Returns:
        The result by library, for the card.
    """
    libraries = ["transformers"] if facts.plain_base or not facts.adapter_only else []
    libraries += [] if facts.adapter_only else ["sentence-transformers"]
    if not libraries:
        return {}
    encoder = model.encoder
    # 4 bytes a weight in this process, and as many in the other one.
    needed = 8 * sum(parameter.numel() for parameter in encoder.parameters()) + _LIBRARY_BYTES
    if needed > (free := available_bytes()):
        why = f"{NOT_CHECKED}: {needed / 2**30:.0f} GiB of memory needed, {free / 2**30:.0f} free"
        found = dict.fromkeys(libraries, why)
    else:
        batches, wanted = [], []
        stored = encoder.config.dtype
        encoder.float()  # in place: nothing uses the encoder after its export
        for batch, arguments in _batches(model, facts.prompts):
            batches.append(batch)
            wanted.append(model.encode_texts(*arguments))
        found = check_vectors(
            outside, folder, libraries=libraries, dtype=stored, batches=batches, wanted=wanted
        )
    for library, result in found.items():
        if result.startswith(NOT_CHECKED):
            say_warning(f"{library}: {result}")
        else:
            print(f"{library}: {result}", file=sys.stderr, flush=True)
    return found


def _batches(
    model: LoadedExport, prompts: Prompts
) -> Iterator[tuple[dict[str, Any], tuple[Sequence[str], str, str]]]:
    """Yield a batch of queries and one of documents.

    Each in the form of `OutsideProcess.embed`, and as arguments of `LoadedExport.encode_texts`.
    """
    query = (prompts.example, model.template.query_suffix(), prompts.example == prompts.query)
    document = (prompts.document, model.template.document_suffix(), True)
    for role, (prompt, suffix, stored) in {"query": query, "document": document}.items():
        # With a suffix vectors would rightly differ: other libraries cut it off with the text.
        can_cut = model.max_length <= _LONGEST_CUT and not suffix
        texts = _CHECKED_TEXTS if can_cut else _CHECKED_TEXTS[:-1]
        batch = {
            "role": role,
            "texts": [prompt.space + text + suffix for text in texts],
            "prompt": prompt.prefix,
            # By name where the folder stores this prompt, so that its storing is checked as well.
            "prompt_name": role if stored else None,
        }
        yield batch, (texts, prompt.prefix + prompt.space, suffix)
