"""Shardwright's trainer: encoder-decoders and large dense models, one process or many ranks, one code path."""

__version__ = "0.1.0"
