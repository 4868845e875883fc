"""The LSTM encoder-decoder and its attentions, against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models.lstm_seq2seq import LSTMSeq2Seq

KINDS = ("bahdanau", "luong", "none")


def build(attention, **options):
    model = LSTMSeq2Seq(50, **{"d_model": 12, "hidden_size": 16, "num_layers": 2, **options}, attention=attention)
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.eval()


def make_batch(lengths=(7, 3, 5), target=6):
    generator = torch.Generator().manual_seed(1)
    return {
        "source_ids": torch.randint(0, 50, (len(lengths), max(lengths)), generator=generator),
        "source_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        "decoder_input_ids": torch.randint(0, 50, (len(lengths), target), generator=generator),
    }


@pytest.mark.parametrize("attention", KINDS)
def test_step_by_step_decoding_gives_the_logits_of_one_forward_pass(attention):
    model, batch = build(attention), make_batch()
    with torch.inference_mode():
        state = model.start_decoding(batch)
        steps = [model.decode_step(state, batch["decoder_input_ids"][:, step]) for step in range(6)]
        torch.testing.assert_close(torch.stack(steps, dim=1), model(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("rows", [[2, 0], [0, 0, 1, 1, 2, 2], [1, 0, 0]])
def test_selected_rows_go_on_as_their_own_sentences(attention, rows):
    model, batch, rows = build(attention), make_batch(), torch.tensor(rows)
    with torch.inference_mode():
        state = model.start_decoding(batch)
        for step in range(3):
            model.decode_step(state, batch["decoder_input_ids"][:, step])
        logits = model.decode_step(state.select(rows), batch["decoder_input_ids"][rows, 3])
        torch.testing.assert_close(logits, model(batch)[rows, 3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", KINDS)
def test_padding_changes_nothing(attention):
    model, batch = build(attention), make_batch()
    with torch.inference_mode():
        together = model(batch)
        for index, length in enumerate((7, 3, 5)):
            alone = model(
                {
                    "source_ids": batch["source_ids"][index : index + 1, :length],
                    "source_mask": batch["source_mask"][index : index + 1, :length],
                    "decoder_input_ids": batch["decoder_input_ids"][index : index + 1],
                }
            )
            torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", KINDS)
def test_every_parameter_is_trained_and_a_source_of_padding_alone_gives_no_nan(attention, dtype):
    model, batch = build(attention).to(dtype).train(), make_batch()
    batch["source_mask"][1] = False
    logits = model(batch)
    logits.float().square().sum().backward()
    assert logits.isfinite().all()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("attention", ["bahdanau", "luong"])
def test_attention_follows_its_formula(attention):
    """One sentence, written out position by position."""
    model = build(attention, num_layers=1)
    batch = {name: tensor[:1] for name, tensor in make_batch().items()}
    with torch.inference_mode():
        memory, (final, _) = model.encoder(model.embedding(batch["source_ids"]))
        hidden = torch.tanh(model.bridge(torch.cat([final[0], final[1]], dim=-1)))[None]
        cell, memory, logits = torch.zeros_like(hidden), memory[0], []
        for token in batch["decoder_input_ids"][0]:
            vector = model.embedding(token[None, None])
            before = hidden[0, 0]
            out, (hidden, cell) = model.decoder(vector, (hidden, cell))
            top = out[0, 0]
            if attention == "luong":
                scores = torch.stack([top @ model.keys(m) for m in memory])
            else:
                scores = torch.stack(
                    [model.score.v(torch.tanh(model.queries(before) + model.keys(m)))[0] for m in memory]
                )
            context = scores.softmax(0) @ memory
            readout = torch.tanh(model.readout(torch.cat([top, context, vector[0, 0]])))
            logits.append(model.embedding.weight @ readout)
        torch.testing.assert_close(model(batch)[0], torch.stack(logits), atol=1e-5, rtol=1e-5)


def test_without_attention_only_the_final_state_passes_from_source_to_target():
    """A source read to the same final state gives the same logits, whatever the states on the way."""
    model = build("none", num_layers=1)
    batch = make_batch()
    with torch.inference_mode():
        state = model.start_decoding(batch)
        (final, _), *_ = state.memory.keys_values
        assert final.shape == (3, 16)
        expected = torch.tanh(model.bridge(final))
    torch.testing.assert_close(state.hidden[-1], expected)


def test_initial_values():
    model = LSTMSeq2Seq(1000, d_model=64, hidden_size=100, num_layers=2)
    model.reset_parameters(torch.Generator().manual_seed(0))
    recurrent = model.decoder.weight_hh_l1
    assert recurrent.abs().max() <= 0.1
    assert math.isclose(recurrent.std().item(), 0.1 / math.sqrt(3), rel_tol=0.03)
    bias = model.decoder.bias_ih_l0
    assert (bias[100:200] == 1).all()
    assert (bias[:100] == 0).all() and (bias[200:] == 0).all()
    assert (model.decoder.bias_hh_l0 == 0).all()
    assert math.isclose(model.embedding.weight.std().item(), 1 / 8, rel_tol=0.03)


@pytest.mark.parametrize("attention", KINDS)
def test_a_model_built_on_meta_computes_what_one_built_directly_does(attention):
    with torch.device("meta"):
        materialised = LSTMSeq2Seq(50, 12, 16, 2, attention)
    materialised.to_empty(device="cpu")
    materialised.reset_parameters(torch.Generator().manual_seed(0))
    torch.testing.assert_close(materialised.eval()(make_batch()), build(attention)(make_batch()))


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("attention", KINDS)
def test_flops_count_every_matrix_once_per_position(attention, tie_embeddings):
    model = build(attention, tie_embeddings=tie_embeddings)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    source = sum(size for name, size in sizes.items() if name.startswith(("encoder", "keys")))
    skipped = ("encoder", "keys", "bridge", "embedding", "head", "score")
    target = sum(size for name, size in sizes.items() if not name.startswith(skipped)) + 50 * 12
    pairs = 0 if attention == "none" else 2 * 16
    assert model.flops_per_sample(source_length=7, target_length=5) == 6 * (source * 7 + target * 5 + pairs * 35)


def test_an_odd_hidden_size_is_refused():
    with pytest.raises(ConfigError, match="hidden_size=15"):
        build("none", hidden_size=15)
