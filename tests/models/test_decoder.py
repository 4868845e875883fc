"""The decoder-only model: its equality with Llama, decoding with a cache, sizes and initialisation."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models.decoder import Decoder

VARIANTS = {
    "llama": {},
    "yarn": {"rotary_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "qwen2": {"bias": "qkv"},
    "qwen3": {"qk_norm": True, "head_dim": 12},
    "gpt2": {
        "positions": "learned",
        "norm": "layer",
        "activation": "gelu_tanh",
        "bias": "all",
        "num_kv_heads": None,
        "tie_embeddings": True,
    },
}


def build(**options):
    model = Decoder(50, **{"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 64, "num_layers": 2, **options})
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.eval()


def build_variant(variant):
    """Of weights among which biases and norms' weights count too."""
    model = build(**VARIANTS[variant], init_std=0.1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def make_ids(size=3, length=9):
    return torch.randint(0, 50, (size, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", [1, 5])
def test_cached_decoding_gives_the_logits_of_one_forward_pass(prompt, variant):
    model, ids = build_variant(variant), make_ids(length=50)
    with torch.inference_mode():
        state = model.start_decoding({"input_ids": ids[:, :prompt]})
        assert torch.equal(state.first_ids, ids[:, prompt - 1])
        steps = [model.decode_step(state, ids[:, step]) for step in range(prompt - 1, 50)]
        expected = model({"input_ids": ids})[:, prompt - 1 :]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_padded_on_either_side_go_on_as_if_alone(side, variant):
    model, ids, lengths = build_variant(variant), make_ids(), (6, 3, 1)
    prompts, mask = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(6 - length, 6)
        prompts[row, place], mask[row, place] = ids[row, :length], True
    with torch.inference_mode():
        state = model.start_decoding({"input_ids": prompts, "attention_mask": mask})
        assert state.first_ids.tolist() == [int(ids[row, length - 1]) for row, length in enumerate(lengths)]
        first = model.decode_step(state, state.first_ids)
        state = state.select(torch.tensor([2, 1, 1]))
        second = model.decode_step(state, torch.stack([ids[2, 1], ids[1, 3], ids[1, 3]]))
        expected = model({"input_ids": ids})
    for row, length in enumerate(lengths):
        torch.testing.assert_close(first[row], expected[row, length - 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second[0], expected[2, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second[1:], expected[1, 3].expand(2, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("variant", "dtype"), [*((variant, torch.float32) for variant in VARIANTS), ("llama", torch.bfloat16)]
)
def test_padding_changes_nothing_and_gives_no_nan(side, variant, dtype):
    model, ids = build(**VARIANTS[variant]).to(dtype), make_ids(2, 6)
    padded, mask = torch.zeros(3, 10, dtype=torch.int64), torch.zeros(3, 10, dtype=torch.bool)
    place = slice(0, 6) if side == "right" else slice(4, 10)
    padded[:2, place], mask[:2, place] = ids, True
    logits = model({"input_ids": padded, "attention_mask": mask})
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits[:2, place], model({"input_ids": ids}), atol=tolerance, rtol=tolerance)


def test_the_model_does_not_see_the_future():
    model, ids = build(), make_ids()
    changed = ids.clone()
    changed[:, 4:] = 7
    with torch.inference_mode():
        before, after = model({"input_ids": ids}), model({"input_ids": changed})
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-4)


def test_attention_dropout_takes_other_kernels_but_computes_the_same(monkeypatch):
    model, ids = build(dropout=0.1, attention_dropout=0.1), make_ids()

    def gradients():
        model.zero_grad()
        model({"input_ids": ids}).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    fused = gradients()
    monkeypatch.setattr("trainer.models.layers._keep_mask", lambda x, p: torch.full_like(x, 1 - p))
    model.train()
    torch.testing.assert_close(gradients(), fused, atol=1e-4, rtol=1e-4)


def make_llama(**sizes):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def copy_llama_weights(theirs, ours):
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    ours.head.weight.copy_(theirs.lm_head.weight)
    ours.norm.weight.copy_(theirs.model.norm.weight)
    for source, layer in zip(theirs.model.layers, ours.layers, strict=True):
        attention, mlp = source.self_attn, source.mlp
        layer.attention_norm.weight.copy_(source.input_layernorm.weight)
        layer.feed_forward_norm.weight.copy_(source.post_attention_layernorm.weight)
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        layer.attention.qkv.weight.copy_(torch.cat(qkv))
        layer.attention.out.weight.copy_(attention.o_proj.weight)
        layer.feed_forward.gate.weight.copy_(mlp.gate_proj.weight)
        layer.feed_forward.w_in.weight.copy_(mlp.up_proj.weight)
        layer.feed_forward.w_out.weight.copy_(mlp.down_proj.weight)


def test_logits_and_gradients_equal_llama():
    torch.manual_seed(0)
    theirs = make_llama(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
    )
    ours, ids = build(norm_eps=1e-5), make_ids(3, 60)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)  # norms that are not all one
        copy_llama_weights(theirs, ours)
    logits, expected = ours({"input_ids": ids}), theirs(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    attention = theirs.model.layers[0].self_attn
    gradient = torch.cat([attention.q_proj.weight.grad, attention.k_proj.weight.grad, attention.v_proj.weight.grad])
    scale = float(gradient.abs().max())
    torch.testing.assert_close(ours.layers[0].attention.qkv.weight.grad, gradient, atol=1e-5 * scale, rtol=1e-4)
    norm_gradient = theirs.model.layers[0].input_layernorm.weight.grad
    scale = float(norm_gradient.abs().max())
    torch.testing.assert_close(ours.layers[0].attention_norm.weight.grad, norm_gradient, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize(
    ("vocab_size", "shape", "count"),
    [
        (32000, {"d_model": 4096, "num_heads": 32, "num_kv_heads": 32, "d_ff": 11008, "num_layers": 32}, 6_738_415_616),
        (
            128256,
            {"d_model": 8192, "num_heads": 64, "num_kv_heads": 8, "d_ff": 28672, "num_layers": 80},
            70_553_706_496,
        ),
    ],
    ids=["llama-2-7b", "llama-3-70b"],
)
def test_the_large_shapes_have_their_exact_parameter_counts(vocab_size, shape, count):
    with torch.device("meta"):
        ours = Decoder(vocab_size, **shape)
        theirs = make_llama(
            vocab_size=vocab_size,
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape["num_kv_heads"],
        )
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count


INTO_THE_STREAM = 0.03 / math.sqrt(2 * 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_values_are_those_of_the_table(variant):
    """The table in docs/models.md: every parameter of every variant has its row."""
    shape = {"d_model": 128, "num_heads": 8, "d_ff": 512, "num_layers": 8, "init_std": 0.03, "max_positions": 512}
    model = Decoder(2000, **{**shape, **VARIANTS[variant], "tie_embeddings": False})
    model.reset_parameters(torch.Generator().manual_seed(0))
    for name, value in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            std = INTO_THE_STREAM if name.endswith(("attention.out.weight", "w_out.weight")) else 0.03
            assert value.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel()), name


def test_a_model_built_on_meta_computes_what_one_built_directly_does():
    with torch.device("meta"):
        materialised = Decoder(50, 32, 4, 2, 64, 2)
    materialised.to_empty(device="cpu")
    materialised.reset_parameters(torch.Generator().manual_seed(0))
    ids = make_ids()
    torch.testing.assert_close(materialised.eval()({"input_ids": ids}), build()({"input_ids": ids}))


def test_decoding_before_training_leaves_no_inference_tensors_behind():
    model = build(head_dim=6)  # a rotary table of its own
    with torch.inference_mode():
        model.start_decoding({"input_ids": make_ids()})
    model({"input_ids": make_ids()}).sum().backward()
    assert model.layers[0].attention.qkv.weight.grad.abs().sum() > 0


def test_flops_count_every_matrix_once_per_position():
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64
    assert build().flops_per_sample(target_length=9) == 6 * (2 * layer + 50 * 32) * 9 + 12 * 2 * 32 * 81


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_kv_heads": 3}, "model.num_kv_heads=3"),
        ({"d_model": 36}, "model.head_dim=9"),
        ({"d_model": 34}, "model.d_model=34 does not divide by model.num_heads=4; change one or set model.head_dim"),
        ({"positions": "learned", "rotary_scaling": {"rope_type": "linear", "factor": 2.0}}, "set it to null"),
        (
            {"rotary_scaling": {"rope_type": "lama3"}},
            "lama3 is not known; did you mean llama3. Known are linear",
        ),
        ({"rotary_scaling": {"factor": 2.0}}, "rope_type=None is not known"),
        ({"rotary_scaling": {"rope_type": "linear"}}, "model.rotary_scaling.factor is missing: rope_type=linear"),
        ({"rotary_scaling": {"rope_type": "linear", "factor": -1}}, "factor=-1 is no number above 0"),
        (
            {"rotary_scaling": {"rope_type": "linear", "factor": 2, "beta": 1}},
            "model.rotary_scaling.beta=1 is none of rope_type=linear, which has factor",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        build(**options)
