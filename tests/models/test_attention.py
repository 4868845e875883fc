"""Every path of attention gives what the plain formula gives, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from trainer.models import attention, segments
from trainer.models.attention import attend
from trainer.models.segments import Bias, PackedMask, SegmentGrids, packed_mask, padding_bias, segment_bias

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


rows = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4)


def segments_of(lengths: list[list[int]], width: int) -> torch.Tensor:
    """Rows of segments so long, padded to `width`; a segment of length 0 is not there."""
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, parts in zip(ids, lengths, strict=True):
        held = torch.repeat_interleave(torch.arange(1, len(parts) + 1), torch.tensor(parts, dtype=torch.int64))
        row[: len(held)] = held
    return ids


@given(lengths=rows, causal=st.booleans(), cross=st.booleans(), grouped=st.booleans(), slots=st.sampled_from([1, 20]))
def test_lines_of_packed_rows_and_their_gradients_equal_the_bias(lengths, causal, cross, grouped, slots):
    """Whatever the lengths, in as many grids as may be; cross-attention sees a source of another length, or none."""
    queries = segments_of(lengths, 60)
    keys = queries
    if cross:
        causal = False
        keys = segments_of([[(3 * n + at) % 10 for at, n in enumerate(row)] for row in lengths], 55)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentGrids, "SLOTS", slots)
        patch.setattr(segments, "LONG", 0)
        lines = packed_mask(queries, keys, torch.float32, causal)
    assert isinstance(lines, SegmentGrids) or not torch.isin(queries[queries > 0], keys).any()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(queries), 4, 60, 8, generator=generator).requires_grad_()
    k, v = (
        torch.randn(len(keys), 2 if grouped else 4, keys.shape[1], 8, generator=generator).requires_grad_()
        for _ in range(2)
    )
    known = queries > 0
    for row in range(len(queries)):
        known[row] &= torch.isin(queries[row], keys[row])
    upstream = torch.randn(len(queries), 60, 32, generator=generator) * known[:, :, None]

    def results(bias: Bias) -> list[torch.Tensor]:
        out = attend(q, k, v, bias, False, 0.0, 0.3)
        return [out * known[:, :, None], *torch.autograd.grad(out, (q, k, v), upstream)]

    bias = segment_bias(queries, keys, torch.float32, causal)
    for value, expected in zip(results(lines), results(bias), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    if isinstance(lines, SegmentGrids):
        assert not attend(q, k, v, lines, False, 0.0, 0.3)[~known].any()


def test_lines_hold_little_but_segments():
    """Documents of very different lengths in long rows: half of all pairs are left out. Short rows have a bias."""
    lengths = [[600, 200, 120, 100, 4], [1024], [40] * 25, [512, 256, 128, 64, 32, 16, 8, 4]] * 4
    grids = packed_mask(*[segments_of(lengths, 1024)] * 2, torch.float32, causal=True).grids
    assert sum(grid.lines * grid.queries for grid in grids) <= 1.1 * 16 * 1024
    assert sum(grid.lines * grid.queries**2 for grid in grids) <= 0.5 * 16 * 1024**2
    assert len(grids) <= 8
    assert isinstance(packed_mask(SEGMENTS, SEGMENTS, torch.float32), torch.Tensor)


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
    segments = SEGMENTS.cuda()
    mask = packed_mask(segments, segments, torch.float32, causal=True)
    assert isinstance(mask, PackedMask)
    found = attend(q.cuda(), k.cuda(), v.cuda(), mask, False, 0.0, 0.3)
    expected = formula(q, k, v, bias, False, 0.3)
    gradients = torch.autograd.grad(found, (q, k, v), upstream.cuda())
    torch.testing.assert_close(found.cpu(), expected.float(), atol=2e-3, rtol=2e-3)  # its products are in TF32
    for value, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v), upstream.double()), strict=True):
        torch.testing.assert_close(value, wanted.float(), atol=5e-3, rtol=5e-3)
