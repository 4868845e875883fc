"""Every path of attention gives what the plain formula gives, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainer.models import attention
from trainer.models.attention import PackedMask, attend, packed_mask, padding_bias, segment_bias

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
LENGTH = SEGMENTS.shape[1]
PADDED = torch.arange(LENGTH) < torch.tensor([[6], [10]])


def inputs(num_kv_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, LENGTH, head_dim, generator=generator).to(dtype).requires_grad_()
        for heads in (4, num_kv_heads, num_kv_heads)
    ]


def formula(q, k, v, bias, causal, scale):
    """Of the paper: softmax(scale q k^T + bias) v, in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def bias_named(case: str) -> torch.Tensor | None:
    if case == "padding":
        return padding_bias(PADDED, torch.float32)
    if case == "packed":
        return segment_bias(SEGMENTS, SEGMENTS, torch.float32, causal=True)
    if case in ("given", "learned"):
        bias = torch.randn(1, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
        return bias.requires_grad_(case == "learned")
    return None


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", ["plain", "causal", "padding", "packed", "given", "learned"])
@pytest.mark.parametrize("path", ["fused", "products"])
def test_each_path_and_its_gradients_equal_the_plain_formula(path, case, num_kv_heads, monkeypatch):
    """`dropout` that keeps everything sends to the plain products what would otherwise take SDPA; a learned bias goes
    there by itself."""
    monkeypatch.setattr("trainer.models.layers._keep_mask", lambda x, p: torch.full_like(x, 1 - p))
    fused_calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **options: fused_calls.append(1) or sdpa(*args, **options)
    )
    q, k, v = inputs(num_kv_heads)
    bias, causal = bias_named(case), case == "causal"
    upstream = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(2))

    def results(out: torch.Tensor) -> list[torch.Tensor]:
        wanted = [q, k, v, *([bias] if case == "learned" else [])]
        return [out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]

    found = results(attend(q, k, v, bias, causal, 0.5 if path == "products" else 0.0, 0.3))
    assert bool(fused_calls) == (path == "fused" and case != "learned")
    for value, expected in zip(found, results(formula(q, k, v, bias, causal, 0.3)), strict=True):
        torch.testing.assert_close(value, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_blocks_of_packed_rows_equal_the_plain_formula(num_kv_heads):
    """FlexAttention, here as PyTorch computes it without its kernel for GPUs."""
    q, k, v = (x.detach() for x in inputs(num_kv_heads))  # it has no gradients without that kernel
    found = attend(q, k, v, PackedMask(SEGMENTS), False, 0.0, 0.3)
    expected = formula(q, k, v, bias_named("packed"), False, 0.3).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dropout_p", "head_dim"), [(0.5, 16), (0.0, 8)])
def test_where_blocks_do_not_go_their_bias_does(dropout_p, head_dim, monkeypatch):
    monkeypatch.setattr("trainer.models.layers._keep_mask", lambda x, p: torch.full_like(x, 1 - p))
    monkeypatch.setattr(attention, "_attend_in_blocks", lambda *_: pytest.fail("blocks know no dropout"))
    q, k, v = inputs(head_dim=head_dim)
    found = attend(q, k, v, PackedMask(SEGMENTS), False, dropout_p, 0.3)
    expected = formula(q, k, v, bias_named("packed"), False, 0.3).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_mask_of_the_blocks_is_the_bias():
    mask = PackedMask(SEGMENTS)
    rows, queries, keys = torch.meshgrid(*map(torch.arange, (2, LENGTH, LENGTH)), indexing="ij")
    seen = mask.sees(rows, torch.tensor(0), queries, keys)
    assert torch.equal(seen, mask.bias(torch.float32)[:, 0] == 0)
    assert mask.blocks.shape[-2:] == (LENGTH, LENGTH) and mask.bias(torch.bfloat16).dtype == torch.bfloat16


def test_on_a_cpu_packed_rows_take_the_bias():
    assert torch.equal(packed_mask(SEGMENTS, torch.float32), bias_named("packed"))


def test_most_blocks_of_long_packed_rows_are_skipped():
    segments = torch.arange(1024)[None] // 128 + 1
    assert PackedMask(segments).blocks.sparsity() > 85


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_the_kernel_for_gpus_and_its_gradients_equal_the_plain_formula(num_kv_heads):
    q, k, v = inputs(num_kv_heads)
    bias = bias_named("packed")
    upstream = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(2))
    mask = packed_mask(SEGMENTS.cuda(), torch.float32)
    assert isinstance(mask, PackedMask)
    found = attend(q.cuda(), k.cuda(), v.cuda(), mask, False, 0.0, 0.3)
    expected = formula(q, k, v, bias, False, 0.3)
    gradients = torch.autograd.grad(found, (q, k, v), upstream.cuda())
    torch.testing.assert_close(found.cpu(), expected.float(), atol=2e-3, rtol=2e-3)  # its products are in TF32
    for value, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v), upstream.double()), strict=True):
        torch.testing.assert_close(value, wanted.float(), atol=5e-3, rtol=5e-3)
