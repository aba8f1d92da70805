"""Identities and lengths of texts."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Template
from pipeline.errors import UserError
from pipeline.evaluation.distinct_texts import byte_sizes, digests, effective_lengths, require_short


def test_a_text_shares_the_shortest_length_at_which_it_surely_is_not_cut():
    def found(size: int, wanted: int) -> int:
        return int(effective_lengths("", np.array([size]), wanted, (512, 4096, 32768))[0])

    assert found(300, 32768) == 512
    assert found(600, 32768) == 4096
    assert found(600, 512) == 512
    assert found(9000, 4096) == 4096
    assert found(90_000, 32768) == 32768
    # Three bytes each: bytes bound tokens, characters do not.
    assert byte_sizes(pa.array(["x", "語" * 300], type=pa.large_string())).tolist() == [1, 900]


def test_a_template_that_may_push_a_text_over_its_length_is_refused():
    require_short(Template(), model="m")
    chat = Template(query="<system>" + "x" * 200 + "</system>{instruction}; {text}")
    with pytest.raises(UserError, match=r"m: the template of a query adds 2\d\d bytes"):
        require_short(chat, model="m")


def test_a_digest_tells_role_instruction_length_and_text_apart():
    def digest(role: str, instruction: str, text: str, length: int) -> tuple[int, int]:
        texts = pa.array(["other", text], type=pa.large_string()).slice(1)
        first, second = digests(role, instruction, texts, np.array([length], np.int32))[0]
        return int(first), int(second)

    keys = [(r, i, t, n) for r in ("query", "document") for i in ("", "ask") for t in ("a", "")
            for n in (512, 4096)]  # fmt: skip
    assert len({digest(*key) for key in keys}) == len(keys)
    wanted = hashlib.sha256(b"query\0ask\x004096\0text").digest()[:16]
    assert np.array(digest("query", "ask", "text", 4096), np.uint64).tobytes() == wanted
