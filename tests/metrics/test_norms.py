"""Norms of the gradient by groups of layers: what belongs where, and the same norms however they are split."""

from __future__ import annotations

import math

import pytest

from tests.test_training import rows, tiny
from trainer.metrics.norms import LayerGroups, Norms, group_of

GROUPS = {
    "embedding.weight": ("embeddings", "embeddings"),
    "encoder_positions.table": ("embeddings", "embeddings"),
    "decoder_embedding_norm.bias": ("embeddings", "embeddings"),
    "patches.weight": ("embeddings", "embeddings"),
    "encoder.11.self_attention.qkv.weight": ("encoder", "encoder.11"),
    "encoder_norm.weight": ("encoder", "encoder"),
    "decoder.3.cross_attention.out.bias": ("decoder", "decoder.03"),
    "layers.0.attention_norm.weight": ("layers", "layers.00"),
    "blocks.2.convolutions.0.norm.weight": ("layers", "layers.02"),
    "norm.weight": ("layers", "layers"),
    "encoder.weight_ih_l0": ("encoder", "encoder"),
    "head.weight": ("head", "head"),
    "transform_norm.bias": ("head", "head"),
    "bridge.weight": ("other", "other"),
    "hf.model.decoder.layers.7.self_attn.q_proj.lora_A": ("decoder", "decoder.07"),
    "hf.transformer.wte.weight": ("embeddings", "embeddings"),
    "hf.lm_head.weight": ("head", "head"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_name_tells_the_group(name: str) -> None:
    assert (group_of(name, Norms.parts), group_of(name, Norms.layers)) == GROUPS[name]


def test_norms_are_the_whole_norm_in_parts() -> None:
    groups = LayerGroups(["embedding.weight", "layers.0.a", "layers.1.a"], Norms.parts)
    assert groups.names == ["embeddings", "layers"]
    norms = groups.norms(groups.sums({"embedding.weight": 9.0, "layers.0.a": 4.0, "layers.1.a": 12.0}), norm=10.0)
    assert norms == pytest.approx({"embeddings": 6.0, "layers": 8.0}), "9 and 16 parts of 25 of 10 squared"
    assert groups.norms([0.0, 0.0], norm=0.0) == {} == groups.norms([1.0, math.nan], norm=math.nan)
    assert LayerGroups(["embedding.weight"], Norms.none).names == []


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_clipped_offloaded_and_rounded_gradients_have_the_norms_of_one_process(run_trainer) -> None:
    """Engines that clip what they hand to the optimizer; tests/test_training.py has all the other splits."""
    common = tiny("steps=2", "log.norms=layers", "clip_norm=0.05")
    splits = {
        ("fp32", "one"): ([], 1),
        ("fp32", "offloaded"): (["engine=zero2", "engine.offload_optimizer=cpu", "batch.micro_size=12"], 2),
        ("bf16", "one"): (["batch.micro_size=12"], 1),
        ("bf16", "zero1"): (["engine=zero1", "batch.micro_size=12"], 2),
    }
    told = {}
    for (precision, name), (words, ranks) in splits.items():
        words = [*common, f"name={precision}_{name}", f"precision={precision}", *words]
        done = run_trainer(words, ranks=ranks).check()
        told[precision, name] = [row["norms"] for row in rows(done.runs_dir, f"{precision}_{name}") if "norms" in row]
    expected = told["fp32", "one"]
    assert list(expected[0]) == ["embeddings", "encoder.00", "encoder", "decoder.00", "decoder"]
    for at_step, norms in zip(told["fp32", "offloaded"], expected, strict=True):
        assert at_step == pytest.approx(norms, rel=1e-5)
    for at_step, norms in zip(told["bf16", "zero1"], told["bf16", "one"], strict=True):
        assert at_step == pytest.approx(norms, rel=0.02)
