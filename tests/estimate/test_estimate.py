"""The planner's formulas: exact parameters, the states of the ZeRO paper, and what must hold of any prediction."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from trainer import cross_entropy
from trainer.build import build
from trainer.composition import compose, config_directory
from trainer.config import Config, to_config
from trainer.errors import ConfigError
from trainer.estimate import (
    OURS,
    Layout,
    Prediction,
    Shape,
    activations,
    known_clusters,
    layout_of,
    load_cluster,
    memory,
    predict,
    sequence_lengths,
    shape_of,
)
from trainer.models import attention

SEVEN_B = Shape(
    d_model=4096, num_heads=32, d_ff=11008, decoder_layers=32, vocab_size=32000, gated=True, rotary=True, extra=4096
)


def config(*overrides: str) -> Config:
    return to_config(compose(list(overrides)))


def value(prediction: Prediction, name: str) -> float:
    terms = (*prediction.memory, *prediction.host, *prediction.step)
    return sum(term.value for term in terms if term.name == name)


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml")))
def test_parameters_of_every_experiment_are_exact(experiment):
    given = ["data.path=x"] if experiment == "text_classification" else []
    resolved = config(f"experiment={experiment}", *given)
    with torch.device("meta"):
        model = build(resolved.model, "model")
    assert shape_of(resolved).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", ["gpt2_124m", "qwen2_7b", "qwen3_8b", "bart_large", "t5_small"])
def test_parameters_of_public_shapes_are_exact(model):
    experiment = "decoder_7b_zero3" if model[:4] in ("gpt2", "qwen", "llam") else "quickstart"
    resolved = config(f"experiment={experiment}", f"model={model}")
    with torch.device("meta"):
        built = build(resolved.model, "model")
    assert shape_of(resolved).parameters == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("model", ["bert_base", "vit_base", "speech"])
def test_parameters_of_encoders_are_exact(model):
    experiment, more = {
        "bert_base": ("bert_masked_lm", []),
        "vit_base": (None, ["task=image_classification", "data=files", "data.path=x", "name=x", "steps=1"]),
        "speech": ("speech_ru", []),
    }[model]
    chosen = [f"experiment={experiment}"] if experiment else ["batch.global_size=8"]
    resolved = config(*chosen, f"model={model}", *more)
    with torch.device("meta"):
        built = build(resolved.model, "model")
    assert shape_of(resolved).parameters == sum(parameter.numel() for parameter in built.parameters())


def test_activations_are_those_of_korthikanti():
    """Korthikanti et al. 2022, equations 1, 2 and 4: 34 s b h + 5 a s^2 b, 10 + 24 / t, and 34 / t."""
    gpt = Shape(d_model=6144, num_heads=64, d_ff=24576, decoder_layers=48, vocab_size=51200, bias=True, norms=2,
                dropout=0.1, attention_dropout=0.1)  # fmt: skip
    system = replace(OURS, attention="unfused", fused_projection=True)
    units = 2048 * 4 * 6144
    for tensor, shared, expected in ((1, False, 34 + 5 * 64 * 2048 / 6144), (8, False, 10 + (24 + 106.67) / 8),
                                     (8, True, (34 + 106.67) / 8)):  # fmt: skip
        layout = Layout(tensor=tensor, ranks=tensor, micro_size=4, target_length=2048,
                        system=replace(system, sequence_norms=shared))  # fmt: skip
        (stack,) = activations.stacks(gpt, layout)
        # Ours keeps dropout masks in two bytes (the paper: one), and log-sums of the softmax.
        assert activations.kept_bytes(gpt, layout, stack, "none") / units == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(
    ("overrides", "source", "target", "tolerance"),
    [
        (["experiment=lm_small"], 0, 768, 0.03),
        (["experiment=quickstart", "model.max_positions=1024"], 640, 768, 0.06),
        (["experiment=quickstart", "model.max_positions=1024", "model.dropout=0.1"], 640, 768, 0.06),
        (["experiment=quickstart", "model=t5_small", "model.d_model=256", "model.encoder_layers=2",
          "model.decoder_layers=2", "model.dropout=0", "model.attention_dropout=0", "model.activation_dropout=0"],
         576, 640, 0.06),
        (["experiment=bert_masked_lm", "model.max_positions=1024", "model.dropout=0", "model.attention_dropout=0"],
         640, 0, 0.06),
    ],
    ids=["decoder", "encoder-decoder", "dropout", "t5", "encoder"],
)  # fmt: skip
def test_activations_are_what_autograd_keeps(overrides, source, target, tolerance):
    resolved = config(*overrides)
    shape = shape_of(resolved)
    model = build(resolved.model, "model").to(torch.bfloat16).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def ids(length: int) -> torch.Tensor:
        return torch.randint(0, shape.vocab_size, (2, length))

    batch = {"input_ids": ids(target or source)}
    if source and target:
        mask = torch.ones(2, source, dtype=torch.bool)
        batch = {"source_ids": ids(source), "source_mask": mask, "decoder_input_ids": ids(target)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch, lambda hidden, weight, bias: hidden.float().sum())
    measured = sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in own)
    layout = Layout(micro_size=2, source_length=source, target_length=target, system=replace(OURS, attention="cpu"))
    predicted = activations.stored_bytes(shape, layout) + activations.embedded_bytes(shape, layout)
    assert predicted == pytest.approx(measured, rel=tolerance)


def test_constants_are_those_of_the_code_they_speak_of():
    assert memory.CHUNK_ELEMENTS == cross_entropy.CHUNK_ELEMENTS
    assert memory.BLOCK_ELEMENTS == cross_entropy.GPU_BLOCK_ELEMENTS
    assert activations.SHORT == attention.SHORT


def test_every_term_is_explained_and_totals_are_sums():
    made = predict(SEVEN_B, Layout(ranks=64, zero_stage=3, micro_size=2, target_length=4096), load_cluster("a100_80gb"))
    for term in (*made.memory, *made.host, *made.step):
        assert term.name and term.formula and term.value >= 0, term
    assert made.device_bytes.value == pytest.approx(sum(term.value for term in made.memory))
    assert made.step_seconds.value == pytest.approx(sum(term.value for term in made.step))
    assert made.device_bytes.low < made.device_bytes.value < made.device_bytes.high
    assert made.tokens_per_second == pytest.approx(64 * 2 * 4096 / made.step_seconds.value)
    assert 0.3 < made.mfu < 0.8
    assert made.checkpoint_bytes == 12 * SEVEN_B.parameters


def test_what_saves_memory_saves_memory_and_costs_time():
    cluster = load_cluster("a100_80gb_8x8")

    def made(**changes):
        return predict(SEVEN_B, Layout(**{"ranks": 64, "zero_stage": 3, "target_length": 4096, **changes}), cluster)

    stages = [made(zero_stage=stage) for stage in (0, 1, 2, 3)]
    held = [one.device_bytes.value for one in stages]
    assert held[1] < held[0] and held[3] < held[2] < held[1]
    by_recompute = [made(micro_size=4, recompute=mode) for mode in ("none", "selective", "full")]
    assert sorted((one.device_bytes.value for one in by_recompute), reverse=True) == [
        one.device_bytes.value for one in by_recompute
    ]
    assert by_recompute[0].step_seconds.value < by_recompute[2].step_seconds.value
    offloaded = made(offload_optimizer="cpu")
    assert offloaded.device_bytes.value < held[3] and offloaded.host_bytes.value > stages[3].host_bytes.value
    assert offloaded.step_seconds.value > stages[3].step_seconds.value
    assert made(tensor=8).device_bytes.value < held[3]


def test_communication_is_what_the_zero_paper_counts():
    """2 P elements a step of a data parallel rank, 3 P of ZeRO-3 (Rajbhandari et al. 2020, section 7)."""
    paper = replace(OURS, all_reduces_gradients=False, live_elements=0.0)
    cluster = load_cluster("a100_80gb_128x8")
    for stage, elements in ((0, 2), (1, 2), (2, 2), (3, 3)):
        layout = Layout(ranks=1024, zero_stage=stage, target_length=512, system=paper)
        sent = sum(term.bytes_sent for term in predict(SEVEN_B, layout, cluster).step)
        assert sent / 2 / SEVEN_B.parameters == pytest.approx(elements, rel=0.01)


# docs/sharding.md, as measured on gloo ranks, bf16: bytes a parameter that a rank holds between backward pass and
# update (parts of N ranks), and that it sends in a step (an all-reduce counted twice).
SHARDING = {"plain": (18, 0, 8), "zero1": (8, 12, 6), "zero2": (2, 16, 6), "zero3": (0, 18, 4)}


@pytest.mark.parametrize("engine", SHARDING)
@pytest.mark.parametrize("ranks", [2, 8])
def test_our_engines_hold_and_send_what_was_measured(engine, ranks):
    resolved = config("experiment=lm_small", f"engine={engine}", "batch.micro_size=1", "batch.global_size=8")
    shape, layout = shape_of(resolved), layout_of(resolved, ranks)
    made = predict(shape, replace(layout, accumulation=1.0), load_cluster("cpu"))
    summing = predict(shape, replace(layout, accumulation=2.0), load_cluster("cpu"))
    whole, shared, sent = SHARDING[engine]
    states = sum(value(summing, name) for name in ("parameters", "masters", "gradients", "optimizer states"))
    assert states / shape.parameters == pytest.approx(whole + shared / ranks)
    bytes_sent = sum(term.bytes_sent for term in made.step)
    assert bytes_sent * ranks / (ranks - 1) / shape.parameters == pytest.approx(sent)


def test_a_pipeline_has_its_bubble():
    """(p - 1) / m of the time, divided by the pieces of the model (Narayanan et al. 2021, section 2.2)."""
    layout = Layout(ranks=8, pipeline=8, micro_size=1, accumulation=16, target_length=2048)
    made = predict(SEVEN_B, layout, load_cluster("a100_80gb"))
    busy = sum(term.value for term in made.step if term.kind == "compute" and term.name != "update")
    assert value(made, "pipeline bubble") == pytest.approx(7 / 16 * busy, rel=0.01)
    halved = predict(SEVEN_B, replace(layout, interleave=2), load_cluster("a100_80gb"))
    assert value(halved, "pipeline bubble") == pytest.approx(7 / 32 * busy, rel=0.01)


def test_a_prediction_is_quick():
    layout, cluster = Layout(ranks=1024, zero_stage=3, tensor=8, target_length=4096), load_cluster("h100_128x8")
    predict(SEVEN_B, layout, cluster)
    fastest = []
    for _ in range(20):
        start = time.perf_counter()
        predict(SEVEN_B, layout, cluster)
        fastest.append(time.perf_counter() - start)
    assert min(fastest) < 1e-3


def test_layouts_follow_the_plan():
    resolved = config("experiment=decoder_7b_zero3")
    layout = layout_of(resolved, 64)
    assert (layout.zero_stage, layout.micro_size, layout.accumulation) == (3, 2, 8)
    assert layout.global_size == resolved.batch.global_size
    assert sequence_lengths(resolved) == (0, 4096)
    with pytest.raises(ConfigError, match="does not divide"):
        layout_of(resolved, 7)


def test_batches_of_varying_lengths_take_more_on_a_cpu():
    """Compiled products and a torn heap; packed rows have few and a whole one, other devices and fp32 none."""
    words = ("experiment=quickstart", "data.row_length=[128,128]", "batch.global_size=96")
    whole = {}
    for cluster in ("cpu", "a100_80gb"):
        for batching in ("bucketed", "packed"):
            run = config(*words, f"data.batching={batching}")
            made = predict(shape_of(run), layout_of(run, 1), load_cluster(cluster).with_ranks(1))
            whole[cluster, batching] = {term.name: term.value for term in made.memory}
    cpu = whole["cpu", "bucketed"]
    assert 0.2e9 < cpu["compiled products"] <= 2048 * 5e5
    assert cpu["fragmentation"] > whole["cpu", "packed"]["fragmentation"]
    assert 0 < whole["cpu", "packed"]["compiled products"] < 0.03e9
    assert "compiled products" not in whole["a100_80gb", "bucketed"]
    assert layout_of(config(*words), 1, (128, 128)).varying_batches == 0
    run = config(*words, "precision=fp32")
    made = predict(shape_of(run), layout_of(run, 1), load_cluster("cpu").with_ranks(1))
    assert next(term.value for term in made.memory if term.name == "compiled products") == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_models_of_transformers_are_read_from_their_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 1000}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=False).save_pretrained(tmp_path)
    words = ("model=hf", f"model.path={tmp_path}", "model.kind=causal_lm", "model.pretrained=false", "task=causal_lm")
    common = ("name=x", "steps=1", "batch.global_size=8", "data=files", "data.path=x")
    whole = shape_of(config(*words, *common))
    ours = replace(SEVEN_B, d_model=256, num_heads=4, d_ff=688, decoder_layers=4, vocab_size=1000, num_kv_heads=2)
    assert whole.parameters == replace(ours, extra=256).parameters
    assert (whole.gated, whole.rotary, whole.decoder_layers, whole.trained) == (True, True, 4, 1.0)
    pytest.importorskip("peft")
    adapted = shape_of(config(*words, *common, "model.lora={r: 8, target_modules: all-linear}"))
    assert 0 < adapted.trained < 0.1
    layout, cluster = Layout(target_length=128), load_cluster("h100")
    moments = [value(predict(shape, layout, cluster), "optimizer states") for shape in (whole, adapted)]
    assert moments[1] < 0.1 * moments[0]


def test_offloading_fits_a_model_that_did_not():
    plain = config("experiment=encoder_decoder_3b_zero3_offload", "engine=zero3")
    offloaded = config("experiment=encoder_decoder_3b_zero3_offload")
    cluster = replace(load_cluster("a100_40gb"), memory_gib=24, host_memory_gib=96, gpus_per_node=1)
    assert not predict(shape_of(plain), layout_of(plain, 1), cluster).fits
    assert predict(shape_of(offloaded), layout_of(offloaded, 1), cluster).fits


def test_clusters_load_and_are_told_when_unknown(tmp_path):
    for name in known_clusters():
        assert load_cluster(name).ranks >= 1
    assert load_cluster("h100_8x4").ranks == 32
    with pytest.raises(ConfigError, match=r"cluster=h10_8x8 is not known; did you mean h100\?.*a100_40gb.*v100_32gb"):
        load_cluster("h10_8x8")
    with pytest.raises(ConfigError, match="no devices"):
        load_cluster("h100_0x8")
    own = tmp_path / "mine.yaml"
    own.write_text((config_directory() / "cluster" / "h100.yaml").read_text() + "price_per_hour: 2.5\n")
    made = predict(SEVEN_B, Layout(ranks=8, zero_stage=3, target_length=2048), load_cluster(str(own)))
    assert made.cost_to(1e12) == pytest.approx(1e12 / made.tokens_per_second / 3600 * 8 * 2.5)
    own.write_text("memory: 80\n")
    with pytest.raises(ConfigError, match=r"memory is no key of a cluster(?s:.*)gpus_per_node has no value"):
        load_cluster(str(own))
