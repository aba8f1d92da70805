from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen

from pipeline.model import packing
from pipeline.model.packing import Rows, packed_attention

LENGTHS = [5, 1, 12, 7]


def naive(q: Any, k: Any, v: Any, boundaries: Any, scale: float, window: Any) -> torch.Tensor:
    """Attention over (T, heads, K) by its definition; -1 in a window means no limit."""
    left, right = (size if size >= 0 else 10**6 for size in window)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = []
    for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        for i in range(start, end):
            near = slice(max(start, i - left), min(end, i + right + 1))
            weights = torch.einsum("hk,lhk->hl", q[i], k[near]).mul(scale).softmax(-1)
            rows.append(torch.einsum("hl,lhk->hk", weights, v[near]))
    return torch.stack(rows)


def fake_flash(q: Any, k: Any, v: Any, bq: Any, bk: Any, mq: int, mk: int, **given: Any) -> Any:
    """flash-attn's documented call: a causal mask besides the window."""
    assert torch.equal(bq, bk) and bq.dtype == torch.int32 and mq == mk == max(LENGTHS)
    assert given["dropout_p"] == 0
    left, right = given["window_size"]
    return naive(q, k, v, bq, given["softmax_scale"], (left, 0 if given["causal"] else right))


def fake_torch(
    q: Any, k: Any, v: Any, bq: Any, bk: Any, mq: int, mk: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Any:  # fmt: skip
    """torch's documented call: the window alone says what is causal."""
    assert torch.equal(bq, bk) and bq.dtype == torch.int32 and mq == mk == max(LENGTHS)
    assert enable_gqa
    return naive(q, k, v, bq, scale, window_size)


@pytest.fixture(params=["rows", "flash", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each way to attend; the GPU kernels are stood in for by their documented meaning."""
    probes = {"flash": packing._flash_attention, "torch": packing._torch_varlen}
    for probe in probes.values():
        probe.cache_clear()
    if request.param == "flash":
        module: Any = ModuleType("flash_attn")
        module.flash_attn_varlen_func = fake_flash
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    if request.param == "torch":
        monkeypatch.setattr(torch_varlen, "varlen_attn", fake_torch)
    if request.param in probes:
        chosen = probes[request.param]()
        assert chosen is not None
        monkeypatch.setattr(packing, "_varlen_kernel", lambda *_: chosen)
    yield
    for probe in probes.values():
        probe.cache_clear()


@pytest.mark.parametrize("window", [None, 3, 8, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_every_way_to_attend_computes_attention_by_its_definition(
    kernel: None, causal: bool, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, sum(LENGTHS), 8, generator=generator) for h in (4, 2, 2))
    rows = Rows.of(torch.tensor(LENGTHS), causal=causal)
    module = SimpleNamespace(config=SimpleNamespace(sliding_window=window))
    ours, _ = packed_attention(module, q, k, v, None, rows=rows, scaling=0.3, sliding_window=window)
    # As in transformers: a causal window of 3 holds the token itself and two before it, a window
    # to both sides three tokens each way.
    left = -1 if window is None else window - 1 if causal else window
    right = 0 if causal else left
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    wanted = naive(*flat, rows.boundaries, 0.3, (left, right))
    torch.testing.assert_close(ours[0], wanted, atol=1e-6, rtol=0)


def test_half_precision_on_a_gpu_alone_takes_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_flash_attention", lambda: fake_flash)
    monkeypatch.setattr(packing, "_torch_varlen", lambda: fake_torch)

    def ask(
        dtype: torch.dtype,
        *,
        is_cuda: bool = True,
        width: int = 64,
        cap: Any = None,
        dropout: float = 0.0,
    ) -> Any:
        query: Any = SimpleNamespace(dtype=dtype, is_cuda=is_cuda, shape=(1, 4, 9, width))
        return packing._varlen_kernel(query, dropout, cap)

    assert ask(torch.bfloat16) is fake_flash
    assert ask(torch.float32) is None
    assert ask(torch.bfloat16, is_cuda=False) is None
    assert ask(torch.bfloat16, width=512) is None
    assert ask(torch.bfloat16, cap=50.0) is None
    assert ask(torch.bfloat16, dropout=0.1) is fake_flash
    monkeypatch.setattr(packing, "_flash_attention", lambda: None)
    assert ask(torch.bfloat16) is fake_torch
    # torch's kernel knows no dropout, which would be lost without a word.
    assert ask(torch.bfloat16, dropout=0.1) is None


def test_dropout_is_handed_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def flash(q: Any, *_: Any, dropout_p: float, **__: Any) -> Any:
        given.append(dropout_p)
        return q

    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    packing._flash_attention.cache_clear()
    kernel = packing._flash_attention()
    packing._flash_attention.cache_clear()
    monkeypatch.setattr(packing, "_varlen_kernel", lambda *_: kernel)
    q = torch.randn(1, 2, sum(LENGTHS), 8)
    rows = Rows.of(torch.tensor(LENGTHS), causal=False)
    packed_attention(None, q, q, q, None, rows=rows, dropout=0.25)
    assert given == [0.25]


def test_capped_scores_meet_dropout_after_the_softmax() -> None:
    """Gemma 2's attention by its definition, one row after another, with the same chance."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, sum(LENGTHS), 8, generator=generator) for h in (4, 2, 2))
    torch.manual_seed(1)
    ours, _ = packed_attention(
        None, q, k, v, None,
        rows=Rows.of(torch.tensor(LENGTHS), causal=False), scaling=0.3, dropout=0.4, softcap=2.0,
    )  # fmt: skip
    torch.manual_seed(1)
    wanted = []
    for row in zip(*(x.split(LENGTHS, dim=2) for x in (q, k, v)), strict=True):
        one, two, three = (x.repeat_interleave(4 // x.shape[1], dim=1) for x in row)
        score = 2 * torch.tanh(0.3 * torch.einsum("bhik,bhjk->bhij", one, two) / 2)
        weight = torch.nn.functional.dropout(score.softmax(-1), 0.4)
        wanted.append(torch.einsum("bhij,bhjk->bihk", weight, three))
    torch.testing.assert_close(ours, torch.cat(wanted, dim=1), atol=1e-6, rtol=0)
