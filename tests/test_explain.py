"""Attention and attributions of a translation, and the picture of them."""

from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer.restore
from trainer.data.tokenizer import ByteTokenizer
from trainer.explain import attention_over_source, attributions, explain, main, recorded_attention
from trainer.models.attention import CrossAttention
from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.models.lstm_seq2seq import LSTMSeq2Seq
from trainer.tasks import Encoded
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.classification import Classification
from trainer.tasks.translation import Translation

TOKENIZER = ByteTokenizer().prepare(lambda: iter(()))
SIZES = {"vocab_size": 260, "d_model": 16}
T5 = {
    "positions": "relative",
    "norm": "rms",
    "activation": "geglu",
    "bias": False,
    "tie_embeddings": False,
    "scale_attention": False,
    "scale_embeddings": False,
}


def ready(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.to(dtype).eval().requires_grad_(False)


def transformer(**options: Any) -> Any:
    shape = {"num_heads": 2, "d_ff": 24, "encoder_layers": 1, "decoder_layers": 2}
    return ready(EncoderDecoder(**{**SIZES, **shape, **options}))


def translation(model: Any) -> Any:
    """A run that translates, as `restore_run` gives it."""
    task = Translation(TOKENIZER, "en", "de", max_target_length=12, beam_size=2)
    return SimpleNamespace(task=task, tokenizer=TOKENIZER, model=model, config=SimpleNamespace(name="little"), step=3)


def pair(source: str = "a house", target: str = "Haus") -> dict[str, torch.Tensor]:
    task = translation(None).task
    (sample,) = task.encode([{"en": source, "de": target}])
    assert isinstance(sample, Encoded)
    batch: dict[str, torch.Tensor] = task.collate([sample])
    return batch


def test_attention_is_that_of_the_model_and_every_row_sums_to_one() -> None:
    model, batch = transformer(), pair()
    logits = model(batch)
    with recorded_attention(model) as weights:
        assert torch.equal(model(batch), logits)
    assert [tuple(layer.shape) for layer in weights] == [(1, 2, 5, 8)] * 2
    _, values = model.decoder[0].keys_values(model._encode(batch)[0])
    seen: list[torch.Tensor] = []
    model.decoder[0].cross_attention.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch)
    torch.testing.assert_close((weights[0] @ values).transpose(1, 2).flatten(2), seen[0])
    torch.testing.assert_close(attention_over_source(model, batch, None).sum(dim=1), torch.ones(5))


def test_layers_are_chosen_and_averaged() -> None:
    model, batch = transformer(), pair()
    layers = [attention_over_source(model, batch, layer) for layer in (1, 2)]
    assert not torch.allclose(*layers)
    torch.testing.assert_close(attention_over_source(model, batch, None), sum(layers) / 2)


def test_the_model_is_as_before_after_it_was_looked_at() -> None:
    model = transformer()
    attention_over_source(model, pair(), None)
    assert all("attend" not in vars(one) for one in model.modules() if isinstance(one, CrossAttention))


def test_padding_of_the_source_gets_no_weight() -> None:
    model, batch = transformer(), pair()
    batch["source_mask"][0, 5:] = False
    assert attention_over_source(model, batch, None)[:, 5:].max() == 0


@pytest.mark.parametrize("kind", ["sinusoidal", "t5", "post-norm, tied", "lstm"])
def test_attributions_add_up_to_the_change_of_the_logit(kind: str) -> None:
    options = {"sinusoidal": {}, "t5": T5, "post-norm, tied": {"norm_position": "post"}}
    model = ready(LSTMSeq2Seq(**SIZES, hidden_size=12)) if kind == "lstm" else transformer(**options[kind])
    batch = pair()
    found = attributions(model, batch, TOKENIZER.pad_id, steps=96)
    assert found.shape == (5, 8)
    blank = {**batch, "source_ids": torch.full_like(batch["source_ids"], TOKENIZER.pad_id)}
    at = batch["labels"][0, :, None]
    change = (model(batch)[0].gather(1, at) - model(blank)[0].gather(1, at))[:, 0]
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(found.sum(dim=1), change, rtol=0.02, atol=0.02 * float(change.abs().max()))


def test_a_token_that_is_the_baseline_anyway_has_no_part() -> None:
    model, batch = transformer(), pair()
    batch["source_ids"][0, 3] = TOKENIZER.pad_id
    assert (attributions(model, batch, TOKENIZER.pad_id, steps=2)[:, 3] == 0).all()


def test_rows_are_what_the_run_writes_and_columns_what_it_reads() -> None:
    restored = translation(transformer().bfloat16())
    found = explain(restored, "a ß")
    assert found.source == ["a", "\u2581", *names_of("ß"), "</s>"]
    assert found.target[-1] == "</s>"
    assert found.values.shape == (len(found.target), 5) and found.values.dtype == torch.float32


def names_of(text: str) -> list[str]:
    return [TOKENIZER.token_of(id_) for id_ in TOKENIZER.encode_batch([text])[0]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The run that every name restores."""
    restored = translation(transformer())
    monkeypatch.setattr(trainer.restore, "restore_run", lambda name, runs_dir, checkpoint, allow_targets: restored)
    return restored


@pytest.mark.parametrize("words", [[], ["layer=2"], ["kind=attribution"]])
@pytest.mark.usefixtures("run")
def test_the_picture_is_a_png(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "why.png"
    assert main(["run=r", "text=cost $5$ 日", f"output={path}", *words]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text=a", "kind=gradient"], "kind=gradient is not known; use attention or attribution"),
        (["text=a", "kind=attribution", "layer=1"], "layer=1 is for kind=attention"),
        (["text= "], "text= is empty"),
        ([], "text=... is missing"),
        (["text=a", "layer=3"], "layer=3: the decoder has the layers 1 to 2"),
        (["text=a", "layer=0"], "layer=0: the decoder has the layers 1 to 2"),
        (["text=" + 200 * "a"], "cannot be used"),
        (["text=a", "output=none/why.png"], "output=none/why.png cannot be written"),
    ],
)
@pytest.mark.usefixtures("run")
def test_what_cannot_be_done_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["run=r", *words]) != 0
    assert message in capsys.readouterr().err


def test_runs_that_do_not_translate_are_refused(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run.task = Classification("x", "y", 2)
    assert main(["run=r", "text=a"]) == 2
    assert "run=little: its task Classification writes no text" in capsys.readouterr().err
    run.task = CausalLM(TOKENIZER, "text", sequence_length=16)
    run.model = ready(Decoder(**SIZES, num_heads=2, d_ff=8, num_layers=1))
    assert main(["run=r", "text=a"]) == 2
    assert "Decoder has no source text apart from what it writes" in capsys.readouterr().err
    run.task, run.model = translation(None).task, ready(LSTMSeq2Seq(**SIZES, hidden_size=12))
    assert main(["run=r", "text=a"]) == 2
    assert "LSTMSeq2Seq has no layers of cross-attention; use kind=attribution" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["run=r", "text=a"]) != 0
    assert "shardwright[plots]" in capsys.readouterr().err
