"""Models of transformers with random weights, read by ours, and the other way round."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from trainer.build import build
from trainer.decoding import BeamOptions, SampleOptions, beam_search, sample
from trainer.export.compare import complaints
from trainer.export.weights import write_weights
from trainer.formats.catalogue import format_of, part_of
from trainer.pretrained import open_weights

transformers.utils.logging.disable_progress_bar()


def scattered(theirs: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter a little off its first value, so that biases and norms count too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return theirs.eval()


def ours_of(theirs: Any, folder: Path, **changes: Any) -> torch.nn.Module:
    """Our counterpart of a model of transformers, with its weights, by way of a folder on the disk."""
    theirs.save_pretrained(folder, max_shard_size="50KB")
    part = {**part_of(json.loads((folder / "config.json").read_text())), **changes}
    model = build(part, "model")
    weights = open_weights(f"hf:{folder}", "runs", part, {name: p.shape for name, p in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.values(name).view(parameter.shape))
    model.part = part
    return model.eval()


def theirs_of(ours: torch.nn.Module, folder: Path) -> Any:
    """A model of ours (of `ours_of`), written by the export and loaded by transformers without a remark."""
    form = format_of(ours.part, None)
    shapes = {(name, "master"): parameter.shape for name, parameter in ours.named_parameters()}

    def read_into(name: str, _: str, start: int, target: torch.Tensor) -> None:
        target.copy_(ours.get_parameter(name).detach().flatten()[start : start + target.numel()])

    folder.mkdir()
    write_weights(SimpleNamespace(shapes=shapes, read_into=read_into), form, folder, torch.float32, 50_000)
    (folder / "config.json").write_text(json.dumps(form.config))
    architecture = getattr(transformers, form.architecture)
    model, told = architecture.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not complaints(told, form), told
    return model.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest."""
    assert ours.shape == theirs.shape
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference <= tolerance, difference


def both_ways(theirs: Any, batch: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], **changes: Any) -> None:
    """theirs -> ours -> theirs: three times the same logits. changes: of our model's arguments."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        expected = theirs(**inputs).logits
        ours = ours_of(theirs, Path(folder) / "theirs", **changes)
        assert_close(ours(batch), expected)
        again = theirs_of(ours, Path(folder) / "ours")
        assert_close(again(**inputs).logits, expected)


def ids_of(vocab_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """[2, length] ids that are no special tokens."""
    return torch.randint(3, vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


def pair_of(vocab_size: int, source: int, target: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same padded pairs for our encoder-decoders and for theirs."""
    mask = torch.ones(2, source, dtype=torch.bool)
    mask[1, source // 2 + 1 :] = False
    ids, into = ids_of(vocab_size, source), ids_of(vocab_size, target, 1)
    return (
        {"source_ids": ids, "source_mask": mask, "decoder_input_ids": into},
        {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": into},
    )


def same_text(theirs: Any, ours: torch.nn.Module, source: int, beams: int, length: int = 12) -> None:
    """`generate` of transformers and our beam search write the same ids for padded sources.

    Without a length penalty, whose formulas differ; and with padding allowed, which ours rules out otherwise.
    """
    batch, inputs = pair_of(theirs.config.vocab_size, source, 1)
    config = theirs.generation_config
    start, eos = config.decoder_start_token_id, config.eos_token_id
    del inputs["decoder_input_ids"]
    with torch.inference_mode():
        search = {"num_beams": beams, "length_penalty": 0.0, "early_stopping": False} if beams > 1 else {}
        expected = theirs.generate(**inputs, max_new_tokens=length, do_sample=False, **search)
        options = BeamOptions(beam_size=beams, max_length=length, length_penalty=0.0)
        written = beam_search(ours, batch, start, eos, eos, options)
    for row, ids in zip(expected.tolist(), written, strict=True):
        assert row[0] == start
        assert (row[1 : row.index(eos)] if eos in row else row[1 : length + 1]) == ids


def prompts_of(vocab_size: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths, padded on the left, and their mask."""
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, vocab_size, mask.shape, generator=generator)
    return ids.masked_fill(~mask, 0), mask


def assert_same_text(theirs: Any, prompts: tuple[torch.Tensor, torch.Tensor], tokens: int = 12) -> None:
    """Greedy and by beams, transformers and our decoder go on with the same tokens; some texts end early."""
    ids, mask = prompts
    batch = {"input_ids": ids, "attention_mask": mask}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        ours: Any = ours_of(theirs, Path(folder) / "theirs")
        likeliest = SampleOptions(max_length=tokens, temperature=0)
        endless = torch.tensor(sample(ours, batch, -1, -1, likeliest))
        end = max(endless.unique().tolist(), key=lambda token: len(set(map(len, _until(token, endless)))))
        given = {**batch, "attention_mask": mask.long(), "eos_token_id": end, "pad_token_id": end, "do_sample": False}

        def text_of(**options: Any) -> list[list[int]]:
            return _until(end, theirs.generate(**given, max_new_tokens=tokens, **options)[:, ids.shape[1] :])

        found = sample(ours, batch, -1, end, likeliest)
        assert found == text_of() and len(set(map(len, found))) > 1
        for beams, alpha in ((1, 1.0), (3, 0.0), (3, 1.0), (4, 2.0)):
            options = BeamOptions(beams, tokens, length_penalty=alpha, length_penalty_kind="power")
            found = beam_search(ours, batch, -1, end, end, options)
            how = {"num_beams": beams, "length_penalty": alpha, "early_stopping": "never"} if beams > 1 else {}
            assert found == text_of(**how), (beams, alpha)


def _until(end: int, ids: torch.Tensor) -> list[list[int]]:
    return [[*row, end][: [*row, end].index(end)] for row in ids.tolist()]
