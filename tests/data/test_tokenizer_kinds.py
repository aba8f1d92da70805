"""EOS and BOS by kind of tokenizer: shards hold the tokens that an exported tokenizer gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_support import WORDS
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, BertTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.model.export import append_eos
from pipeline.tokenizer import TextTokenizer, load_fast_tokenizer

TEXTS = ["abba cab", "x", " ".join(WORDS[:60])]
LIMIT = 12


def _trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def _byte_level(special: list[str]) -> Tokenizer:
    return _trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )


def qwen(folder: Path) -> None:
    """Byte-level, nothing around a text."""
    PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(["<|endoftext|>"]),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    ).save_pretrained(folder)


def llama3(folder: Path) -> None:
    """Byte-level, a BOS by a chain of post-processors, and no EOS."""
    tokenizer = _byte_level(["<|begin|>", "<|end|>"])
    bos = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    ).save_pretrained(folder)


def mistral(folder: Path, **flags: Any) -> None:
    """SentencePiece pieces, BOS by a flag of the class."""
    tokenizer = _trained(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    model = json.loads(tokenizer.to_str())["model"]
    LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        add_bos_token=True,
        **flags,
    ).save_pretrained(folder)


def e5_mistral(folder: Path) -> None:
    """BOS and EOS by flags of the class."""
    mistral(folder, add_eos_token=True)


def bert(folder: Path) -> None:
    """WordPiece between [CLS] and [SEP]; no EOS by that name."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )
    BertTokenizer(vocab=tokenizer.get_vocab()).save_pretrained(folder)


# Kind -> token before a text, token after it.
KINDS: dict[Callable[[Path], None], tuple[str | None, str | None]] = {
    qwen: (None, None),
    llama3: ("<|begin|>", None),
    mistral: ("<s>", None),
    e5_mistral: ("<s>", "</s>"),
    bert: ("[CLS]", "[SEP]"),
}


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_text_has_the_specials_of_its_tokenizer_and_one_eos_if_asked(
    kind: Callable[[Path], None], append: bool, tmp_path: Path
) -> None:
    kind(tmp_path)
    if append and kind is bert:
        with pytest.raises(UserError, match="no EOS token"):
            load_fast_tokenizer(str(tmp_path), append_eos=True)
        return
    tokenizer_json, info = load_fast_tokenizer(str(tmp_path), append_eos=append)
    encoder = TextTokenizer(tokenizer_json, eos_id=info.eos_id, append_eos=append)
    rows = [row.tolist() for row in encoder.encode(TEXTS, LIMIT)[0]]
    exported = AutoTokenizer.from_pretrained(tmp_path)
    if append:
        append_eos(exported)
    exported.save_pretrained(tmp_path / "export")
    again = AutoTokenizer.from_pretrained(tmp_path / "export")
    for tokenizer in (exported, again):
        assert tokenizer(TEXTS, truncation=True, max_length=LIMIT)["input_ids"] == rows
    first, last = KINDS[kind]
    last = exported.eos_token if append else last
    bare = [exported(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    ends = [[exported.convert_tokens_to_ids(token)] if token else [] for token in (first, last)]
    room = LIMIT - sum(map(len, ends))
    assert rows == [[*ends[0], *ids[:room], *ends[1]] for ids in bare]
    places = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0], return_offsets_mapping=True)
    kept = again(TEXTS[0], return_offsets_mapping=True)["offset_mapping"]
    assert kept[: len(places["offset_mapping"])] == places["offset_mapping"]
    assert len(bare[2]) > room  # one text is cut


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_text_cut_within_its_instruction_keeps_a_token_to_pool(
    kind: Callable[[Path], None], tmp_path: Path
) -> None:
    kind(tmp_path)
    tokenizer_json, info = load_fast_tokenizer(str(tmp_path), append_eos=False)
    encoder = TextTokenizer(tokenizer_json, eos_id=info.eos_id, append_eos=False)
    rows, skipped = encoder.encode([TEXTS[2]], 5, prefixes=[len(TEXTS[2])], suffixes=[0])
    assert len(rows[0]) == 5
    assert 3 <= skipped[0] <= 4


def test_tokenizers_of_one_vocabulary_that_cut_texts_otherwise_are_told_apart(
    tmp_path: Path,
) -> None:
    qwen(tmp_path)
    _, before = load_fast_tokenizer(str(tmp_path), append_eos=False)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "normalizer": {"type": "Lowercase"}}))
    _, after = load_fast_tokenizer(str(tmp_path), append_eos=False)
    assert before.fingerprint != after.fingerprint


def test_an_eos_that_only_a_flag_asks_for_is_not_lost_in_silence(tmp_path: Path) -> None:
    mistral(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_eos_token": True}))
    with pytest.raises(UserError, match=r"sets add_eos_token.*append_eos: true"):
        load_fast_tokenizer(str(tmp_path), append_eos=False)
    _, info = load_fast_tokenizer(str(tmp_path), append_eos=True)
    assert info.append_eos
