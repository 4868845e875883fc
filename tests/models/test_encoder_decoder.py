"""The encoder-decoder: its variants, its equality with T5, decoding with a cache, sizes and initialisation."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models.encoder_decoder import EncoderDecoder

T5 = {
    "norm": "rms",
    "activation": "geglu",
    "positions": "relative",
    "bias": False,
    "tie_embeddings": False,
    "scale_attention": False,
    "scale_embeddings": False,
}
BART = {
    "positions": "learned",
    "norm_position": "post",
    "norm_eps": 1e-5,
    "embedding_norm": True,
    "activation": "gelu",
    "head_bias": True,
    "scale_embeddings": False,
    "scale_tied_head": False,
}
MARIAN = {
    "positions": "sinusoidal_halves",
    "norm_position": "post",
    "norm_eps": 1e-5,
    "activation": "silu",
    "head_bias": True,
}
VARIANTS = {
    "default": {},
    "post-norm": {"norm_position": "post", "activation": "gelu", "positions": "learned", "head_bias": True},
    "t5": T5,
    "bart": BART,
    "marian": MARIAN,
    "tied t5": {**T5, "tie_embeddings": True, "activation": "swiglu", "d_kv": 24},
}


def build(**options):
    model = EncoderDecoder(
        50, **{"d_model": 32, "num_heads": 4, "d_ff": 64, "encoder_layers": 2, "decoder_layers": 2, **options}
    )
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.eval()


def make_batch(lengths=(7, 3, 5), target=6):
    generator = torch.Generator().manual_seed(1)
    return {
        "source_ids": torch.randint(0, 50, (len(lengths), max(lengths)), generator=generator),
        "source_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        "decoder_input_ids": torch.randint(0, 50, (len(lengths), target), generator=generator),
    }


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(**VARIANTS[request.param])


def test_cached_decoding_gives_the_logits_of_one_forward_pass(model):
    batch = make_batch(target=40)  # longer than the cache grows at once
    with torch.inference_mode():
        state = model.start_decoding(batch)
        steps = [model.decode_step(state, batch["decoder_input_ids"][:, step]) for step in range(40)]
        torch.testing.assert_close(torch.stack(steps, dim=1), model(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [[2, 0], [0, 0, 0, 1, 1, 1, 2, 2, 2], [2, 2, 0, 0], [1, 0, 0], [0, 1, 0, 2]])
def test_selected_rows_go_on_as_their_own_sentences(model, rows):
    batch, rows = make_batch(), torch.tensor(rows)
    chosen = {name: tensor[rows] for name, tensor in batch.items()}
    with torch.inference_mode():
        state = model.start_decoding(batch)
        for step in range(3):
            model.decode_step(state, batch["decoder_input_ids"][:, step])
        selected = state.select(rows)
        logits = model.decode_step(selected, chosen["decoder_input_ids"][:, 3])
        again = selected.select(torch.arange(len(rows)).flip(0))
        after = model.decode_step(again, chosen["decoder_input_ids"][:, 4].flip(0)).flip(0)
        expected = model(chosen)
        unchanged = model.decode_step(state, batch["decoder_input_ids"][:, 3])
        torch.testing.assert_close(logits, expected[:, 3], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after, expected[:, 4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(unchanged, model(batch)[:, 3], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(model):
    batch = make_batch()
    with torch.inference_mode():
        together = model(batch)
        for index, length in enumerate((7, 3, 5)):
            alone = model(
                {name: tensor[index : index + 1] for name, tensor in batch.items()}
                | {
                    "source_ids": batch["source_ids"][index : index + 1, :length],
                    "source_mask": batch["source_mask"][index : index + 1, :length],
                }
            )
            torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=1e-5)


def test_the_decoder_does_not_see_the_future(model):
    batch = make_batch()
    changed = {**batch, "decoder_input_ids": batch["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, 3:] = 7
    with torch.inference_mode():
        before, after = model(batch), model(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 3:], after[:, 3:], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_source_of_padding_alone_gives_no_nan(model, dtype):
    batch = make_batch()
    batch["source_mask"][1] = False
    logits = model.to(dtype)(batch)
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert logits.dtype == dtype
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_mode_takes_other_kernels_but_computes_the_same(variant, monkeypatch):
    """With dropout on, attention runs unfused: with every mask kept it must agree with evaluation, in gradients too."""
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    model, batch = build(**VARIANTS[variant], **rates), make_batch()
    weights = torch.randn(3, 6, 50, generator=torch.Generator().manual_seed(2))

    def gradients():
        model.zero_grad()
        (model(batch) * weights).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    fused = gradients()
    monkeypatch.setattr("trainer.models.layers._keep_mask", lambda x, p: torch.full_like(x, 1 - p))
    model.train()
    torch.testing.assert_close(gradients(), fused, atol=1e-4, rtol=1e-4)


def test_every_parameter_is_trained(model):
    model(make_batch()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def copy_t5_weights(theirs, ours):
    """Fill `ours` from transformers' T5."""

    def attention(into, layer, prefix, norm):
        norm.weight.copy_(layer.layer_norm.weight)
        source = getattr(layer, prefix)
        into.out.weight.copy_(source.o.weight)
        parts = torch.cat([source.q.weight, source.k.weight, source.v.weight])
        if prefix == "SelfAttention":
            into.qkv.weight.copy_(parts)
        else:
            into.q.weight.copy_(source.q.weight)
            into.kv.weight.copy_(parts[len(source.q.weight) :])

    ours.embedding.weight.copy_(theirs.shared.weight)
    ours.head.weight.copy_(theirs.lm_head.weight)
    for side in ("encoder", "decoder"):
        stack = getattr(theirs, side)
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
        getattr(ours, f"{side}_positions").table.weight.copy_(bias.weight)
        getattr(ours, f"{side}_norm").weight.copy_(stack.final_layer_norm.weight)
        for block, layer in zip(stack.block, getattr(ours, side), strict=True):
            attention(layer.self_attention, block.layer[0], "SelfAttention", layer.self_norm)
            if side == "decoder":
                attention(layer.cross_attention, block.layer[1], "EncDecAttention", layer.cross_norm)
            dense = block.layer[-1].DenseReluDense
            layer.feed_forward_norm.weight.copy_(block.layer[-1].layer_norm.weight)
            layer.feed_forward.gate.weight.copy_(dense.wi_0.weight)
            layer.feed_forward.w_in.weight.copy_(dense.wi_1.weight)
            layer.feed_forward.w_out.weight.copy_(dense.wo.weight)


def make_t5(**sizes):
    """transformers' T5 v1.1 with a head of its own (the library ties it whatever the configuration says)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes)
    theirs = transformers.T5ForConditionalGeneration(config)
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    return theirs.eval()


def test_logits_and_gradients_equal_t5():
    torch.manual_seed(0)
    theirs = make_t5(vocab_size=50, d_model=32, d_kv=12, d_ff=64, num_layers=2, num_heads=4)
    ours = build(**T5, d_kv=12)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)  # norms that are not all one
        copy_t5_weights(theirs, ours)
    batch = make_batch(lengths=(70, 150, 9), target=140)  # beyond the largest distance with a bucket of its own
    expected = theirs(
        input_ids=batch["source_ids"],
        attention_mask=batch["source_mask"],
        decoder_input_ids=batch["decoder_input_ids"],
    ).logits
    logits = ours(batch)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    expected.square().mean().backward()
    logits.square().mean().backward()
    for side in ("encoder", "decoder"):
        bias = getattr(theirs, side).block[0].layer[0].SelfAttention.relative_attention_bias
        gradient = getattr(ours, f"{side}_positions").table.weight.grad
        torch.testing.assert_close(gradient, bias.weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.shared.weight.grad, atol=1e-5, rtol=1e-4)


def test_the_shape_of_t5_xl_has_its_exact_parameter_count():
    sizes = {"d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_heads": 32}
    with torch.device("meta"):
        ours = EncoderDecoder(32128, **sizes, encoder_layers=24, decoder_layers=24, **T5)
        theirs = make_t5(vocab_size=32128, **sizes, num_layers=24)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) == 2_849_757_184


def test_weights_are_the_same_however_the_model_came_to_be():
    with torch.device("meta"):
        materialised = EncoderDecoder(50, 32, 4, 64)
    materialised.to_empty(device="cpu").to(torch.bfloat16)
    materialised.reset_parameters(torch.Generator().manual_seed(0))
    direct = EncoderDecoder(50, 32, 4, 64)
    direct.reset_parameters(torch.Generator().manual_seed(0))
    for one, other in zip(materialised.parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(one, other.bfloat16(), atol=0, rtol=0)
    assert materialised(make_batch()).isfinite().all()


@pytest.mark.parametrize("scale_attention", [True, False])
def test_initial_deviations(scale_attention):
    model = EncoderDecoder(
        2000, d_model=128, num_heads=4, d_ff=512, encoder_layers=1, decoder_layers=1, scale_attention=scale_attention
    )
    model.reset_parameters(torch.Generator().manual_seed(0))
    layer = model.decoder[0]
    queries, keys, values = layer.self_attention.qkv.weight.chunk(3)
    query_std = 128**-0.5 if scale_attention else (128 * 32) ** -0.5
    for weight, std in [
        (model.embedding.weight, 128**-0.5),
        (queries, query_std),
        (keys, 128**-0.5),
        (values, 128**-0.5),
        (layer.cross_attention.q.weight, query_std),
        (layer.cross_attention.kv.weight, 128**-0.5),
        (layer.feed_forward.w_in.weight, 128**-0.5),
        (layer.feed_forward.w_out.weight, 512**-0.5),
    ]:
        assert math.isclose(weight.std().item(), std, rel_tol=0.03)
        assert abs(weight.mean()) < 0.03 * std
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name


@pytest.mark.parametrize(
    ("options", "stds"),
    [
        ({}, {"embedding": 128**-0.5}),
        (T5, {"embedding": 1.0, "head": 128**-0.5, "encoder_positions.table": 128**-0.5}),
        ({**T5, "tie_embeddings": True}, {"embedding": 1.0}),
        (BART, {"embedding": 128**-0.5, "encoder_positions": 0.02, "decoder_positions": 0.02}),
        (MARIAN, {"embedding": 128**-0.5}),
    ],
)
def test_first_deviations_of_tables(options, stds):
    """As docs/models.md tells them; norms begin as the identity, and all biases at zero."""
    model = build(**{**options, "d_model": 128, "relative_buckets": 256})
    for name, std in stds.items():
        weight = model.get_parameter(f"{name}.weight")
        assert math.isclose(weight.std().item(), std, rel_tol=0.06), name
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_logits_begin_near_uniform_whatever_the_variant(model):
    with torch.inference_mode():
        assert 0.3 < model(make_batch()).std() < 3


def test_flops_count_every_matrix_once_per_position_that_uses_it():
    model = build(bias=False)
    attention = 32 * 32
    encoder_layer = 4 * attention + 2 * 32 * 64
    decoder_target = 6 * attention + 2 * 32 * 64
    matrices = 2 * (encoder_layer * 7 + decoder_target * 5 + 2 * attention * 7) + 50 * 32 * 5
    scores = 2 * 12 * 32 * (7 * 7 + 5 * 5 + 5 * 7)
    assert model.flops_per_sample(source_length=7, target_length=5) == 6 * matrices + scores


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"d_model": 30}, "model.d_model=30 .* model.num_heads=4"),
        ({"positions": "learned", "max_positions": None}, "model.max_positions"),
        ({"d_model": 33, "d_kv": 8}, "model.d_model=33"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        build(**options)
