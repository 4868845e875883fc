"""The loader's thread, its errors, its micro-batches and its treatment of bad records."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.fakes import loader_of
from trainer.data.stream import StreamData
from trainer.data.tokenizer import TrainedTokenizer
from trainer.errors import DataError
from trainer.tasks import BadRecord, Encoded, Record


class PairTask:
    """Pairs of lists of numbers in the columns source and target."""

    required_columns = ("source", "target")
    max_length = None

    def pieces(self, sample: Encoded) -> list[Encoded]:
        return [sample]

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        return [self._encode(record) for record in records]

    def _encode(self, record: Record) -> Encoded | BadRecord:
        if record["source"] == "burst":
            raise RuntimeError("the task broke")
        if not isinstance(record["source"], list):
            return BadRecord("column source is not a list")
        fields = {name: np.asarray(record[name], np.int32) for name in ("source", "target")}
        return Encoded(fields, max(map(len, fields.values())), len(fields["target"]))

    def collate(self, samples: Sequence[Encoded]) -> Any:
        return {name: [sample.fields[name] for sample in samples] for name in ("source", "target")}

    def num_positions(self, batch: Any) -> tuple[int, int]:
        sizes = {name: [len(row) for row in rows] for name, rows in batch.items()}
        positions = sum(len(rows) * max(rows) for rows in sizes.values())
        return positions, positions - sum(sum(rows) for rows in sizes.values())


def pairs(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"source": [1] * (1 + number % 11), "target": [1] * (1 + number % 7)}


def write(path: Path, rows: Iterator[Any] | Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "loader"]


def test_a_step_says_what_it_holds(tmp_path: Path) -> None:
    data = StreamData(str(write(tmp_path / "pairs.jsonl", pairs(96))))
    loader = loader_of(data, PairTask(), 48, world_size=2, micro_size=8, rank=1)
    step = next(iter(loader))
    loader.close()
    assert len(step.micro_batches) == 3 and step.num_samples == 24 == len(step.ids)
    assert step.num_target_tokens == sum(len(row) for batch in step.micro_batches for row in batch["target"])
    assert set(step.lane_states) == set(range(1, 48, 2))
    assert step.epoch == 0.5 and not step.exhausted
    longest = [max(map(len, batch["source"] + batch["target"])) for batch in step.micro_batches]
    assert longest == sorted(longest, reverse=True)


def test_token_budgets_hold_and_use_every_sample(tmp_path: Path) -> None:
    rows = [*pairs(95), {"source": [1] * 90, "target": [1] * 90}]
    data = StreamData(str(write(tmp_path / "pairs.jsonl", rows)))
    loader = loader_of(data, PairTask(), 96, micro_tokens=100, rank=0)
    step = next(iter(loader))
    loader.close()
    sizes = [PairTask().num_positions(batch)[0] for batch in step.micro_batches]
    assert sizes[0] == 180 and len(step.micro_batches[0]["source"]) == 1  # too long for any budget: alone
    assert all(size <= 100 for size in sizes[1:])
    assert sum(len(batch["source"]) for batch in step.micro_batches) == 96


def test_close_ends_the_thread_at_any_time(tmp_path: Path) -> None:
    data = StreamData(str(write(tmp_path / "pairs.jsonl", pairs(96))))
    for steps in (0, 1, 5):
        loader = loader_of(data, PairTask(), 48, rank=0)
        list(islice(loader, steps))
        assert loader_threads()
        loader.close()
        assert not loader_threads()
    loader_of(data, PairTask(), 48, rank=0).close()  # never started


def test_an_error_in_the_thread_reaches_the_consumer_with_its_place(tmp_path: Path) -> None:
    rows = [*pairs(600), {"source": "burst"}]
    data = StreamData(str(write(tmp_path / "pairs.jsonl", rows)))
    loader = loader_of(data, PairTask(), 48, rank=0)
    with pytest.raises(RuntimeError, match="the task broke") as caught:
        list(loader)
    loader.close()
    assert "while encoding pairs.jsonl:512 to pairs.jsonl:600" in caught.value.__notes__


def test_a_shard_that_breaks_off_is_named_with_its_record(tmp_path: Path) -> None:
    import gzip

    whole = gzip.compress(("\n".join(json.dumps(pair) for pair in pairs(5000)) + "\n").encode())
    (tmp_path / "pairs.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    loader = loader_of(StreamData(str(tmp_path / "pairs.jsonl.gz")), PairTask(), 48)
    with pytest.raises(DataError, match=r"pairs.jsonl.gz: cannot be read at record \d+"):
        list(loader)
    loader.close()


def test_bad_records_are_skipped_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*pairs(30), "{torn", {"source": None, "target": None}, *pairs(30)]
    data = StreamData(str(write(tmp_path / "pairs.jsonl", rows)), shuffle=False, batching="padded")
    loader = loader_of(data, PairTask(), 60, rank=0)
    step = next(iter(loader))
    loader.close()
    assert step.ids == [f"pairs.jsonl:{number}" for number in (*range(30), *range(32, 62))]
    (warning,) = caplog.messages
    assert "pairs.jsonl:30: line 31 is not JSON" in warning


def test_too_many_bad_records_are_an_error_naming_the_first(tmp_path: Path) -> None:
    rows = [*pairs(100), *["{torn"] * 20]
    data = StreamData(str(write(tmp_path / "pairs.jsonl", rows)))
    loader = loader_of(data, PairTask(), 48, rank=0)
    with pytest.raises(
        DataError, match=r"20 of the first 120 records .* the first is pairs.jsonl:100: line 101 is not JSON"
    ):
        raise next(iter(loader)).failure or AssertionError
    loader.close()
    data = StreamData(str(tmp_path / "pairs.jsonl"), max_bad_fraction=0.5)
    loader = loader_of(data, PairTask(), 48, rank=0)
    assert next(iter(loader)).num_samples == 48
    loader.close()


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (2, 2)])
def test_less_than_a_tenth_of_real_sentence_pairs_is_padding(world_size: int, accumulation: int) -> None:
    data = StreamData("corpora:homeassistant_en_de")
    tokenizer = TrainedTokenizer("bpe", 8000).prepare(
        lambda: (record[name] for _, record in data.datasets[""].records("train") for name in ("en", "de"))
    )

    class TextTask(PairTask):
        def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
            sides = [tokenizer.encode_batch([record[name] for record in records]) for name in ("en", "de")]
            pairs = [{"source": s[:127], "target": t[:127]} for s, t in zip(*sides, strict=True)]
            return super().encode(pairs)

    loader = loader_of(data, TextTask(), 192, world_size, micro_size=192 // world_size // accumulation)
    steps = list(islice(loader, 115))  # an epoch
    loader.close()
    assert sum(step.num_padding for step in steps) / sum(step.num_positions for step in steps) < 0.1
