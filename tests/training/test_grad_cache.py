"""Gradient caching gives the gradients of the whole batch, dropout included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.schedules import embed_chunks, replay_chunks


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 4))
    return model.double()


def batch_loss(embeddings: Tensor) -> Tensor:
    """Couples every row with every other."""
    return (embeddings @ embeddings.T).logsumexp(1).mean()


def cached_gradients(model: nn.Module, chunks: list[Tensor], keep_graphs: int) -> list[Tensor]:
    model.zero_grad()
    first_pass: dict[int, Tensor] = {}

    def embed(chunk: Tensor) -> Tensor:
        embedding = model(chunk)
        assert torch.equal(embedding, first_pass.setdefault(id(chunk), embedding.detach()))
        return embedding

    cached = embed_chunks(chunks, embed, keep_graphs=keep_graphs)
    leaf = torch.cat(cached.embeddings).requires_grad_()
    (gradient,) = torch.autograd.grad(batch_loss(leaf), leaf)
    parts = gradient.split([len(chunk) for chunk in chunks])
    replay_chunks(chunks, cached, parts, embed, lambda surrogate: surrogate.backward())
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("keep_graphs", [0, 1, 12])
@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 4, 2, 5], [1] * 12])
def test_cached_gradients_with_dropout_equal_plain_gradients(
    sizes: list[int], keep_graphs: int
) -> None:
    model = make_model()
    chunks = list(torch.randn(12, 8, dtype=torch.float64).split(sizes))
    torch.manual_seed(5)
    batch_loss(torch.cat([model(chunk) for chunk in chunks])).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    after_plain = torch.get_rng_state()
    torch.manual_seed(5)
    for got, want in zip(cached_gradients(model, chunks, keep_graphs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(torch.get_rng_state(), after_plain)


def test_pass_one_keeps_no_graph() -> None:
    model = make_model()
    cached = embed_chunks([torch.randn(3, 8, dtype=torch.float64)], model)
    assert not cached.embeddings[0].requires_grad


def test_chunk_with_kept_graph_is_not_embedded_again() -> None:
    model, calls = make_model(), []

    def embed(chunk: Tensor) -> Tensor:
        calls.append(len(chunk))
        return model(chunk)

    chunks = list(torch.randn(6, 8, dtype=torch.float64).split([1, 2, 3]))
    cached = embed_chunks(chunks, embed, keep_graphs=1)
    gradients = [torch.ones(len(chunk), 4) for chunk in chunks]
    replay_chunks(chunks, cached, gradients, embed, lambda surrogate: surrogate.backward())
    assert calls == [1, 2, 3, 2, 1]
