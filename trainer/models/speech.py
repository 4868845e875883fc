"""Speech to text (Whisper, Radford et al. 2022): a log-mel encoder, and the decoder of `encoder_decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.base import Model
from trainer.models.cache import AttentionState, KeyValueCache, Memory
from trainer.models.encoder_decoder import Layer
from trainer.models.layers import HeadLoss, PositionEmbedding, TokenEmbedding, dropout, make_norm, matrix_size
from trainer.models.positions import sinusoids
from trainer.models.segments import padding_bias

NORM_EPS = 1e-5
STRIDE = 2
"""Frames for each position of the encoder."""


class SpeechToText(Model):
    """Two convolutions over frames, the second with stride 2, then pre-norm layers with sinusoidal positions; a decoder
    with learned positions, whose output head is its token embedding.

    num_mels: numbers in a frame; d_model, num_heads, d_ff: of both stacks. dropout: of embeddings and sub-layer
    outputs; attention_dropout: of attention weights; activation_dropout: inside the feed-forward. max_source_positions:
    of the encoder, half as many as the most frames; max_positions: tokens of the longest text. Raises ConfigError.
    """

    fuses_loss = True

    def __init__(
        self,
        vocab_size: int,
        num_mels: int = 80,
        d_model: int = 384,
        num_heads: int = 6,
        d_ff: int = 1536,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        max_source_positions: int = 1500,
        max_positions: int = 448,
    ) -> None:
        super().__init__()
        _check(d_model, num_heads)
        self.vocab_size, self.num_mels, self.d_model = vocab_size, num_mels, d_model
        self.max_positions, self.max_frames = max_positions, STRIDE * max_source_positions
        self.dropout = dropout

        new_norm = partial(make_norm, "layer", d_model, True, NORM_EPS)

        def layer(cross: bool) -> Layer:
            return Layer(
                d_model,
                num_heads,
                d_ff,
                d_model // num_heads,
                cross=cross,
                new_norm=new_norm,
                pre_norm=True,
                activation="gelu",
                bias=True,
                key_bias=False,
                scaled=True,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
            )

        self.conv1 = nn.Conv1d(num_mels, d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, kernel_size=3, stride=STRIDE, padding=1)
        self.encoder = nn.ModuleList(layer(cross=False) for _ in range(encoder_layers))
        self.encoder_norm = new_norm()
        self.embedding = TokenEmbedding(vocab_size, d_model, d_model**-0.5)
        self.decoder_positions = PositionEmbedding(max_positions, d_model, d_model**-0.5)
        self.decoder = nn.ModuleList(layer(cross=True) for _ in range(decoder_layers))
        self.decoder_norm = new_norm()

    def forward(self, batch: Mapping[str, Tensor], head_loss: HeadLoss | None = None) -> Tensor:
        """features [B,S,num_mels] float, source_mask [B,S] bool or none, decoder_input_ids [B,T] -> logits [B,T,V],
        or the `head_loss` (see `trainer.models`)."""
        memory, memory_bias = self._encode(batch)
        x = self._embed(batch["decoder_input_ids"], 0)
        for layer in self.decoder:
            keys_values = layer.keys_values(memory)  # type: ignore[operator]
            x = layer(x, bias=None, causal=True, keys_values=keys_values, memory_bias=memory_bias)
        return self._logits(x, head_loss)

    def _encode(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Memory [B, ceil(S / 2), d_model], and the bias [B, 1, 1, ceil(S / 2)] that hides its padding, if there is a
        mask.

        Frames after the end count as zeros before each convolution, as they do at the end of an unpadded recording, so
        a row does not depend on how far it was padded.
        """
        x = batch["features"].to(self.conv1.weight.dtype).transpose(1, 2)
        mask = batch.get("source_mask")
        if mask is None:
            x = F.gelu(self.conv1(x))
        else:
            real = mask[:, None, :].to(x.dtype)
            x = F.gelu(self.conv1(x * real)) * real
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + sinusoids(x.shape[1], self.d_model).to(x.device, x.dtype)
        x = dropout(x, self.dropout, self.training)
        bias = None if mask is None else padding_bias(mask[:, ::STRIDE], x.dtype)
        for layer in self.encoder:
            x = layer(x, bias=bias)
        return self.encoder_norm(x), bias

    def _embed(self, ids: Tensor, start: int) -> Tensor:
        """Vectors [B,T,d_model] of ids at the positions from `start` on."""
        x: Tensor = self.embedding(ids) + self.decoder_positions(start, ids.shape[1])
        return dropout(x, self.dropout, self.training)

    def _logits(self, x: Tensor, head_loss: HeadLoss | None = None) -> Tensor:
        logits: Tensor = self.embedding(self.decoder_norm(x), as_head=True, head_loss=head_loss)
        return logits

    def start_decoding(self, batch: Mapping[str, Tensor]) -> AttentionState:
        """Encode features [B,S,num_mels] (source_mask [B,S]); each decoder layer's memory keys and values, once."""
        memory, memory_bias = self._encode(batch)
        keys_values = [layer.keys_values(memory) for layer in self.decoder]  # type: ignore[operator]
        return AttentionState(
            cache=KeyValueCache(len(self.decoder)),
            memory=Memory(keys_values, memory_bias, num_sources=memory.shape[0]),
        )

    def decode_step(self, state: AttentionState, token_ids: Tensor) -> Tensor:
        """token_ids [R] at the next position -> logits [R,V] of the one after it."""
        assert state.memory is not None
        cache, memory = state.cache, state.memory
        x = self._embed(token_ids[:, None], cache.length)
        for index, layer in enumerate(self.decoder):
            x = layer(
                x,
                bias=None,
                keys_values=memory.keys_values[index],
                memory_bias=memory.bias,
                cache=cache,
                layer=index,
            )
        cache.advance(1)
        return self._logits(x)[:, 0]

    def flops_per_sample(self, source_length: int, target_length: int) -> float:
        """Forward and backward: 6 x matrix parameters x positions (Kaplan et al. 2020), attention (PaLM, app. B).

        source_length: frames; the second convolution and the layers see every other one.
        """
        positions = -(-source_length // STRIDE)
        kv_size = 2 * len(self.decoder) * self.d_model**2
        convolutions = 3 * self.d_model * (self.num_mels * source_length + self.d_model * positions)
        target_parameters = matrix_size(self.decoder) - kv_size + self.vocab_size * self.d_model
        matrices = (matrix_size(self.encoder) + kv_size) * positions + target_parameters * target_length
        scores = len(self.encoder) * positions**2 + len(self.decoder) * target_length * (target_length + positions)
        return 6.0 * (convolutions + matrices) + 12.0 * self.d_model * scores


def _check(d_model: int, num_heads: int) -> None:
    problems = []
    if d_model % num_heads:
        problems.append(f"model.d_model={d_model} does not divide by model.num_heads={num_heads}; change one of them.")
    if d_model % 2 or d_model < 4:
        problems.append(f"model.d_model={d_model}: sinusoidal positions need an even number from 4 on.")
    if problems:
        raise ConfigError(*problems)
