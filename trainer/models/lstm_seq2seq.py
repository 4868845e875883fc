"""LSTM encoder-decoder with the attention of Bahdanau et al. 2015 or Luong et al. 2015, or without (Cho et al. 2014).

Let m_s be the encoder's states and h_t the decoder's top states, h_0 the initial one.

* luong (Luong et al. 2015, 3.1, "general"): score(t, s) = h_t . W m_s
* bahdanau (Bahdanau et al. 2015, A.1.2): score(t, s) = v . tanh(W h_{t-1} + U m_s), with the state before the update
* none: c_t is the encoder's final state at every t, also fed to the decoder LSTM with every token (Cho et al. 2014)

c_t = sum_s softmax_s(score(t, s)) m_s, and the logits are E tanh(W_o [h_t; c_t; e_t]), e_t the vector of the token fed
at t. The context does not enter the recurrence (no input feeding), so training runs the LSTM and the attention over all
target positions at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.attention import attend
from trainer.models.base import Model
from trainer.models.cache import Memory
from trainer.models.layers import Projection, TokenEmbedding, dropout, matrix_size
from trainer.models.segments import padding_bias

AttentionKind = Literal["bahdanau", "luong", "none"]


@dataclass
class LSTMState:
    """`DecoderState` of the LSTM: hidden and cell [L, R, hidden_size], and the encoder's memory."""

    hidden: Tensor
    cell: Tensor
    memory: Memory
    first_ids: Tensor | None = None

    def select(self, row_indices: Tensor) -> LSTMState:
        """See `DecoderState.select`."""
        return LSTMState(self.hidden[:, row_indices], self.cell[:, row_indices], self.memory.select(row_indices))


class AdditiveScore(nn.Module):
    """v . tanh(query + key) for all pairs; `v` lives here."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.v = Projection(size, [(1, size**-0.5)])

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries [B,T,size], keys [B,S,size] -> scores [B,T,S]."""
        pairs: Tensor = self.v(torch.tanh(queries[:, :, None] + keys[:, None]))
        return pairs.squeeze(-1)


class LSTMSeq2Seq(Model):
    """Bidirectional LSTM encoder, LSTM decoder, one vocabulary for both.

    vocab_size, d_model (token vectors), hidden_size (decoder state; each direction of the encoder has half), num_layers
    (of each side); attention: see the module's docstring; dropout: of token vectors, between layers and before the
    head.
    """

    objective = "text_to_text"

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        hidden_size: int = 512,
        num_layers: int = 2,
        attention: AttentionKind = "bahdanau",
        dropout: float = 0.1,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % 2:
            raise ConfigError(f"model.hidden_size={hidden_size} is odd; each direction of the encoder has half of it.")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.attention = attention
        self.dropout = dropout
        std, hidden_std = d_model**-0.5, hidden_size**-0.5
        between = dropout if num_layers > 1 else 0.0
        self.embedding = TokenEmbedding(vocab_size, d_model, std)
        self.encoder = nn.LSTM(
            d_model, hidden_size // 2, num_layers, batch_first=True, dropout=between, bidirectional=True
        )
        context_size = hidden_size if attention == "none" else 0
        self.decoder = nn.LSTM(d_model + context_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.bridge = Projection(hidden_size, [(hidden_size, hidden_std)], bias=True)
        self.keys = None if attention == "none" else Projection(hidden_size, [(hidden_size, hidden_std)])
        self.queries = Projection(hidden_size, [(hidden_size, hidden_std)]) if attention == "bahdanau" else None
        self.score = AdditiveScore(hidden_size) if attention == "bahdanau" else None
        self.readout = Projection(
            2 * hidden_size + d_model, [(d_model, (2 * hidden_size + d_model) ** -0.5)], bias=True
        )
        self.head = None if tie_embeddings else Projection(d_model, [(vocab_size, std)])

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """source_ids [B,S], source_mask [B,S] (padding on the right), decoder_input_ids [B,T] -> logits [B,T,V]."""
        return self._decode(self.start_decoding(batch), batch["decoder_input_ids"])

    def start_decoding(self, batch: Mapping[str, Tensor]) -> LSTMState:
        """Read source_ids [B,S] (source_mask [B,S], padding on the right, at least one token each)."""
        mask = batch["source_mask"]
        x = dropout(self.embedding(batch["source_ids"]), self.dropout, self.training)
        lengths = mask.sum(dim=1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.encoder(packed)
        states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=mask.shape[1])
        final = last.view(-1, 2, *last.shape[1:]).transpose(1, 2).flatten(2)
        hidden = torch.tanh(self.bridge(final))
        if self.keys is None:
            memory = Memory([(final[-1], final[-1])], None, mask.shape[0])
        else:
            memory = Memory([(self.keys(states), states)], padding_bias(mask, x.dtype), mask.shape[0])
        return LSTMState(hidden, torch.zeros_like(hidden), memory)

    def decode_step(self, state: LSTMState, token_ids: Tensor) -> Tensor:
        """token_ids [R] at the next position -> logits [R,V] of the one after it."""
        return self._decode(state, token_ids[:, None])[:, 0]

    def _decode(self, state: LSTMState, ids: Tensor) -> Tensor:
        """ids [R,T] -> logits [R,T,V]; moves `state` on by T positions."""
        embedded = dropout(self.embedding(ids), self.dropout, self.training)
        memory, before = state.memory, state.hidden[-1]
        x = embedded
        if self.keys is None:
            final = memory.keys_values[0][1].repeat_interleave(memory.rows_per_source, dim=0)
            context = final[:, None].expand(-1, ids.shape[1], -1)
            x = torch.cat((embedded, context), dim=-1)
        tops, (state.hidden, state.cell) = self.decoder(x, (state.hidden, state.cell))
        if self.keys is not None:
            queries = torch.cat((before[:, None], tops[:, :-1]), dim=1) if self.attention == "bahdanau" else tops
            grouped = queries.reshape(memory.num_sources, -1, self.hidden_size)
            context = self._attend(grouped, memory).view(tops.shape)
        out = torch.tanh(self.readout(torch.cat((tops, context, embedded), dim=-1)))
        out = dropout(out, self.dropout, self.training)
        logits: Tensor = self.embedding(out, as_head=True) if self.head is None else self.head(out)
        return logits

    def _attend(self, queries: Tensor, memory: Memory) -> Tensor:
        """queries [N,T,hidden_size] -> contexts of the same shape."""
        keys, values = memory.keys_values[0]
        if self.score is None or self.queries is None:
            return attend(queries[:, None], keys[:, None], values[:, None], memory.bias, False, 0.0, 1.0)
        assert memory.bias is not None
        scores = self.score(self.queries(queries), keys) + memory.bias[:, 0]
        return torch.matmul(F.softmax(scores, dim=-1), values)

    def flops_per_sample(self, source_length: int, target_length: int) -> float:
        """Forward and backward: 6 x matrix parameters x positions, and the attention's scores and contexts."""
        h, d = self.hidden_size, self.readout.out_features

        def lstm(module: nn.LSTM, inputs: int) -> int:
            directions = 2 if module.bidirectional else 1
            size = module.hidden_size
            deeper = (module.num_layers - 1) * 4 * size * (size * directions + size)
            return directions * (4 * size * (inputs + size) + deeper)

        source = lstm(self.encoder, d) + (0 if self.keys is None else h * h)
        target = lstm(self.decoder, self.decoder.input_size) + matrix_size(self.readout) + self.vocab_size * d
        target += h * h if self.attention == "bahdanau" else 0
        pairs = 0 if self.attention == "none" else 2 * h
        return 6.0 * (source * source_length + target * target_length + pairs * source_length * target_length)
