"""The speech model: its rows are independent, cached decoding, sizes, initialisation, parts of matrices."""

from __future__ import annotations

import pytest
import torch

from trainer.decoding import BeamOptions, beam_search
from trainer.errors import ConfigError
from trainer.models.positions import sinusoids
from trainer.models.speech import SpeechToText
from trainer.parallel.layout import Layout
from trainer.parallel.tensor import split_matrices

SHAPE = {"num_mels": 8, "d_model": 32, "num_heads": 4, "d_ff": 64, "encoder_layers": 2, "decoder_layers": 2}


def build(**options):
    model = SpeechToText(50, **{**SHAPE, "max_source_positions": 20, "max_positions": 40, **options})
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.eval()


def make_batch(lengths=(30, 17, 6), target=6):
    generator = torch.Generator().manual_seed(1)
    return {
        "features": torch.randn(len(lengths), max(lengths), 8, generator=generator),
        "source_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        "decoder_input_ids": torch.randint(0, 50, (len(lengths), target), generator=generator),
    }


@pytest.fixture(scope="module")
def model():
    return build()


def test_cached_decoding_gives_the_logits_of_one_forward_pass(model):
    batch = make_batch(target=40)
    with torch.inference_mode():
        state = model.start_decoding(batch)
        steps = [model.decode_step(state, batch["decoder_input_ids"][:, step]) for step in range(40)]
        torch.testing.assert_close(torch.stack(steps, dim=1), model(batch), atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_padding(model):
    """Odd and even lengths: the second convolution sees a frame beyond the end of an odd one."""
    batch = make_batch()
    with torch.inference_mode():
        together = model(batch)
        for row, length in enumerate((30, 17, 6)):
            alone = {
                "features": batch["features"][row : row + 1, :length],
                "decoder_input_ids": batch["decoder_input_ids"][row : row + 1],
            }
            torch.testing.assert_close(model(alone)[0], together[row], atol=1e-5, rtol=1e-5)


def test_beams_of_a_batch_are_those_of_each_recording(model):
    batch = make_batch()
    del batch["decoder_input_ids"]
    options = BeamOptions(beam_size=3, max_length=8)
    with torch.inference_mode():
        together = beam_search(model, batch, 1, 2, 0, options)
        alone = [
            beam_search(model, {name: tensor[row : row + 1] for name, tensor in batch.items()}, 1, 2, 0, options)[0]
            for row in range(3)
        ]
    assert together == alone


def test_every_parameter_learns_and_lower_precision_works():
    model = build().train()
    model(make_batch()).float().logsumexp(-1).sum().backward()
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not still
    logits = build().to(torch.bfloat16)(make_batch())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_initial_statistics_are_those_of_the_table():
    """docs/models_speech.md: the table of initialisation."""
    model = SpeechToText(400, num_mels=80, d_model=128, num_heads=4, d_ff=512, encoder_layers=1, decoder_layers=1)
    model.reset_parameters(torch.Generator().manual_seed(0))
    expected = {
        "conv1.weight": (2 / (3 * 80)) ** 0.5,
        "conv2.weight": (2 / (3 * 128)) ** 0.5,
        "embedding.weight": 128**-0.5,
        "decoder_positions.weight": 128**-0.5,
        "encoder.0.self_attention.qkv.weight": 128**-0.5,
        "decoder.0.cross_attention.kv.weight": 128**-0.5,
        "decoder.0.feed_forward.w_out.weight": 512**-0.5,
    }
    for name, std in expected.items():
        values = model.get_parameter(name)
        assert values.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(values.mean().item()) < std * 4 / values.numel() ** 0.5, name
    for name, values in model.named_parameters():
        if name.endswith("bias"):
            assert not values.any(), name
        elif "norm" in name:
            assert (values == 1).all(), name


def test_keys_have_no_bias_and_are_split_so():
    model = build()
    with torch.device("meta"):
        slices = split_matrices(build_on_meta(), Layout(rank=1, tensor=2))
    name = "encoder.0.self_attention.qkv"
    assert model.get_parameter(f"{name}.bias").shape == (64,)
    assert slices[f"{name}.weight"].rows == ((16, 32), (48, 64), (80, 96))
    assert slices[f"{name}.bias"].rows == ((16, 32), (48, 64))
    assert slices["decoder.0.cross_attention.kv.bias"].rows == ((16, 32),)
    x = torch.randn(2, 3, 32)
    attention = model.encoder[0].self_attention
    with torch.no_grad():
        attention.qkv.bias.copy_(torch.arange(64.0))
        out = attention.qkv(x) - x @ attention.qkv.weight.T
    torch.testing.assert_close(
        out[0, 0], torch.cat((torch.arange(32.0), torch.zeros(32), torch.arange(32.0, 64.0))), atol=1e-4, rtol=0
    )


def build_on_meta():
    return SpeechToText(50, **SHAPE)


def test_floating_point_operations_are_those_of_the_matrices():
    model = build()
    convolutions = 3 * 32 * (8 * 20 + 32 * 10)
    encoder = 2 * (4 * 32 * 32 + 2 * 32 * 64) * 10
    decoder = 2 * ((4 + 2) * 32 * 32 + 2 * 32 * 64) * 5 + 2 * 2 * 32 * 32 * 10 + 50 * 32 * 5
    scores = 2 * 10 * 10 + 2 * 5 * (5 + 10)
    assert model.flops_per_sample(20, 5) == 6 * (convolutions + encoder + decoder) + 12 * 32 * scores


def test_sinusoids_begin_with_position_zero():
    table = sinusoids(3, 8)
    assert table.shape == (3, 8) and table[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert table[2, 3].item() == pytest.approx(2e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"d_model": 30}, "model.d_model=30 does not divide"), ({"d_model": 3, "num_heads": 1}, "model.d_model=3: ")],
)
def test_shapes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
