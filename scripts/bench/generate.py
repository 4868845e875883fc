"""Tokens a second of our decoding beside transformers' `generate`, on the same weights.

    python scripts/bench/generate.py [--pairs 5] [--threads 2] [--rows 16] [--tokens 64] [--precision fp32,bf16]

A T5 (4 + 4 layers, d 256) and a Llama (4 layers, d 256) with random weights write `tokens` tokens for `rows` sources or
prompts of different lengths, greedily and with 4 beams. No row ends early: the end token is given no chance. Ours and
theirs take turns; printed are tokens a second and medians and ranges of ours / theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from trainer.build import build
from trainer.decoding import BeamOptions, beam_search
from trainer.formats.catalogue import part_of
from trainer.host import keep_freed_memory
from trainer.pretrained import open_weights

VOCABULARY = 8000
PAD, EOS = 0, 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--precision", default="fp32,bf16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `python -m trainer.generate` does
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for precision in options.precision.split(","):
        for name, theirs in (("T5", t5()), ("Llama", llama())):
            theirs = theirs.to(DTYPES[precision]).eval()
            ours = counterpart(theirs).to(DTYPES[precision]).eval()
            for beams in (1, 4):
                measure(f"{precision} {name}, {beams} beam(s)", ours, theirs, beams, options)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=256, d_kv=64, d_ff=683, num_layers=4, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=PAD,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def counterpart(theirs: Any) -> torch.nn.Module:
    """Our model with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        part = part_of(json.loads((Path(folder) / "config.json").read_text()))
        model: torch.nn.Module = build(part, "model")
        weights = open_weights(f"hf:{folder}", "", part, {name: p.shape for name, p in model.named_parameters()})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                values = weights.values(name)
                assert values is not None
                parameter.copy_(values.view(parameter.shape))
    return model


def measure(what: str, ours: Any, theirs: Any, beams: int, options: argparse.Namespace) -> None:
    """One line of figures."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 33, (options.rows,), generator=generator)
    ids = torch.randint(2, VOCABULARY, (options.rows, 32), generator=generator)
    text = theirs.config.is_encoder_decoder
    places = torch.arange(32)
    mask = places < lengths[:, None] if text else places >= 32 - lengths[:, None]
    batch = {"source_ids": ids, "source_mask": mask} if text else {"input_ids": ids, "attention_mask": mask}
    ours_head = ours.embedding if ours.head is None else ours.head
    never = ours_head.register_forward_hook(_never_ends)

    def write_ours() -> int:
        limits = BeamOptions(beam_size=beams, max_length=options.tokens, length_penalty=0.0)
        return sum(map(len, beam_search(ours, batch, PAD, EOS, PAD, limits)))

    def write_theirs() -> int:
        written = theirs.generate(
            input_ids=ids, attention_mask=mask.long(), num_beams=beams, do_sample=False, length_penalty=0.0,
            max_new_tokens=options.tokens, min_new_tokens=options.tokens,
        )  # fmt: skip
        return (written.shape[1] - (1 if text else ids.shape[1])) * len(written)

    with torch.inference_mode():
        rates = [(rate(write_ours), rate(write_theirs)) for _ in range(options.pairs + 1)][1:]
    never.remove()
    ratios = [own / other for own, other in rates]
    print(
        f"{what}: ours {statistics.median(own for own, _ in rates):,.0f} tokens/s, theirs"
        f" {statistics.median(other for _, other in rates):,.0f}; ratio {statistics.median(ratios):.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def _never_ends(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    if output.shape[-1] == VOCABULARY:
        output[..., EOS] = torch.finfo(output.dtype).min
    return output


def rate(write: Callable[[], int]) -> float:
    """Tokens a second."""
    started = time.perf_counter()
    return write() / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
