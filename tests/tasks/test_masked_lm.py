from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.fakes import saved, steps_of
from trainer.data.stream import StreamData
from trainer.errors import ConfigError
from trainer.tasks import IGNORE, BadRecord, Encoded, PacksRows
from trainer.tasks.masked_lm import MaskedLM

MASK = 259
TEXTS = ["the quick brown fox", "jumps over", "the lazy dog, and on it goes for a while", "x"]


@pytest.fixture
def masking(tokenizer: Any) -> Any:
    """The byte tokenizer of these tests with a mask token."""
    tokenizer.mask_id, tokenizer.vocab_size = MASK, 260
    return tokenizer


@pytest.fixture
def task(masking: Any) -> MaskedLM:
    return MaskedLM(masking, "text", sequence_length=64)


def encoded(task: MaskedLM, *texts: str) -> list[Encoded]:
    samples = task.encode([{"text": text} for text in texts])
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return samples  # type: ignore[return-value]


def test_only_chosen_tokens_are_labelled_and_never_the_ends(task: MaskedLM) -> None:
    samples = encoded(task, *TEXTS)
    batch = task.collate(samples)
    for row, (text, sample) in enumerate(zip(TEXTS, samples, strict=True)):
        ids = [1, *(3 + byte for byte in text.encode()), 2]
        length = len(ids)
        labels, inputs = batch["labels"][row], batch["input_ids"][row]
        chosen = labels != IGNORE
        assert int(chosen.sum()) == max(1, round(0.15 * len(text))) == sample.num_target_tokens
        assert not chosen[0] and not chosen[length - 1 :].any()
        assert labels[chosen].tolist() == [one for one, there in zip(ids, chosen, strict=False) if there]
        assert (inputs[:length][~chosen[:length]] == torch.tensor(ids)[~chosen[:length]]).all()
        assert (inputs[length:] == 0).all() and batch["attention_mask"][row].sum() == length
    assert task.num_positions(batch) == (4 * 42, 4 * 42 - sum(sample.length for sample in samples))
    assert task.flops_per_sample_lengths(batch) == {"source_length": 42}


def test_of_the_chosen_80_percent_are_masked_10_random_10_kept(masking: Any) -> None:
    task = MaskedLM(masking, "text", sequence_length=20_002, mask_fraction=0.5)
    batch = task.collate(encoded(task, "a" * 20_000))
    chosen = batch["labels"] != IGNORE
    inputs = batch["input_ids"][chosen]
    assert int(chosen.sum()) == 10_000
    assert float((inputs == MASK).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((inputs == 3 + ord("a")).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert len(inputs.unique()) > 250  # the random ones are of the whole vocabulary
    places = torch.nonzero(chosen[0]).squeeze(1).float()
    assert float(places.mean()) == pytest.approx(10_000, rel=0.02)


def test_an_evaluation_asks_the_same_every_time_and_noise_something_else(task: MaskedLM) -> None:
    (sample,) = encoded(task, TEXTS[2])
    again, other = task.collate([sample]), task.collate([sample._replace(noise=7)])
    assert torch.equal(task.collate([sample])["input_ids"], again["input_ids"])
    assert not torch.equal(other["labels"], again["labels"])
    assert (other["labels"] != IGNORE).sum() == (again["labels"] != IGNORE).sum()


def test_rows_hold_what_samples_have_alone(task: MaskedLM) -> None:
    assert isinstance(task, PacksRows)
    samples = [sample._replace(noise=number) for number, sample in enumerate(encoded(task, *TEXTS))]
    batch = task.collate_rows([[samples[0], samples[1]], [samples[2]]], (64,))
    alone = [task.collate([sample]) for sample in samples]
    for name in ("input_ids", "labels"):
        row = torch.cat([alone[0][name][0], alone[1][name][0]])
        assert torch.equal(batch[name][0, : len(row)], row)
        assert torch.equal(batch[name][1, : samples[2].length], alone[2][name][0])
    assert batch["segment_ids"][0].tolist() == [1] * 21 + [2] * 12 + [0] * 31
    assert batch["position_ids"][0].tolist() == [*range(21), *range(12), *([0] * 31)]
    assert torch.equal(batch["attention_mask"], batch["segment_ids"] > 0)


def test_long_texts_are_skipped_cut_or_split(masking: Any) -> None:
    assert MaskedLM(masking, "text", sequence_length=6).encode([{"text": "abcdefghij"}]) == [
        BadRecord("12 tokens are more than task.sequence_length=6 (task.overlong=skip)")
    ]
    cutting = MaskedLM(masking, "text", sequence_length=6, overlong="truncate")
    assert encoded(cutting, "abcdefghij")[0].fields["ids"].tolist() == [1, 100, 101, 102, 103, 2]
    splitting = MaskedLM(masking, "text", sequence_length=6, overlong="split")
    pieces = splitting.pieces(encoded(splitting, "abcdefghij")[0])
    assert [piece.fields["ids"].tolist() for piece in pieces] == [
        [1, 100, 101, 102, 103, 2],
        [1, 104, 105, 106, 107, 2],
        [1, 108, 109, 2],
    ]
    assert [piece.num_target_tokens for piece in pieces] == [1, 1, 1]


def test_bytes_are_those_of_what_is_hidden(masking: Any) -> None:
    task = MaskedLM(masking, "text", sequence_length=64, mask_fraction=0.5)
    (sample,) = encoded(task, "abcdefgh")
    assert task.target_bytes({"text": "abcdefgh"}, sample) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 2}, r"task\.sequence_length=2"),
        ({"mask_fraction": 1.0}, r"task\.mask_fraction=1.0"),
        ({"overlong": "wrap"}, r"task\.overlong=wrap"),
    ],
)
def test_options_that_cannot_be(masking: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskedLM(masking, "text", **{"sequence_length": 64, **options})


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer: Any) -> None:
    tokenizer.mask_id = None
    with pytest.raises(ConfigError, match=r"tokenizer\.special_tokens=\[<mask>\]"):
        MaskedLM(tokenizer, "text", sequence_length=64)


def hidden(batch: Any) -> list[tuple[int, ...]]:
    """What is hidden in each row of a batch, with the row's own tokens, so that it is known again."""
    return [tuple(row) for row in np.concatenate((batch["labels"], batch["input_ids"]), axis=1).tolist()]


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_every_epoch_hides_something_else_whoever_reads_it(tmp_path: Path, masking: Any, batching: Any) -> None:
    """48 records are one block, which the stream keeps for tasks whose epochs are alike."""
    text = "".join(f'{{"text": "{chr(97 + number % 26) * 20}"}}\n' for number in range(48))
    (tmp_path / "texts.jsonl").write_text(text)
    task = MaskedLM(masking, "text", sequence_length=22)

    def steps(count: int, world_size: int = 1, states: Any = None) -> tuple[list[list[tuple[int, ...]]], Any]:
        """What is hidden in each step, by all ranks; and where the stream then is."""
        data = StreamData(str(tmp_path / "texts.jsonl"), batching=batching)
        ranks = steps_of(data, count, world_size, states, task=task, global_size=48)
        found = [
            sorted(row for one in step for row in hidden(one.micro_batches[0])) for step in zip(*ranks, strict=True)
        ]
        return found, saved(ranks)

    (first, second), _ = steps(2)
    assert first != second
    assert len({row[:22] for row in first}) > 40  # records differ, too
    assert steps(2, world_size=2)[0] == [first, second]
    _, states = steps(1)
    assert steps(1, states=states)[0] == [second]
