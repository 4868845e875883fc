"""Packed rows: samples that share a row get the logits and gradients that they get alone."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.test_encoder_decoder import BART, T5
from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.models.segments import masked_score, segment_bias
from trainer.tasks import Encoded
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.translation import Translation

VARIANTS = {
    "sinusoidal": {},
    "learned": {"positions": "learned", "max_positions": 12},
    "t5": T5,
    "post-norm": {"norm_position": "post", "activation": "gelu"},
    "bart": {**BART, "max_positions": 12},
    "llama": {},
    "qwen3": {"qk_norm": True},
    "gpt2": {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": "all", "max_positions": 12},
}
DECODERS = ("llama", "qwen3", "gpt2")
ROW = (12, 10)
LENGTHS = [[(12, 1)], [(3, 4), (1, 2), (5, 1), (3, 3)], [(2, 8), (4, 1)], [(5, 10)], [(1, 1)]]
"""(source, target) lengths of the samples of each row; the decoder-only model takes the targets."""
TOKENIZER = SimpleNamespace(pad_id=0, bos_id=1, eos_id=2)


@cache
def build(variant, **options):
    shape = {"d_model": 32, "num_heads": 4, "d_ff": 64, **VARIANTS[variant], **options}
    if variant in DECODERS:
        model = Decoder(50, **shape, num_kv_heads=2, num_layers=2, init_std=0.2)
        task = CausalLM(TOKENIZER, "text", sequence_length=12)
    else:
        model = EncoderDecoder(50, **shape, encoder_layers=2, decoder_layers=2)
        task = Translation(TOKENIZER, "en", "de")
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.eval(), task


def make_rows(task, lengths, seed=0):
    """Samples of random tokens; those of the translation have both sides."""
    rng = np.random.default_rng(seed)

    def sample(source, target):
        if isinstance(task, CausalLM):
            return Encoded({"ids": rng.integers(3, 50, target + 1)}, length=target, num_target_tokens=target)
        fields = {"source_ids": rng.integers(3, 50, source), "target_ids": rng.integers(3, 50, target)}
        return Encoded(fields, length=max(source, target), num_target_tokens=target)

    return [[sample(*sizes) for sizes in row] for row in lengths]


def collate(task, rows, row_lengths=ROW):
    return task.collate_rows(rows, row_lengths[-len(task.sides(rows[0][0])) :])


def places(task, rows):
    """(row, target positions, sample) of every sample."""
    for index, row in enumerate(rows):
        end = 0
        for sample in row:
            start, end = end, end + task.sides(sample)[-1]
            yield index, slice(start, end), sample


def check_logits(model, task, rows, row_lengths=ROW):
    with torch.inference_mode():
        packed = model(collate(task, rows, row_lengths))
        for index, place, sample in places(task, rows):
            alone = model(task.collate([sample]))[0]
            torch.testing.assert_close(packed[index, place], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_each_sample_alone(variant):
    model, task = build(variant)
    check_logits(model, task, make_rows(task, LENGTHS))


@st.composite
def some_lengths(draw):
    """One to three rows of samples that fit them."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row, left = [], ROW
        while min(left) > 0 and (not row or draw(st.booleans())):
            row.append(tuple(draw(st.integers(1, size)) for size in left))
            left = tuple(size - taken for size, taken in zip(left, row[-1], strict=True))
        rows.append(row)
    return rows


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15)
@given(lengths=some_lengths(), seed=st.integers(0, 2**32 - 1))
def test_logits_are_those_of_each_sample_alone_however_rows_are_filled(variant, lengths, seed):
    model, task = build(variant)
    check_logits(model, task, make_rows(task, lengths, seed))


@pytest.mark.parametrize("variant", ["sinusoidal", "learned", "t5", "gpt2"])
def test_a_row_may_be_longer_than_the_positions_that_the_model_knows(variant):
    model, task = build(variant, max_positions=4)
    check_logits(model, task, make_rows(task, [[(4, 4), (4, 1), (1, 4)]]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_longer_than_the_blocks_in_which_tables_are_made(variant):
    model, task = build(variant, max_positions=300)
    check_logits(model, task, make_rows(task, [[(300, 300), (280, 290), (3, 5)]]), (600, 600))


def test_the_rotation_is_that_of_the_position_ids():
    """Only distances count, so positions of the row would give nearly the same logits, less and less precisely."""
    model, task = build("llama")
    batch = collate(task, make_rows(task, LENGTHS))
    with torch.inference_mode():
        logits = model(batch)
        still = model({**batch, "position_ids": torch.zeros_like(batch["position_ids"])})
    assert not torch.allclose(still[3], logits[3], atol=1e-3)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_each_sample_alone(variant, mode, monkeypatch):
    """In training attention takes other kernels; dropout that keeps everything leaves the result as it is."""
    monkeypatch.setattr("trainer.models.layers._keep_mask", lambda x, p: torch.full_like(x, 1 - p))
    model, task = build(variant, dropout=0.1, attention_dropout=0.1)
    rows = make_rows(task, LENGTHS)

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            task.loss(model, batch).objective.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.train(mode == "train")
    packed = gradients([collate(task, rows)])
    alone = gradients([task.collate([sample]) for row in rows for sample in row])
    model.eval()
    for name, expected in alone.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(packed[name], expected, atol=1e-5 * scale, rtol=1e-5, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_of_one_sample_change_no_logit_of_another(variant):
    model, task = build(variant)
    (row,) = make_rows(task, LENGTHS[1:2])
    (other,) = make_rows(task, LENGTHS[1:2], seed=1)
    with torch.inference_mode():
        before = model(collate(task, [row]))[0]
        for changed in range(len(row)):
            after = model(collate(task, [[*row[:changed], other[changed], *row[changed + 1 :]]]))[0]
            for index, (_, place, _) in enumerate(places(task, [row])):
                assert torch.equal(before[place], after[place]) == (index != changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_gives_no_nan_even_where_it_sees_nothing(variant, dtype):
    model, task = build(variant)
    model = deepcopy(model).to(dtype)
    logits = model(collate(task, make_rows(task, [[(12, 3)], [(3, 10)], []])))  # no padding to see, and a row of it
    logits.float().sum().backward()
    assert logits.isfinite().all() and logits.dtype == dtype
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_scores_are_masked_across_segments_and_after_the_query():
    low = masked_score(torch.float32)
    queries, keys = torch.tensor([[1, 2, 2, 0]]), torch.tensor([[1, 1, 2]])
    assert segment_bias(queries, keys, torch.float32).tolist() == [
        [[[0, 0, low], [low, low, 0], [low, low, 0], [low, low, low]]]
    ]
    assert segment_bias(keys, keys, torch.float32, causal=True).tolist() == [
        [[[0, low, low], [0, 0, low], [low, low, 0]]]
    ]
