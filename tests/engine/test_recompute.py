"""Recomputing and offloading change what is kept for the backward pass, and nothing else."""

from __future__ import annotations

import pytest
import torch
from bench.recompute import LiveBytes

from tests.conftest import ROOT
from tests.warm import run_warm
from trainer.build import build
from trainer.composition import compose
from trainer.config import ActivationOffload, Recompute, to_config
from trainer.engine.recompute import lighten, stacked_layers
from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.parts import check_fit

SIZES = {"vocab_size": 50, "d_model": 32, "num_heads": 4, "d_ff": 64, "dropout": 0.2}


def batch_of(kind, samples=4, length=24):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, SIZES["vocab_size"], (samples, length), generator=generator)
    if kind is Decoder:
        return {"input_ids": ids}
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, length // 2 :] = False
    return {"source_ids": ids, "source_mask": mask, "decoder_input_ids": ids.flip(1)}


def model_of(kind, recompute="none", offload="none", **sizes):
    layers = {"num_layers": 3} if kind is Decoder else {"encoder_layers": 2, "decoder_layers": 2}
    model = kind(**{**SIZES, "attention_dropout": 0.1, **layers, **sizes})
    model.reset_parameters(torch.Generator().manual_seed(1))
    return lighten(model, Recompute(recompute), ActivationOffload(offload))


def learn(model, batch):
    """Loss and gradients, dropout on."""
    torch.manual_seed(7)
    loss = model(batch).float().square().mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"positions": "relative", "norm": "rms", "activation": "geglu"}])
@pytest.mark.parametrize(("recompute", "offload"), [("selective", "none"), ("full", "none"), ("full", "cpu")])
@pytest.mark.parametrize("kind", [EncoderDecoder, Decoder])
def test_loss_and_gradients_are_the_same_to_the_last_bit(kind, recompute, offload, options):
    if kind is Decoder:
        options = {"qk_norm": True} if options else {}
    batch = batch_of(kind)
    loss, gradients = learn(model_of(kind, **options), batch)
    again, same = learn(model_of(kind, recompute, offload, **options), batch)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name


@pytest.mark.parametrize("kind", [EncoderDecoder, Decoder])
def test_less_is_kept(kind):
    """The peak over forward and backward, of a batch whose activations are larger than the weights."""
    batch, peaks = batch_of(kind, samples=8, length=64), {}
    for recompute in ("none", "selective", "full"):
        model = model_of(kind, recompute)
        with LiveBytes() as live:
            learn(model, batch)
        peaks[recompute] = live.peak
    assert peaks["selective"] < 0.8 * peaks["none"]
    assert peaks["full"] < 0.76 * peaks["selective"]


def test_generating_and_evaluating_do_not_go_through_it():
    model = model_of(Decoder, "full").eval()
    with torch.no_grad():
        state = model.start_decoding(batch_of(Decoder))
        assert model.decode_step(state, torch.ones(4, dtype=torch.long)).shape == (4, 50)


def test_the_layers_of_a_stack_are_found_and_a_model_without_them_is_refused():
    assert len(stacked_layers(model_of(EncoderDecoder))) == 4
    words = ["experiment=digits_mlp", "engine.recompute=full", "engine.offload_activations=cpu"]
    config = to_config(compose(words))
    with pytest.raises(ValueError, match=r"engine.recompute=full: MLP has no stack of layers; use engine.recompute=no"):
        check_fit(config, type("Task", (), {"max_length": None})(), build(config.model, "model"), None)


def test_a_compiled_model_decides_for_itself():
    with pytest.raises(ValueError, match=r"engine.recompute=full does not go with engine.compile=true"):
        to_config(compose(["experiment=quickstart", "engine.recompute=full", "engine.compile=true"]))


@pytest.mark.dist
def test_sharded_engines_learn_the_same(trainer_env):
    """Two ranks; see `recompute_on_ranks.py`. Without dropout autograd copies gradients where it took them over."""
    cases = ["zero3:full:0.1", "zero3:selective:0.1", "zero3:full:0.0", "zero2:full:0.1", "zero1:selective:0.1"]
    done = run_warm("tests.engine.recompute_on_ranks", cases, 2, ROOT, trainer_env, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.partition(" ")[0] for line in done.stdout.splitlines() if "is the same" in line] == cases
