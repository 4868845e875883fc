"""Whisper (Radford et al. 2022): `SpeechToText` in any shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from trainer.data.audio import FRAMES_PER_SECOND, HOP, SAMPLE_RATE, WINDOW
from trainer.errors import ConfigError
from trainer.formats import PROCESSOR, Format, Tensor
from trainer.models.positions import sinusoids

MODEL_TYPES = ("whisper",)

STRIDE = 2
"""Frames for each position of the encoder."""


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """None: see `trainer.formats`."""
    return []


def _config(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": given["vocab_size"],
        "num_mel_bins": given["num_mels"],
        "d_model": given["d_model"],
        **{f"{side}_layers": given[f"{side}_layers"] for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": given["num_heads"] for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": given["d_ff"] for side in ("encoder", "decoder")},
        "activation_function": "gelu",
        "scale_embedding": False,
        "dropout": given["dropout"],
        "attention_dropout": given["attention_dropout"],
        "activation_dropout": given["activation_dropout"],
        "max_source_positions": given["max_source_positions"],
        "max_target_positions": given["max_positions"],
        "tie_word_embeddings": True,
        # transformers' own are places in the vocabulary of the Whisper that was published; a tokenizer tells others
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "decoder_start_token_id": 0,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }


def extractor(num_mels: int, max_source_positions: int) -> dict[str, Any]:
    """What makes recordings into features, as `trainer.data.audio` does."""
    seconds = STRIDE * max_source_positions / FRAMES_PER_SECOND
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": num_mels,
        "sampling_rate": SAMPLE_RATE,
        "n_fft": WINDOW,
        "hop_length": HOP,
        "chunk_length": int(seconds) if seconds.is_integer() else seconds,
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`."""
    size = given["d_model"]

    def both(theirs: str, ours: str) -> Iterator[Tensor]:
        yield Tensor(f"{theirs}.weight", f"{ours}.weight")
        yield Tensor(f"{theirs}.bias", f"{ours}.bias")

    def attention(theirs: str, ours: str, cross: bool) -> Iterator[Tensor]:
        """Keys have no bias, so that of values follows that of queries."""
        queries, rest = (f"{ours}.q", f"{ours}.kv") if cross else (f"{ours}.qkv",) * 2
        first = 0 if cross else size
        yield Tensor(f"{theirs}.q_proj.weight", f"{queries}.weight", 0, size)
        yield Tensor(f"{theirs}.q_proj.bias", f"{queries}.bias", 0, size)
        yield Tensor(f"{theirs}.k_proj.weight", f"{rest}.weight", first, first + size)
        yield Tensor(f"{theirs}.v_proj.weight", f"{rest}.weight", first + size)
        yield Tensor(f"{theirs}.v_proj.bias", f"{rest}.bias", first)
        yield from both(f"{theirs}.out_proj", f"{ours}.out")

    def stack(side: str) -> Iterator[Tensor]:
        for index in range(given[f"{side}_layers"]):
            ours, theirs = f"{side}.{index}", f"model.{side}.layers.{index}"
            yield from both(f"{theirs}.self_attn_layer_norm", f"{ours}.self_norm")
            yield from attention(f"{theirs}.self_attn", f"{ours}.self_attention", cross=False)
            if side == "decoder":
                yield from both(f"{theirs}.encoder_attn_layer_norm", f"{ours}.cross_norm")
                yield from attention(f"{theirs}.encoder_attn", f"{ours}.cross_attention", cross=True)
            yield from both(f"{theirs}.final_layer_norm", f"{ours}.feed_forward_norm")
            yield from both(f"{theirs}.fc1", f"{ours}.feed_forward.w_in")
            yield from both(f"{theirs}.fc2", f"{ours}.feed_forward.w_out")
        yield from both(f"model.{side}.layer_norm", f"{side}_norm")

    def tensors() -> Iterator[Tensor]:
        yield from both("model.encoder.conv1", "conv1")
        yield from both("model.encoder.conv2", "conv2")
        yield from stack("encoder")
        yield Tensor("model.decoder.embed_tokens.weight", "embedding.weight")
        yield Tensor("model.decoder.embed_positions.weight", "decoder_positions.weight")
        yield from stack("decoder")

    return Format(
        "WhisperForConditionalGeneration",
        _config(given),
        list(tensors()),
        prefix="model.",
        twins={"proj_out.weight": "model.decoder.embed_tokens.weight"},
        files={PROCESSOR: extractor(given["num_mels"], given["max_source_positions"])},
        constants={"model.encoder.embed_positions.weight": partial(sinusoids, given["max_source_positions"], size)},
    )


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    wanted = {"activation_function": "gelu", "scale_embedding": False, "tie_word_embeddings": True}
    others = [f"{key}={config[key]}" for key, value in wanted.items() if config.get(key, value) != value]
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = (config[f"{side}_{name}"] for side in ("encoder", "decoder"))
        if encoder != decoder:
            others.append(f"encoder_{name}={encoder} with decoder_{name}={decoder}")
    others += [f"{key}={config[key]}" for key in ("encoder_layerdrop", "decoder_layerdrop") if config.get(key)]
    if others:
        raise ConfigError(f"config.json: our SpeechToText has no {', '.join(others)}; train it with model=hf.")
    return {
        "_target_": "trainer.models.speech.SpeechToText",
        "vocab_size": config["vocab_size"],
        "num_mels": config["num_mel_bins"],
        "d_model": config["d_model"],
        "num_heads": config["encoder_attention_heads"],
        "d_ff": config["encoder_ffn_dim"],
        "encoder_layers": config["encoder_layers"],
        "decoder_layers": config["decoder_layers"],
        "dropout": config.get("dropout", 0.0),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "activation_dropout": config.get("activation_dropout", 0.0),
        "max_source_positions": config.get("max_source_positions", 1500),
        "max_positions": config.get("max_target_positions", 448),
    }
