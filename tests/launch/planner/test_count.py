"""The count under fake tensors: it agrees with PyTorch's own, with what real engines send, and with the formulas."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from launch.planner.count import count, main
from launch.planner.ledger import Ledger
from trainer.composition import compose
from trainer.config import Config, to_config
from trainer.estimate import layout_of, load_cluster, predict, shape_of

DECODER = (
    "experiment=decoder_7b_zero3", "model.d_model=256", "model.num_heads=4", "model.num_kv_heads=4", "model.d_ff=688",
    "model.num_layers=3", "model.max_positions=512", "task.sequence_length=512", "tokenizer.vocab_size=8000",
    "batch.global_size=64", "batch.micro_tokens=null", "batch.micro_size=8",
)  # fmt: skip
T5 = (
    "experiment=encoder_decoder_3b_zero3_offload", "model.d_model=256", "model.num_heads=4", "model.d_ff=640",
    "model.encoder_layers=3", "model.decoder_layers=3", "tokenizer.vocab_size=8000", "task.max_target_length=128",
    "batch.global_size=64", "batch.micro_tokens=null", "batch.micro_size=8",
)  # fmt: skip
ENCODER = ("experiment=bert_masked_lm", "model.d_model=256", "model.d_ff=1024", "batch.global_size=128",
           "batch.micro_size=16", "task.sequence_length=128")  # fmt: skip
LARGE = ("experiment=decoder_7b_zero3", "model.num_layers=6", "batch.global_size=128")


def configured(*words: str) -> Config:
    return to_config(compose(["logging=[]", *words]))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (8, (*DECODER, "engine=plain")),
        (8, (*DECODER, "engine=plain", "precision=fp32", "engine.tensor_parallel=2")),
        (4, (*DECODER, "engine=plain", "model.num_kv_heads=2", "engine.recompute=selective", "data.batching=packed")),
        (4, (*DECODER, "engine=zero1", "engine.sequence_parallel=2")),
        (8, (*DECODER, "engine=zero2", "precision=fp32")),
        (8, (*DECODER, "engine=zero3")),
        (4, (*T5, "engine=plain")),
        (4, (*T5, "engine=zero2", "engine.recompute=full")),
        (4, (*ENCODER, "engine=zero1")),
        (64, LARGE),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else str(value),
)
def test_formulas_and_count_agree(ranks: int, words: tuple[str, ...]) -> None:
    """Memory within 3 %; what is sent, within 1 %."""
    config = configured(*words)
    found = count(config, ranks)
    made = predict(shape_of(config), layout_of(config, ranks), load_cluster("h100_8x8").with_ranks(ranks))
    memory = sum(term.value for term in made.memory if term.name not in ("libraries", "fragmentation"))
    assert memory == pytest.approx(found.peak_bytes, rel=0.03)
    passed = sum(
        (2 if kind == "allreduce" else 1) * size * times * (ranks - 1) / ranks
        for kind, size, ranks, times in found.sent
    )
    assert sum(term.bytes_sent for term in made.step) == pytest.approx(passed, rel=0.01)


def test_totals_are_those_of_pytorchs_own_tracker() -> None:
    tracker, ledger = MemTracker(), Ledger()
    with tracker, ledger:
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
        model(torch.randn(32, 64)).square().sum().backward()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert ledger.peak.num_bytes == theirs > 0


def test_what_is_freed_counts_no_longer() -> None:
    with Ledger() as ledger:
        first = torch.empty(1000)
        view = first[10:]
        del first
        assert ledger.num_bytes == 4000
        del view
        assert ledger.num_bytes == 0 and ledger.peak.num_bytes == 4000


def test_real_tensors_and_fake_ones_count_alike() -> None:
    """An engine on one rank, with and without memory."""
    from launch.planner.count import _count_step
    from trainer.parallel.layout import Layout
    from trainer.parts import make_engine
    from trainer.plan import make_plan

    config = configured(*DECODER, "engine=plain", "batch.micro_size=1", "batch.global_size=2", "model.num_layers=1")
    fake = count(config, 1, "cpu")
    with Ledger() as ledger:
        from trainer.build import build

        engine = make_engine(config, make_plan(config, 1), lambda: build(config.model, "model"), Layout())
        with torch.no_grad():
            for parameter in engine.module.parameters():  # whatever memory held may be no number, and then no update
                parameter.fill_(0.01)
        real = _count_step(config, layout_of(config, 1), engine, Layout(), ledger)
    assert real.peak_bytes == pytest.approx(fake.peak_bytes, rel=0.01)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*DECODER, "engine=plain", "logging=[]", "world_size=8"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "rank 0 of 8" in table and "activations" in table and "allreduce" in table
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ranks"] == 8 and told["held"]["optimizer states"] > 0 and told["sent_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world_size=0"], "world_size=0 is not a whole number above 0"),
        (["device=tpu"], "device=tpu is not known"),
        (["precision=fp16"], "count precision=bf16"),
        (["engine.compile=true"], "count engine.compile=false"),
        (["world_size=7"], "does not divide over 7 ranks"),
    ],
)
def test_what_cannot_be_counted_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main([*DECODER, "engine=plain", "logging=[]", *words]) == 2
    assert message in capsys.readouterr().err


def test_other_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=digits_mlp", "logging=[]"]) == 2
    assert "only decoders, encoder-decoders and masked language models" in capsys.readouterr().err
