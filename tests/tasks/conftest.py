"""A tokenizer whose ids can be worked out by hand."""

from __future__ import annotations

import pytest


class ByteTokenizer:
    """Ids 0, 1, 2 are padding, begin and end; a byte b of UTF-8 is 3 + b."""

    pad_id, bos_id, eos_id, vocab_size = 0, 1, 2, 259

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[3 + byte for byte in text.encode()] for text in texts]

    @property
    def for_targets(self) -> ByteTokenizer:
        return self

    def id_of(self, token: str) -> int | None:
        return {"<pad>": 0, "<s>": 1, "</s>": 2}.get(token)

    def decode(self, ids: list[int]) -> str:
        return bytes(token - 3 for token in ids if token > 2).decode(errors="replace")

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        return [self.decode(one) for one in ids]


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()
