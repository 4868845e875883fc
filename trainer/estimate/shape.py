"""What of a model its memory and time depend on: widths, depths, vocabulary; and how many parameters that makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Other:
    """A model that is no Transformer, by what one sample of it takes (see `Shape.other`)."""

    parameters: int
    flops: float
    """Forward and backward of one sample."""
    activations: float
    """Numbers that the backward pass of one sample needs, as far as they are outputs of its modules."""
    largest_layer: int
    """Parameters of the module that has most."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Numbers of an architecture.

    A Transformer has encoder_layers that read a source, decoder_layers that read a target, or both; with both, each
    decoder layer attends to the encoder too. num_kv_heads, head_dim: None as in `trainer.models.decoder`. vocab_size: 0
    where there is no head over tokens. gated: three matrices in the feed-forward instead of two. relu: what goes into
    its activation is not needed again. bias: of projections and norms; qkv_bias: of queries, keys and values at least.
    norms: 1 (RMSNorm) or 2 (LayerNorm with bias) vectors each. positions: rows of the learned tables, all sides
    together. extra: parameters that nothing else here counts. source_divisor: positions of the encoder for one of the
    source (speech: 2 frames, patches: 1). relative: attention gets a bias that has a gradient (T5). other: for what is
    no Transformer; all else is then zero.
    """

    d_model: int = 0
    num_heads: int = 1
    d_ff: int = 0
    encoder_layers: int = 0
    decoder_layers: int = 0
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = 0
    gated: bool = False
    relu: bool = False
    tied: bool = False
    bias: bool = False
    qkv_bias: bool = False
    norms: int = 1
    positions: int = 0
    extra: int = 0
    source_divisor: int = 1
    relative: bool = False
    rotary: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    classifies: bool = False
    """Whether one vector a sample goes into the head instead of every position."""
    trained: float = 1.0
    """Part of the parameters that is trained; adapters leave the others as they are."""
    other: Other | None = None

    @property
    def head_size(self) -> int:
        """Numbers of one head's query."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def query_size(self) -> int:
        """Numbers of all heads' queries."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Numbers of all heads' keys."""
        return (self.num_kv_heads or self.num_heads) * self.head_size

    @property
    def attention_matrices(self) -> int:
        """Elements of the four projections of self-attention."""
        return self.d_model * 2 * (self.query_size + self.kv_size)

    @property
    def cross_matrices(self) -> int:
        """Elements of the four projections of cross-attention, whose keys have as many heads as its queries."""
        return self.d_model * 4 * self.query_size

    @property
    def feed_forward_matrices(self) -> int:
        """Elements of the two or three projections of a feed-forward."""
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    @property
    def hidden_kept(self) -> int:
        """Tensors as wide as the feed-forward's hidden layer that the backward pass needs."""
        return 4 if self.gated else 1 if self.relu else 2

    @property
    def has_cross(self) -> bool:
        """Whether decoder layers attend to an encoder."""
        return self.encoder_layers > 0 and self.decoder_layers > 0

    def layer_matrices(self, cross: bool) -> int:
        """Elements of the matrices of one layer."""
        return self.attention_matrices + self.feed_forward_matrices + (self.cross_matrices if cross else 0)

    def layer_vectors(self, cross: bool) -> int:
        """Elements of the norms and biases of one layer."""
        vectors = (3 if cross else 2) * self.norms * self.d_model
        if self.bias or self.qkv_bias:
            vectors += self.query_size + 2 * self.kv_size
        if self.bias:
            vectors += self.d_model + (2 if self.gated else 1) * self.d_ff + self.d_model
            vectors += 3 * self.query_size + self.d_model if cross else 0
        return vectors

    @property
    def layers(self) -> int:
        """Of both stacks."""
        return self.encoder_layers + self.decoder_layers

    @property
    def matrices(self) -> int:
        """Elements of the matrices of all layers, which tensor parallel ranks share."""
        return self.encoder_layers * self.layer_matrices(False) + self.decoder_layers * self.layer_matrices(
            self.has_cross
        )

    @property
    def embedding(self) -> int:
        """Elements of the token table."""
        return self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """All of them, a tied one once."""
        if self.other is not None:
            return self.other.parameters
        vectors = self.encoder_layers * self.layer_vectors(False) + self.decoder_layers * self.layer_vectors(
            self.has_cross
        )
        tables = self.embedding * (1 if self.tied else 2) + self.positions * self.d_model
        return self.matrices + vectors + tables + self.extra

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest layer, the unit in which sharded parameters are gathered."""
        if self.other is not None:
            return self.other.largest_layer
        cross = self.has_cross
        return self.layer_matrices(cross) + self.layer_vectors(cross)
