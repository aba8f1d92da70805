"""Write an encoder as a folder that transformers and sentence-transformers load."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from tokenizers import processors

from pipeline.config import ModelConfig, Template, as_tree
from pipeline.errors import UserError, name_full_disk, say_warning
from pipeline.files import require_writable, sync_dir, write_json
from pipeline.model.backbones import read_config
from pipeline.model.card import write_card
from pipeline.model.encoder import Encoder
from pipeline.model.export_check import NOT_CHECKED, Outside, available_bytes, check_vectors
from pipeline.model.export_folder import (
    SETTINGS,
    Prompts,
    TrainedTexts,
    is_export,
    write_sentence_files,
)
from pipeline.model.load_export import LoadedExport
from pipeline.tokenizer import limits_of, load_tokenizer

# How families with two kinds of layers called their two bases before they had one dictionary.
_TWO_BASES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}


def finish_config(path: Path) -> None:
    """Rewrite a config.json that transformers saved.

    The names of code that a published model asked for are dropped: the folder has no such code.
    Rotary positions are written in the form before transformers 5, too. Earlier versions, and
    servers built on them, ignore `rope_parameters` and would turn by the family's default base,
    without an error.
    """
    tree = json.loads(path.read_text())
    tree.pop("auto_map", None)
    write_json(path, {**tree, **old_rope_keys(tree)})


def old_rope_keys(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return what older readers look for instead of `rope_parameters`."""
    rope = hf_config.get("rope_parameters")
    if not rope:
        return {}
    kind = hf_config["model_type"]
    if kind in _TWO_BASES:
        far, near = rope["full_attention"], rope["sliding_attention"]
        bases = dict(zip(_TWO_BASES[kind], (far["rope_theta"], near["rope_theta"]), strict=True))
    else:
        far, bases = rope, {"rope_theta": rope["rope_theta"]}
    rest = {key: value for key, value in far.items() if key != "rope_theta"}
    if "partial_rotary_factor" in rest:
        bases["partial_rotary_factor"] = rest.pop("partial_rotary_factor")
    # ModernBERT never read `rope_scaling`; newer versions would rescale all of its layers by it.
    plain = rest.get("rope_type") == "default" or kind == "modernbert"
    return bases if plain else {**bases, "rope_scaling": rest}


# Tokens that vocabularies reserve for padding, for models that declare none.
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

    Args:
        path: folder or hub name.
        appends_eos: whether texts got an end-of-sequence token.
        max_length: tokens after which a text is cut.
        num_embeddings: rows of the model's embedding.

    Raises:
        UserError: it has no EOS token although texts got one, or no token to pad with.
    """
    tokenizer = load_tokenizer(path)
    if appends_eos:
        append_eos(tokenizer)
    _give_pad_token(tokenizer, num_embeddings)
    # The folder has no code of the published model, and needs none.
    tokenizer.init_kwargs.pop("auto_map", None)
    # As the training data were made, whatever the published tokenizer says.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = max_length
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def append_eos(tokenizer: Any) -> None:
    """Make a tokenizer end every text with its EOS, within the length it truncates to.

    Does nothing to one that already does.

    Raises:
        UserError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token is None:
        raise UserError("tokenizer: it has no EOS token", fix="prepare with append_eos: false")
    ids, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    if ids[-1] == tokenizer.eos_token_id:
        return
    # One template for all of them: of two in a row the library applies only the first.
    start = next(k for k in range(len(ids)) if ids[k : k + len(bare)] == bare)
    before, after = ids[:start], [*ids[start + len(bare) :], tokenizer.eos_token_id]
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in (*before, *after)}
    template = processors.TemplateProcessing(
        single=[*(names[token] for token in before), "$A", *(names[token] for token in after)],
        special_tokens=[(name, token) for token, name in names.items()],
    )
    backend = tokenizer.backend_tokenizer
    kept = [processors.ByteLevel(**options) for options in _byte_levels(backend)]
    backend.post_processor = processors.Sequence([*kept, template])


def _byte_levels(backend: Any) -> list[dict[str, Any]]:
    """Options of the post-processors that change offsets and add no token."""
    tree = json.loads(backend.to_str())["post_processor"] or {}
    parts = tree.get("processors", [tree])
    return [
        {key: value for key, value in part.items() if key != "type"}
        for part in parts
        if part.get("type") == "ByteLevel"
    ]


def _give_pad_token(tokenizer: Any, num_embeddings: int) -> None:
    """Give a tokenizer that cannot pad a token to pad with, as users of such models do.

    A token made for padding if the vocabulary has one, else EOS, BOS or the unknown token. It is
    one that is special already, or texts that contain it would get other ids; and one that has a
    row in the embedding, which is looked up before padding is masked.

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


# A ragged batch for the check of an export: padding, a cut and a word of several tokens show in it.
_PROBES = (
    "amber",
    "The river is 31 km long; two bridges cross it.",
    "Naïve café, x = a * b. " * 40,
)
# Longer texts are not cut in the check, which would take long on a CPU.
_LONGEST_CUT = 512
# What the libraries take in the process that checks, without the weights.
_LIBRARY_BYTES = 2**30


class TokenizerSource(Protocol):
    """What a dataset's manifest knows about its tokenizer."""

    @property
    def path(self) -> str:
        """Folder or hub name."""

    @property
    def append_eos(self) -> bool:
        """Whether texts got an end-of-sequence token."""


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
    outside: Outside | None = None,
) -> Path:
    """Write weights, tokenizer, pooling, prompts and model card.

    The attention is written as `is_causal` into config.json, which decoders of transformers honour,
    so a bidirectional model needs no remote code. An adapter alone has no config.json to say so:
    its folder is for peft and for `load_export`, and its card shows how to take the mask off.

    Args:
        encoder: whole weights on one process; unless `adapter_only`, adapters are merged in place.
            A checked one is left in float32.
        config: the model section that the encoder was built from.
        tokenizer: the tokenizer of the training data.
        template: how instructions and texts become strings.
        max_length: tokens after which a text is cut; fewer where the model has fewer positions.
        output_dir: the folder to write; an earlier export there is replaced.
        card: facts for the model card: `recipe` (YAML), `step`, `checkpoint` (its digest), `data`
            (a table).
        texts: the instructions that training saw; none if not given.
        similarity: by which vectors were compared in training.
        adapter_only: write the adapter without the weights it belongs to.
        outside: a process that loads the folder as others will and compares its vectors with the
            encoder's, before the folder takes its place; None: not checked.

    Raises:
        UserError: `output_dir` holds something that is not an export, the tokenizer is gone, the
            model needs code of its own, there is no adapter to write, or other libraries give
            other vectors.
    """
    _check_form(config, adapter_only)
    texts = texts or TrainedTexts()
    max_length = _length_that_fits(encoder, max_length)
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
        limits=limits_of(encoder.model.config.to_dict()),
        num_dimensions=encoder.num_dimensions,
        max_tokens=16384,
    )
    facts = {
        **card,
        "family": encoder.model.config.model_type,
        "decoder": encoder.family.decoder,
        "plain_base": _is_plain(encoder, config),
        "similarity": model.similarity,
        "texts": texts,
        "prompts": Prompts.of(template, texts, pooled=config.pool_instruction),
    }
    with _replaced(output_dir) as folder:
        _write_files(folder, model, config, facts, adapter_only)
        write = partial(
            write_card,
            folder,
            config=config,
            template=template,
            max_length=max_length,
            adapter_only=adapter_only,
        )
        write(facts=facts)  # its code is part of what is checked
        if outside is not None:
            libraries = ["transformers"] if facts["plain_base"] or not adapter_only else []
            libraries += [] if adapter_only else ["sentence-transformers"]
            checks = _check(outside, folder, model, facts["prompts"], libraries)
            write(facts={**facts, "checks": checks})
    return output_dir


def _write_files(
    folder: Path,
    model: LoadedExport,
    config: ModelConfig,
    facts: Mapping[str, Any],
    adapter_only: bool,
) -> None:
    """Write everything but the card."""
    encoder, prompts = model.encoder, facts["prompts"]
    if adapter_only:
        encoder.save_adapter(folder)
    else:
        encoder.save_backbone(folder)
        finish_config(folder / "config.json")
        write_sentence_files(
            folder,
            width=encoder.model.config.hidden_size,
            config=config,
            max_length=model.max_length,
            prompts={"query": prompts.query.before, "document": prompts.document.before},
            similarity=facts["similarity"],
        )
    model.tokenizer.save_pretrained(folder)
    write_json(
        folder / SETTINGS,
        {
            "version": 1,
            "template": as_tree(model.template),
            "max_length": model.max_length,
            "step": facts.get("step"),
            "checkpoint": facts.get("checkpoint"),
            "similarity": facts["similarity"],
            "model": as_tree(config),
        },
    )


def _is_plain(encoder: Encoder, config: ModelConfig) -> bool:
    """Whether transformers alone loads the base model as the one that was trained."""
    return (
        read_config(config)["model_type"] == encoder.model.config.model_type
        and not config.trust_remote_code
        and config.rope_scaling is None
        and not config.all_merged
    )


def _check_form(config: ModelConfig, adapter_only: bool) -> None:
    """Refuse an adapter that is not there, and a merged model that nobody else could load."""
    if adapter_only:
        if config.lora is None and config.adapter_use != "continue":
            raise UserError("adapter-only export of a run without adapter", fix="export it merged")
    elif config.trust_remote_code:
        raise UserError(
            f"merged export of {config.path}, whose code is not part of transformers",
            fix="train with model.lora and export the adapter alone",
        )


def _length_that_fits(encoder: Encoder, max_length: int) -> int:
    """The data's length limit, or the model's positions where there are fewer."""
    limit = limits_of(encoder.model.config.to_dict()).positions
    if limit is None or max_length <= limit:
        return max_length
    say_warning(
        f"the export's texts are cut at {limit} tokens, the positions of the model; those of the "
        f"training data at {max_length}"
    )
    return limit


def check_output(output_dir: Path) -> None:
    """Refuse a folder that an export could not replace, before any work for it.

    Raises:
        UserError: it holds something else, or cannot be written to.
    """
    if output_dir.is_dir() and any(output_dir.iterdir()) and not is_export(output_dir):
        raise UserError(
            f"{output_dir}: not empty and not an export", fix="choose another output folder"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: a file", fix="choose another output folder")
    require_writable(output_dir.parent, key="--output")
    _unfinished(output_dir).mkdir()  # a name may be too long
    _unfinished(output_dir).rmdir()


def _unfinished(output_dir: Path) -> Path:
    return output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")


@contextmanager
def _replaced(output_dir: Path) -> Iterator[Path]:
    """A folder to write that takes the place of `output_dir` at the end, or leaves no trace."""
    output_dir = output_dir.resolve()  # what a link points to is replaced, not the link
    check_output(output_dir)
    work, old = _unfinished(output_dir), output_dir.with_name(f".{output_dir.name}.{os.getpid()}")
    work.mkdir()
    try:
        with name_full_disk(output_dir):
            yield work
        if output_dir.exists():
            output_dir.rename(old)
        work.rename(output_dir)
        sync_dir(output_dir.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # renamed where all went well
        shutil.rmtree(old, ignore_errors=True)


def _check(
    outside: Outside,
    folder: Path,
    model: LoadedExport,
    prompts: Prompts,
    libraries: Sequence[str],
) -> dict[str, str]:
    """Compare the vectors that others get from the folder with the trained encoder's.

    On the CPU and in float32, where equal models give equal vectors; so the check needs room for
    two float32 copies of the weights, and is left out where there is less.
    """
    if not libraries:
        return {}
    encoder = model.encoder
    needed = 8 * sum(parameter.numel() for parameter in encoder.parameters()) + _LIBRARY_BYTES
    if needed > (free := available_bytes()):
        why = f"{NOT_CHECKED}: {needed / 2**30:.0f} GiB of memory needed, {free / 2**30:.0f} free"
        found = dict.fromkeys(libraries, why)
    else:
        batches = _batches(model, prompts)
        stored = encoder.config.dtype
        encoder.float()
        wanted = [model.encode_texts(*batch.pop("ours")) for batch in batches]
        found = check_vectors(
            outside, folder, libraries=libraries, dtype=stored, batches=batches, wanted=wanted
        )
    for library, result in found.items():
        if result.startswith(NOT_CHECKED):
            say_warning(f"{library}: {result}")
        else:
            print(f"{library}: {result}", file=sys.stderr, flush=True)
    return found


def _batches(model: LoadedExport, prompts: Prompts) -> list[dict[str, Any]]:
    """Texts of both roles, as others take them and (`ours`) as `encode_texts` does."""
    frames = {
        "query": (prompts.example, model.template.query_suffix(), prompts.example == prompts.query),
        "document": (prompts.document, model.template.document_suffix(), True),
    }
    batches = []
    for role, (prompt, suffix, stored) in frames.items():
        # Others cut a text together with what stands behind it.
        cuts = model.max_length <= _LONGEST_CUT and not suffix
        texts = _PROBES if cuts else _PROBES[:-1]
        batches.append(
            {
                "role": role,
                "texts": [prompt.joint + text + suffix for text in texts],
                "prompt": prompt.before,
                "prompt_name": role if stored else None,
                "ours": (texts, prompt.before + prompt.joint, suffix),
            }
        )
    return batches
