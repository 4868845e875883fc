"""The data layer beside others, and as it grows. One process, two threads for the tokenizer, unless said otherwise.

    python scripts/bench/data.py NAME... [--pairs 5] [--records 2000000]

tokenizer   records to packed batches, against the bare rate of `tokenizers.encode_batch` on the same text
peer        target tokens a second, against `datasets` streaming + DataLoader + transformers' collator (extra [hf])
mosaic      records a second from local shards, against mosaicml-streaming, in the Python that --mosaic-python names
resume      seconds to the first batch at record 2,000 and deep in the data
memory      resident memory from record 10,000 on
state       size and save time of the loader's state with 64 lanes
shards      seconds to open 100 to 10,000 shards and give the first batch

Ratios are medians and ranges of interleaved pairs; each side reads everything anew, from files in the page cache.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from trainer import garbage
from trainer.data.corpus import Corpus, Stream
from trainer.data.dealers import make_dealers
from trainer.data.loader import Loader
from trainer.data.locate import expand
from trainer.data.stream import StreamData
from trainer.data.tokenizer import Tokenizer, TrainedTokenizer
from trainer.plan import RunPlan
from trainer.tasks import BadRecord, Encoded, Record
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.translation import Translation

GLOBAL_SIZE = 48
EPOCHS = 3
"""Passes over the packaged corpora, which are small: one would measure how a stream begins."""


def corpus_records(name: str) -> list[dict[str, str]]:
    """The train split of a packaged corpus."""
    with gzip.open(Path(expand(f"corpora:{name}")) / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_shards(folder: Path, records: Iterator[dict[str, str]] | list[dict[str, str]], count: int, each: int) -> Path:
    """`count` files of JSON lines with `each` records."""
    folder.mkdir(parents=True)
    rows = iter(records)
    for number in range(count):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in itertools.islice(rows, each)]
        (folder / f"train-{number:05d}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_loader(data: StreamData, task: Any, epochs: float | None = 1.0, states: Any = None) -> Loader:
    """A loader of one rank."""
    plan = RunPlan(1, GLOBAL_SIZE, GLOBAL_SIZE, None, None, None, "fp32", "plain", 0, "none", "none", 1.0)
    stream = Stream(Corpus(data, dict.fromkeys(data.datasets, task)), 0, GLOBAL_SIZE, epochs)
    loader = Loader(make_dealers(stream, 0, 1), task, plan, stream.row_lengths)
    if states is not None:
        loader.load_lane_states(states)
    return loader


def read(data: StreamData, task: Any, epochs: float = 1.0) -> tuple[float, int, int, float]:
    """Seconds, samples, target tokens and fill of some passes, with the garbage collector as in a run."""
    samples = tokens = positions = padding = 0
    with garbage.collected_between_steps():
        started = time.perf_counter()
        loader = make_loader(data, task, epochs)
        for number, step in enumerate(loader, start=1):
            if step.failure is not None:
                raise step.failure
            samples, tokens = samples + step.num_samples, tokens + step.num_target_tokens
            positions, padding = positions + step.num_positions, padding + step.num_padding
            if step.exhausted:
                break
            garbage.collect(number)
        seconds = time.perf_counter() - started
        loader.close()
    return seconds, samples, tokens, 1 - padding / positions


def pairs_of(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> str:
    """Median and range of (our rate / their rate) over interleaved pairs, the first left out."""
    ratios = []
    for number in range(pairs + 1):
        mine, other = ours(), theirs()
        if number:
            ratios.append(mine / other)
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def text_setups(folder: Path) -> Iterator[tuple[str, Path, Any, Tokenizer, list[dict[str, str]], list[str]]]:
    """Name, folder of 96 shards, task, tokenizer, records and columns: language-model text, and sentence pairs."""
    for name, columns in (("python_docs", ["text"]), ("homeassistant_en_de", ["en", "de"])):
        records = corpus_records(name)
        tokenizer = TrainedTokenizer(vocab_size=4096, max_records=5000).prepare(
            lambda records=records, columns=columns: (row[column] for row in records for column in columns)
        )
        task = Translation(tokenizer, "en", "de") if "en" in columns else CausalLM(tokenizer, "text", 1024)
        shards = write_shards(folder / name, records, 96, -(-len(records) // 96))
        yield name, shards, task, tokenizer, records, columns


def bench_tokenizer(folder: Path, options: argparse.Namespace) -> None:
    """Records to packed batches / tokenizers.encode_batch."""
    for name, shards, task, tokenizer, records, columns in text_setups(folder):
        backend = tokenizer._backend

        def raw(backend: Any = backend, records: Any = records, columns: Any = columns) -> float:
            started = time.perf_counter()
            for column in columns * EPOCHS:
                for begin in range(0, len(records), 512):
                    backend.encode_batch([row[column] for row in records[begin : begin + 512]])
            return 1 / (time.perf_counter() - started)

        def ours(shards: Path = shards, task: Any = task) -> float:
            return 1 / read(StreamData(str(shards), batching="packed"), task, EPOCHS)[0]

        fill = read(StreamData(str(shards), batching="packed"), task)[3]
        print(f"{name}: packed batches / encode_batch {pairs_of(ours, raw, options.pairs)}, rows {fill:.1%} full")


def encode_alone(_: int) -> None:
    """In a forked worker: the tokenizer's threads have stayed behind in the parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def bench_peer(folder: Path, options: argparse.Namespace) -> None:
    """Target tokens per second / those of datasets + DataLoader + collator, padded as by default."""
    import datasets
    import torch
    import transformers

    for name, shards, task, tokenizer, records, columns in text_setups(folder):
        names = list(records[0])
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer._backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        if "en" in columns:
            collator: Any = transformers.DataCollatorForSeq2Seq(fast)
        else:
            collator = transformers.DataCollatorForLanguageModeling(fast, mlm=False)

        def encode(rows: Any, fast: Any = fast, columns: Any = columns) -> Any:
            encoded = fast(rows[columns[0]], truncation=True, max_length=1024)
            if len(columns) > 1:
                encoded["labels"] = fast(rows[columns[1]], truncation=True, max_length=128)["input_ids"]
            return encoded

        for workers in options.workers:

            def theirs(
                shards: Path = shards, names: Any = names, encode: Any = encode, collator: Any = collator,
                workers: int = workers,
            ) -> float:  # fmt: skip
                stream = datasets.load_dataset(
                    "json", data_files=str(shards / "*.jsonl"), split="train", streaming=True
                ).shuffle(seed=0, buffer_size=10_000)
                encoded = stream.map(encode, batched=True, remove_columns=names)
                batches = torch.utils.data.DataLoader(
                    encoded, batch_size=GLOBAL_SIZE, collate_fn=collator, num_workers=workers,
                    persistent_workers=workers > 0, worker_init_fn=encode_alone,
                )  # fmt: skip
                started, tokens = time.perf_counter(), 0
                for batch in itertools.chain.from_iterable(itertools.repeat(batches, EPOCHS)):
                    tokens += int((batch["labels"] != -100).sum())
                return tokens / (time.perf_counter() - started)

            def ours(shards: Path = shards, task: Any = task, workers: int = workers) -> float:
                seconds, _, tokens, _ = read(StreamData(str(shards), batching="packed", workers=workers), task, EPOCHS)
                return tokens / seconds

            print(f"{name}, {workers} workers: ours / datasets + DataLoader {pairs_of(ours, theirs, options.pairs)}")


class Pass:
    """A task that encodes nothing, for the rate of reading, ordering and dealing alone."""

    required_columns = ("text",)
    max_length = None

    def encode(self, records: list[Record]) -> list[Encoded | BadRecord]:
        """One number a record."""
        return [Encoded({"n": np.zeros(1, np.int32)}, 1, 1) for _ in records]

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """The sample."""
        return [sample]

    def collate(self, samples: list[Encoded]) -> Any:
        """Nothing to collate."""
        return {"labels": samples}

    def num_positions(self, batch: Any) -> tuple[int, int]:
        """One each."""
        return len(batch["labels"]), 0


MOSAIC = """
import json, sys, time
from pathlib import Path
from streaming import MDSWriter, StreamingDataset
source, out = Path(sys.argv[1]), Path(sys.argv[2])
with MDSWriter(out=str(out), columns={"text": "str"}, size_limit=1 << 22) as writer:
    for path in sorted(source.glob("*.jsonl")):
        for line in path.open(encoding="utf-8"):
            writer.write({"text": json.loads(line)["text"]})
def rows(skip=0):
    data = StreamingDataset(local=str(out), shuffle=True, batch_size=48)
    if skip:
        state = {"epoch": 0, "sample_in_epoch": skip, "num_canonical_nodes": 1, "shuffle_seed": 9176}
        data.load_state_dict({**state, "initial_physical_nodes": 1})
    return iter(data)
for _ in sys.stdin:
    started, count = time.perf_counter(), 0
    for _ in rows():
        count += 1
    rate = count / (time.perf_counter() - started)
    started = time.perf_counter()
    next(rows(count // 2))
    print(rate, time.perf_counter() - started, flush=True)
"""


def bench_mosaic(folder: Path, options: argparse.Namespace) -> None:
    """Records per second / those of StreamingDataset, and seconds to resume in the middle."""
    records = corpus_records("python_docs")
    shards = write_shards(folder / "docs", records, 96, -(-len(records) // 96))
    command = [options.mosaic_python, "-c", MOSAIC, str(shards), str(folder / "mds")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin and other.stdout
        resumes = []

        def theirs() -> float:
            other.stdin.write("\n")
            other.stdin.flush()
            rate, resume = map(float, other.stdout.readline().split())
            resumes.append(resume)
            return rate

        def ours() -> float:
            seconds, samples, _, _ = read(StreamData(str(shards)), Pass())
            return samples / seconds

        print(f"records a second, ours / StreamingDataset {pairs_of(ours, theirs, options.pairs)}")
        other.stdin.close()
    data = StreamData(str(shards))
    states = states_at(data, Pass(), len(records) // 2)
    print(f"resume in the middle: ours {resume_seconds(shards, Pass(), states):.2f} s, theirs {min(resumes):.2f} s")


def states_at(data: StreamData, task: Any, record: int) -> Any:
    """The loader's state after `record` records."""
    loader = make_loader(data, task, epochs=None)
    states = None
    for step in itertools.islice(loader, record // GLOBAL_SIZE):
        if step.failure is not None:
            raise step.failure
        states = step.lane_states
    loader.close()
    return json.loads(json.dumps(states), object_hook=lambda tree: {_key(k): v for k, v in tree.items()})


def _key(name: str) -> str | int:
    return int(name) if name.isdigit() else name


def resume_seconds(shards: Path, task: Any, states: Any) -> float:
    """Seconds from nothing to the first batch."""
    started = time.perf_counter()
    loader = make_loader(StreamData(str(shards)), task, None, states)
    next(iter(loader))
    seconds = time.perf_counter() - started
    loader.close()
    return seconds


def short_records(count: int) -> Iterator[dict[str, str]]:
    """Records of some 60 bytes."""
    return ({"text": f"record {number} " + "lorem ipsum dolor "[: number % 18] * 3} for number in range(count))


def bench_resume(folder: Path, options: argparse.Namespace) -> None:
    """Seconds to the first batch, early and late, in 96 shards and in one plain file."""
    for name, count in (("96 shards", 96), ("one file", 1)):
        shards = write_shards(folder / name, short_records(options.records), count, -(-options.records // count))
        data = StreamData(str(shards))
        early, late = states_at(data, Pass(), 2000), states_at(data, Pass(), options.records - 100_000)
        times = [(resume_seconds(shards, Pass(), early), resume_seconds(shards, Pass(), late)) for _ in range(5)]
        ratios = sorted(b / a for a, b in times)
        print(
            f"{name}: record 2,000 {statistics.median(a for a, _ in times):.2f} s, record"
            f" {options.records - 100_000:,} {statistics.median(b for _, b in times):.2f} s, ratio"
            f" {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def bench_memory(folder: Path, options: argparse.Namespace) -> None:
    """Resident memory at record 10,000 and its maximum afterwards."""
    for name, count in (("96 shards", 96), ("one file", 1)):
        shards = write_shards(folder / name, short_records(options.records), count, -(-options.records // count))
        tokenizer = TrainedTokenizer(vocab_size=400).prepare(lambda: (row["text"] for row in short_records(2000)))
        loader = make_loader(StreamData(str(shards), batching="packed"), CausalLM(tokenizer, "text", 256), None)
        process, records, first, most = psutil.Process(), 0, 0, 0
        for step in loader:
            if step.failure is not None:
                raise step.failure
            records += step.num_samples
            if records < 10_000:
                continue
            resident = process.memory_info().rss
            first, most = first or resident, max(most, resident)
            if records >= options.records:
                break
        loader.close()
        print(
            f"{name}: {first / 1e6:.0f} MB at record 10,000, at most {(most - first) / 1e6:.0f} MB more up to"
            f" {records:,}"
        )


def bench_state(folder: Path, options: argparse.Namespace) -> None:
    """Bytes of the state of 64 lanes in a mixture of two sources, and seconds to write it."""
    sources = {name: write_shards(folder / name, short_records(64_000), 64, 1000) for name in ("a", "b")}
    data = StreamData(sources={name: {"path": str(path)} for name, path in sources.items()}, lanes=64)
    loader = make_loader(data, Pass(), None)
    states = [step.lane_states for step in itertools.islice(loader, 500)][-1]
    loader.close()
    started = time.perf_counter()
    text = json.dumps(states)
    (folder / "state.json").write_text(text)
    print(f"64 lanes, 2 sources: {len(text):,} bytes, written in {(time.perf_counter() - started) * 1e3:.1f} ms")


def bench_shards(folder: Path, options: argparse.Namespace) -> None:
    """Seconds from nothing to the first batch by the number of shards, and the exponent of their growth."""
    counts, seconds = (100, 1000, 10_000), []
    for count in counts:
        shards = write_shards(folder / str(count), short_records(20 * count), count, 20)
        seconds.append(min(resume_seconds(shards, Pass(), None) for _ in range(3)))
    growth = np.log(seconds[-1] / seconds[-2]) / np.log(10)
    told = ", ".join(f"{count:,}: {time_:.2f} s" for count, time_ in zip(counts, seconds, strict=True))
    print(f"{told}; from 1,000 to 10,000 it grows with shards^{growth:.2f}")


def main() -> None:
    """Run the benchmarks that were named."""
    benches = {name.removeprefix("bench_"): bench for name, bench in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=benches)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--records", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--mosaic-python", default=sys.executable)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            print(f"# {name}", flush=True)
            benches[name](Path(folder), options)


if __name__ == "__main__":
    main()
