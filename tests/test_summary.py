"""What a run would do, told without doing it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from trainer.build import build
from trainer.composition import compose
from trainer.config import to_config
from trainer.errors import ConfigError
from trainer.parts import check_fit
from trainer.summary import dry_run
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.masked_lm import MaskedLM
from trainer.tasks.text_classification import TextClassification
from trainer.tasks.translation import Translation


@pytest.mark.parametrize(
    ("experiment", "ranks", "parameters", "stage"),
    [
        ("decoder_7b_zero3", 64, "6,738,415,616", 3),
        ("decoder_70b_zero3", 512, "70,553,706,496", 3),
        ("encoder_decoder_3b_zero3_offload", 1, "2,849,757,184", 3),
    ],
)
def test_large_shapes_print_their_plan_without_a_gpu(monkeypatch, experiment, ranks, parameters, stage):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    text = dry_run(to_config(compose([f"experiment={experiment}"])))
    assert f"{parameters} parameters" in text
    assert f'"world_size": {ranks}' in text
    assert f"ZeRO stage {stage}" in text and f'"stage": {stage}' in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["experiment=quickstart", "engine.tensor_parallel=3"],
            "engine.tensor_parallel=3 does not divide.*4 num_heads",
        ),
        (["experiment=translation_lstm", "engine.sequence_parallel=3"], "LSTMSeq2Seq does not split its positions"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_in_a_dry_run_too(monkeypatch, words, message):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=message):
        dry_run(to_config(compose(words)))


def test_a_batch_that_does_not_fit_the_ranks_is_refused_in_a_dry_run_too(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(ConfigError, match="7 ranks"):
        dry_run(to_config(compose(["experiment=quickstart"])))


class Whatever:
    """A task that makes short sequences; a model that overflows in fp16, or not."""

    max_length = 8
    max_positions = 8

    def __init__(self, overflows: bool) -> None:
        self.overflows_in_fp16 = overflows


@pytest.mark.parametrize(
    ("words", "overflows", "device", "message"),
    [
        (["engine=zero2"], False, "cpu", "does not run on a CPU"),
        (["engine=plain"], False, "cuda", "needs the loss scaling"),
        (["engine=zero2"], True, "cuda", "force_fp16=true"),
        (["engine=zero2", "force_fp16=true"], True, "cuda", None),
        (["engine=zero2"], False, "cuda", None),
    ],
)
def test_fp16_is_refused_where_it_cannot_work_with_the_reason(monkeypatch, words, overflows, device, message):
    monkeypatch.setattr("trainer.distributed.device", lambda: torch.device(device))
    config = to_config(compose(["experiment=quickstart", "precision=fp16", *words]))
    if message is None:
        check_fit(config, Whatever(False), Whatever(overflows), None)
    else:
        with pytest.raises(ConfigError, match=message):
            check_fit(config, Whatever(False), Whatever(overflows), None)


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (MaskedLM, "decoder", "MaskedLM trains models for masked_lm, and this Decoder is one for causal_lm"),
        (CausalLM, "encoder", "CausalLM trains models for causal_lm, and this Encoder is one for masked_lm"),
        (TextClassification, "encoder", "this Encoder is one for masked_lm; .* model.head"),
        (Translation, "decoder", "Translation trains models for text_to_text"),
        (MaskedLM, "lstm", "this LSTMSeq2Seq is one for text_to_text"),
        (MaskedLM, "encoder", None),
        (CausalLM, "decoder", None),
    ],
)
def test_a_task_on_a_model_for_another_is_refused(task, model, message):
    config = to_config(compose(["name=x", "steps=1", "batch.global_size=1", f"model={model}"]))
    given = type(task.__name__, (), {"max_length": None, "objective": task.objective})()
    with torch.device("meta"):
        built = build(config.model, "model")
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_fit(config, given, built, None)


def test_the_t5_variant_is_known_to_overflow():
    config = to_config(compose(["experiment=encoder_decoder_3b_zero3_offload"]))
    with torch.device("meta"):
        assert build(config.model, "model").overflows_in_fp16
        assert not build(to_config(compose(["experiment=quickstart"])).model, "model").overflows_in_fp16
