"""Training tokens per second of our models against the transformers library at equal shape, in interleaved pairs.

    python scripts/bench/models.py [--pairs 12] [--precision fp32 bf16] [--threads 2]

Each pair is one optimizer step (forward, cross-entropy, backward, AdamW) of ours and one of theirs on the same batch.
Weights are random; dropout is equal. The ratio is ours / theirs in tokens per second: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder

VOCAB_SIZE, D_MODEL, NUM_HEADS, NUM_LAYERS = 8000, 256, 4, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Batch = dict[str, Tensor]
Forward = Callable[[Batch], Tensor]


def encoder_decoders() -> tuple[nn.Module, nn.Module, Forward]:
    """(ours, theirs, forward of theirs) in the shape of T5 v1.1."""
    ours = EncoderDecoder(
        VOCAB_SIZE,
        D_MODEL,
        NUM_HEADS,
        d_ff=640,
        encoder_layers=NUM_LAYERS,
        decoder_layers=NUM_LAYERS,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        norm="rms",
        activation="geglu",
        positions="relative",
        bias=False,
        tie_embeddings=False,
        scale_attention=False,
        scale_embeddings=False,
    )
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=D_MODEL,
        d_kv=D_MODEL // NUM_HEADS,
        d_ff=640,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        dropout_rate=0.1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
    )
    theirs = T5ForConditionalGeneration(config)
    theirs.lm_head.weight = nn.Parameter(
        theirs.lm_head.weight.detach().clone()
    )  # the library ties it whatever the config

    def forward(batch: Batch) -> Tensor:
        output: Any = theirs(
            input_ids=batch["source_ids"],
            attention_mask=batch["source_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
        )
        logits: Tensor = output.logits
        return logits

    return ours, theirs, forward


def decoders(num_kv_heads: int) -> tuple[nn.Module, nn.Module, Forward]:
    """(ours, theirs, forward of theirs) in the shape of Llama."""
    ours = Decoder(VOCAB_SIZE, D_MODEL, NUM_HEADS, num_kv_heads, d_ff=688, num_layers=2 * NUM_LAYERS)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=D_MODEL,
        intermediate_size=688,
        num_hidden_layers=2 * NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=num_kv_heads,
        use_cache=False,
    )
    theirs = LlamaForCausalLM(config)

    def forward(batch: Batch) -> Tensor:
        output: Any = theirs(input_ids=batch["input_ids"])
        logits: Tensor = output.logits
        return logits

    return ours, theirs, forward


def make_batch(size: int, length: int) -> Batch:
    """Random tokens; sources are padded by an eighth on average."""
    ids = torch.randint(1, VOCAB_SIZE, (3, size, length))
    lengths = torch.randint(length * 3 // 4, length + 1, (size, 1))
    return {
        "source_ids": ids[0],
        "source_mask": torch.arange(length) < lengths,
        "decoder_input_ids": ids[1],
        "input_ids": ids[1],
        "labels": ids[2],
    }


def stepper(model: nn.Module, forward: Forward, dtype: torch.dtype) -> Callable[[Batch], float]:
    """A function that makes one optimizer step and returns its seconds."""
    model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> float:
        start = time.perf_counter()
        loss = F.cross_entropy(forward(batch).flatten(0, 1).float(), batch["labels"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def compare(
    build: Callable[[], tuple[nn.Module, nn.Module, Forward]], batch: Batch, dtype: torch.dtype, pairs: int
) -> str:
    """One row of the table: median ratio, its range, and our tokens per second."""
    torch.manual_seed(0)
    ours, theirs, their_forward = build()
    ours.reset_parameters(torch.Generator().manual_seed(0))  # type: ignore[operator]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    our_step, their_step = stepper(ours, ours, dtype), stepper(theirs, their_forward, dtype)
    seconds = [(our_step(batch), their_step(batch)) for _ in range(pairs + 2)][2:]
    ratios = [their / our for our, their in seconds]
    tokens = batch["labels"].numel() / statistics.median(our for our, _ in seconds)
    return f"{statistics.median(ratios):6.2f}   {min(ratios):5.2f} to {max(ratios):5.2f}   {tokens:10,.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--precision", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    builds: dict[str, Callable[[], tuple[nn.Module, nn.Module, Forward]]] = {
        "encoder-decoder / T5": encoder_decoders,
        "decoder / Llama": partial(decoders, NUM_HEADS),
        "decoder / Llama, 2 kv": partial(decoders, 2),
    }
    print("model                  precision  batch    ratio   range            target tokens/s")
    for name, build in builds.items():
        for precision in options.precision:
            for size, length in ((16, 64), (32, 32)):
                row = compare(build, make_batch(size, length), DTYPES[precision], options.pairs)
                print(f"{name:22} {precision:9}  {size:2} x {length:2} {row}", flush=True)


if __name__ == "__main__":
    main()
