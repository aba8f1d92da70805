"""Packed attention: every kernel computes the definition, and no row sees another."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen

from pipeline.model import attention
from pipeline.model.attention import PackedRows, packed_attention

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


def fake_flash(
    q: Any, k: Any, v: Any, bq: Any, bk: Any, mq: int, mk: int,
    *, dropout_p: float, softmax_scale: float, causal: bool, window_size: tuple[int, int],
    softcap: float = 0.0, deterministic: bool = False,
) -> Any:  # fmt: skip
    """flash-attn's documented call: a causal mask in addition to the window."""
    assert torch.equal(bq, bk) and bq.dtype == torch.int32 and mq == mk == max(LENGTHS)
    assert dropout_p == softcap == 0 and not deterministic
    left, right = window_size
    return naive(q, k, v, bq, softmax_scale, (left, 0 if causal else right))


def fake_torch(
    q: Any, k: Any, v: Any, bq: Any, bk: Any, mq: int, mk: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """torch's documented call: the window alone makes it causal."""
    assert torch.equal(bq, bk) and bq.dtype == torch.int32 and mq == mk == max(LENGTHS)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return naive(q, k, v, bq, scale, window_size)


def fake_torch_2_11(
    q: Any, k: Any, v: Any, bq: Any, bk: Any, mq: int, mk: int,
    *, scale: float, window_size: tuple[int, int],
) -> Any:  # fmt: skip
    """The call of torch 2.11, which has no argument for grouped heads."""
    assert q.shape == k.shape == v.shape
    return naive(q, k, v, bq, scale, window_size)


def install_flash_attention(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    module: Any = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    probes = (attention.flash_attention, attention.torch_varlen, attention.is_before_ampere)
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


@pytest.fixture(params=["rows", "flash", "torch", "torch 2.11"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to attend; the GPU kernels are replaced by their documented meaning."""
    if request.param == "rows":
        return
    if request.param == "flash":
        install_flash_attention(monkeypatch, fake_flash)
        chosen = attention.flash_attention()
    else:
        fake = fake_torch if request.param == "torch" else fake_torch_2_11
        monkeypatch.setattr(torch_varlen, "varlen_attn", fake)
        chosen = attention.torch_varlen()
    assert chosen is not None
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: chosen)


@pytest.mark.parametrize("window", [None, 3, 8, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_every_way_to_attend_computes_attention_by_its_definition(
    kernel: None, causal: bool, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, sum(LENGTHS), 8, generator=generator) for h in (4, 2, 2))
    rows = PackedRows.of(torch.tensor(LENGTHS), causal=causal)
    module = SimpleNamespace(config=SimpleNamespace(sliding_window=window))
    ours, _ = packed_attention(module, q, k, v, None, rows=rows, scaling=0.3, sliding_window=window)
    # As in transformers: a causal window of 3 holds the token itself and two before it, a window
    # to both sides three tokens each way.
    left = -1 if window is None else window - 1 if causal else window
    right = 0 if causal else left
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    wanted = naive(*flat, rows.boundaries, 0.3, (left, right))
    torch.testing.assert_close(ours[0], wanted, atol=1e-6, rtol=0)


CUDA = torch.device("cuda")


def test_half_precision_on_a_gpu_alone_takes_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attention(monkeypatch, fake_flash)

    def kernel_name(
        dtype: torch.dtype = torch.bfloat16,
        *,
        device: torch.device = CUDA,
        width: int = 64,
        softcap: float | None = None,
        dropout: float = 0.0,
    ) -> str | None:
        kernel = attention.choose_kernel(device, dtype, width, dropout=dropout, softcap=softcap)
        return kernel and kernel.name

    assert kernel_name() == "flash-attn"
    assert kernel_name(torch.float32) is None
    assert kernel_name(device=torch.device("cpu")) is None
    assert kernel_name(width=512) is None
    assert kernel_name(softcap=50.0) == "flash-attn"
    assert kernel_name(dropout=0.1) == "flash-attn"
    install_flash_attention(monkeypatch, lambda q: q)  # a release without capped scores
    attention.flash_attention.cache_clear()
    assert kernel_name(softcap=50.0) is None
    monkeypatch.delitem(sys.modules, "flash_attn")
    attention.flash_attention.cache_clear()
    assert kernel_name() == "torch's variable-length kernel"
    # torch's kernel knows neither, which would silently be lost.
    assert kernel_name(dropout=0.1) is None
    assert kernel_name(softcap=50.0) is None


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "attention: torch's variable-length kernel"),
        ({"device": torch.device("cpu")}, r"attention: row by row \(on a CPU\)"),
        ({"dtype": torch.float32}, "attention: row by row, because kernels take no float32"),
        ({"head_width": 512}, "because kernels take heads of 256 at most, not 512"),
        ({"dropout": 0.3}, "WARNING: .* install flash-attn for attention dropout"),
        ({"softcap": 50.0}, "WARNING: .* install flash-attn for capped scores"),
    ],
    ids=["kernel", "CPU", "float32", "wide heads", "dropout", "capped"],
)
def test_a_run_tells_how_it_computes_attention(given: dict[str, Any], line: str) -> None:
    defaults: dict[str, Any] = {"device": CUDA, "dtype": torch.bfloat16, "head_width": 64}
    assert re.search(line, attention.describe_kernel(**{**defaults, **given}))


def test_a_gpu_that_no_kernel_supports_attends_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn and torch's kernel would raise in the first forward."""
    install_flash_attention(monkeypatch, fake_flash)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Quadro RTX 6000")
    for capability, name in (((8, 0), "flash-attn"), ((7, 5), None)):
        attention.is_before_ampere.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        kernel = attention.choose_kernel(CUDA, torch.bfloat16, 64)
        assert (kernel and kernel.name) == name
    line = attention.describe_kernel(CUDA, torch.bfloat16, 64)
    assert re.search("WARNING: .* row by row, .* kernels need Ampere, not Quadro RTX 6000", line)


def test_a_flash_attention_built_for_another_torch_is_not_silently_ignored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = ModuleType("flash_attn")  # without the function: importing it is an ImportError
    broken.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    assert attention.flash_attention() is None
    assert "flash-attn is installed but cannot be imported" in capsys.readouterr().out


def test_dropout_cap_and_determinism_are_handed_to_flash_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []

    def flash(q: Any, *_: Any, softcap: float = 0.0, **more: Any) -> Any:
        given.append({"softcap": softcap, **more})
        return q

    install_flash_attention(monkeypatch, flash)
    kernel = attention.flash_attention()
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: kernel)
    q = torch.randn(1, 2, sum(LENGTHS), 8)
    rows = PackedRows.of(torch.tensor(LENGTHS), causal=False)
    packed_attention(None, q, q, q, None, rows=rows, dropout=0.25, softcap=30.0)
    torch.use_deterministic_algorithms(True)
    try:
        packed_attention(None, q, q, q, None, rows=rows)
    finally:
        torch.use_deterministic_algorithms(False)
    keys = ("dropout_p", "softcap", "deterministic")
    assert [[one[key] for key in keys] for one in given] == [[0.25, 30.0, False], [0, 0, True]]


def test_capped_scores_meet_dropout_after_the_softmax() -> None:
    """Gemma 2's attention by its definition, one row after another, with the same chance."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, sum(LENGTHS), 8, generator=generator) for h in (4, 2, 2))
    torch.manual_seed(1)
    ours, _ = packed_attention(
        None, q, k, v, None,
        rows=PackedRows.of(torch.tensor(LENGTHS), causal=False),
        scaling=0.3, dropout=0.4, softcap=2.0,
    )  # fmt: skip
    torch.manual_seed(1)
    wanted = []
    for row in zip(*(x.split(LENGTHS, dim=2) for x in (q, k, v)), strict=True):
        one, two, three = (x.repeat_interleave(4 // x.shape[1], dim=1) for x in row)
        score = 2 * torch.tanh(0.3 * torch.einsum("bhik,bhjk->bhij", one, two) / 2)
        weight = torch.nn.functional.dropout(score.softmax(-1), 0.4)
        wanted.append(torch.einsum("bhij,bhjk->bihk", weight, three))
    torch.testing.assert_close(ours, torch.cat(wanted, dim=1), atol=1e-6, rtol=0)


def test_positions_restart_in_every_row() -> None:
    rows = PackedRows.of(torch.tensor([3, 1, 5]), causal=True)
    assert rows.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert rows.boundaries.tolist() == [0, 3, 4, 9]
    assert rows.longest == 5
