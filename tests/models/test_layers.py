"""The shared layers: dropout, positions, attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainer.models.attention import attend, causal_bias
from trainer.models.layers import RMSNorm, TokenEmbedding, add_dropped, dropout, make_norm
from trainer.models.positions import rotary_tables, rotate, sinusoidal

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_and_the_mean_it_should(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, dtype=dtype, requires_grad=True)
    y = dropout(x, p, training=True)
    assert abs((y == 0).float().mean() - p) < 2e-3
    assert abs(y.float().mean() - 1) < 5e-3
    y.sum().backward()
    assert torch.equal(x.grad, y)
    rows = (y == 0).float()
    assert abs((rows[:, 1:] * rows[:, :-1]).mean() - p * p) < 2e-3  # neighbours fall independently


def test_dropout_follows_the_seed_and_is_off_in_evaluation():
    x = torch.rand(50)
    torch.manual_seed(3)
    first = dropout(x, 0.3, training=True)
    assert not torch.equal(dropout(x, 0.3, training=True), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3, training=True), first)
    assert dropout(x, 0.3, training=False) is x


def test_adding_with_dropout_is_dropout_then_adding():
    residual, x = torch.rand(20, 30), torch.rand(20, 30)
    torch.manual_seed(0)
    expected = residual + dropout(x, 0.2, training=True)
    torch.manual_seed(0)
    torch.testing.assert_close(add_dropped(residual, x, 0.2, training=True), expected)
    assert torch.equal(add_dropped(residual, x, 0.2, training=False), residual + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_follow_the_definition(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(24) + 0.5)
    x = torch.randn(3, 5, 24).to(dtype).requires_grad_()
    upstream = torch.randn(3, 5, 24).to(dtype)
    norm(x).backward(upstream)
    exact_x, exact_w = (tensor.detach().double().requires_grad_() for tensor in (x, norm.weight))
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * exact_w
    exact.backward(upstream.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for value, expected in [(norm(x), exact), (x.grad, exact_x.grad), (norm.weight.grad, exact_w.grad)]:
        assert value.dtype == dtype
        torch.testing.assert_close(
            value.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance
        )


def test_sinusoidal_positions_are_those_of_the_paper():
    table = sinusoidal(3, 4, 6, torch.float32, CPU)
    for row, position in enumerate(range(3, 7)):
        for pair in range(3):
            angle = torch.tensor(position / 10_000 ** (2 * pair / 6))
            torch.testing.assert_close(table[row, 2 * pair], angle.sin())
            torch.testing.assert_close(table[row, 2 * pair + 1], angle.cos())


def test_marian_has_the_same_waves_with_all_sines_first():
    paper, halves = (sinusoidal(3, 5, 8, torch.float32, CPU, order) for order in (False, True))
    assert torch.equal(halves, torch.cat((paper[:, 0::2], paper[:, 1::2]), dim=1))


def test_rotated_products_depend_on_the_distance_alone_and_gradients_are_exact():
    torch.manual_seed(0)
    cos, sin = (table[:40, None] for table in rotary_tables(40, 8, 10_000.0, torch.float64, CPU))
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    queries, keys = (rotate(x.expand(1, 40, 1, 8), cos, sin)[0, :, 0] for x in (q, k))
    products = queries @ keys.T
    for distance in range(-20, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-6, rtol=1e-6)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos[:5], sin[:5]), x)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", ["plain", "causal", "bias", "learned bias", "dropout"])
def test_attention_is_the_softmax_of_scaled_products(num_kv_heads, case, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("trainer.models.layers._keep_mask", lambda x, p: torch.full_like(x, 1 - p))
    q, k, v = torch.randn(2, 4, 6, 8), *torch.randn(2, 2, num_kv_heads, 6, 8)
    bias = torch.randn(1, 4, 6, 6, requires_grad=case == "learned bias") if "bias" in case else None
    causal = case in ("causal", "dropout")
    found = attend(q, k, v, bias, causal, 0.3 if case == "dropout" else 0.0, 0.7)
    k, v = (x.repeat_interleave(4 // num_kv_heads, dim=1) for x in (k, v))
    scores = 0.7 * q @ k.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf) if causal else scores
    torch.testing.assert_close(found, (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 32), atol=1e-5, rtol=1e-5)


def test_the_causal_bias_hides_what_comes_later():
    hidden = causal_bias(5, torch.float32, CPU) < -1e30
    assert torch.equal(hidden, torch.ones(5, 5, dtype=torch.bool).triu(1))


def test_the_embedding_is_also_the_head():
    embedding = TokenEmbedding(7, 4, std=1.0, head_bias=True)
    with torch.no_grad():
        embedding.weight.copy_(torch.rand(7, 4))
        embedding.head_bias.fill_(0.5)
    hidden = torch.rand(3, 4)
    torch.testing.assert_close(embedding(hidden, as_head=True), F.linear(hidden, embedding.weight) + 0.5)
    assert torch.equal(embedding(torch.tensor([2, 6])), embedding.weight[[2, 6]])


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gradients_of_norms_in_bf16_lose_nothing_over_many_positions(kind):
    """They are sums over all positions, which PyTorch's LayerNorm takes in bf16 on a CPU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16_384, 32, generator=generator).bfloat16()
    upstream = ((torch.randn(16_384, 32, generator=generator) + 0.05) / 16_384).bfloat16()

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        norm = make_norm(kind, 32).to(dtype)
        inputs = x.to(dtype).requires_grad_()
        made = torch.autograd.grad(norm(inputs), [inputs, *norm.parameters()], upstream.to(dtype))
        return [gradient.float() for gradient in made]

    for found, expected in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert (found - expected).norm() <= 0.01 * expected.norm()
