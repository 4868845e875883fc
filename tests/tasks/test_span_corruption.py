"""Every input and target has the length it shall have, no text is lost, and equal texts are masked alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.data.fakes import loader_of, merged, saved, steps_of
from trainer.data.corpus import Corpus
from trainer.data.stream import StreamData
from trainer.data.tokenizer import ByteTokenizer, Tokenizer
from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Encoded
from trainer.tasks.span_corruption import Denoiser, SpanCorruption, random_parts

T5 = {"noise_density": 0.15, "mean_span_length": 3}
UL2 = [
    {"mode": "[R]", **T5},
    {"mode": "[S]", "noise_density": 0.25, "mean_span_length": None, "weight": 2},
    {"mode": "[X]", "noise_density": 0.5, "mean_span_length": 8},
]
TOKENIZER = ByteTokenizer(400, ["<extra_id_{0..99}>", "[R]", "[S]", "[X]"]).prepare(lambda: iter(()))
FIRST = TOKENIZER.id_of("<extra_id_0>") or 0


def task_of(length: int = 64, denoisers: Any = (T5,), **options: Any) -> SpanCorruption:
    return SpanCorruption(TOKENIZER, "text", length, denoisers, **options)


def joined(task: SpanCorruption, *texts: str) -> list[Encoded]:
    samples = task.encode([{"text": text} for text in texts])
    assert all(isinstance(sample, Encoded) for sample in samples)
    return task.join(samples)  # type: ignore[arg-type]


def restored(sample: Encoded) -> list[int]:
    """The segment that a sample was made of: each sentinel of the input replaced by what follows it in the target."""
    assert sample.fields["source_ids"][-1] == sample.fields["target_ids"][-1] == TOKENIZER.eos_id
    spans: dict[int, list[int]] = {}
    for token in sample.fields["target_ids"][:-1].tolist():
        if token >= FIRST:
            spans[token] = []
        else:
            list(spans.values())[-1].append(token)
    assert list(spans) == [FIRST + number for number in range(len(spans))] and all(spans.values())
    return [token for one in sample.fields["source_ids"][:-1].tolist() for token in spans.pop(one, [one])]


def test_t5s_own_lengths_come_out() -> None:
    """512 tokens of input are made of 568, and the target has 114 (as in the code of Raffel et al. 2020)."""
    denoiser = Denoiser(0.15, 3)
    assert denoiser.raw_length(512) == 568
    assert denoiser.lengths(568) == (512, 114)


@given(
    length=st.integers(8, 1000),
    density=st.floats(0.01, 0.9),
    span=st.none() | st.floats(1, 100),
    mode=st.none() | st.just("[R]"),
)
def test_the_input_is_as_long_as_asked_and_no_longer_text_would_do(
    length: int, density: float, span: float | None, mode: str | None
) -> None:
    assume(span is None or density / span < 0.9 * (1 - density) - 1 / length)  # room between the spans
    denoiser = Denoiser(density, span, mode)
    raw = denoiser.raw_length(length)
    assume(raw > 10)
    assert denoiser.lengths(raw)[0] == length
    assert denoiser.lengths(raw + 1)[0] >= length
    assert sum(denoiser.lengths(raw)) == raw + 2 * denoiser.noise(raw)[1] + 2 + (mode is not None)


def test_every_segment_is_full_and_all_text_is_there_once_but_for_the_end() -> None:
    texts = [f"Text number {number}, with a few words of its own." for number in range(40)]
    samples = joined(task_of(), *texts)
    assert {tuple(map(len, sample.fields.values())) for sample in samples} == {Denoiser(**T5).lengths(70)}
    assert {sample.num_target_tokens for sample in samples} == {16}
    whole = [token for text in texts for token in [*TOKENIZER.encode_batch([text])[0], TOKENIZER.eos_id]]
    found = [token for sample in samples for token in restored(sample)]
    assert found[: len(whole)] == whole
    assert found[len(whole) :] == whole[: len(found) - len(whole)] and len(found) - len(whole) < 70


def test_a_text_shorter_than_a_segment_goes_round() -> None:
    (sample,) = joined(task_of(), "abc")
    assert restored(sample)[:8] == [*TOKENIZER.encode_batch(["abc"])[0], TOKENIZER.eos_id] * 2


def test_spans_are_a_function_of_seed_and_text_and_spread_over_it() -> None:
    texts = [f"{number} {number * 17} and so on" for number in range(300)]
    once, again, other = (joined(task, *texts) for task in (task_of(), task_of(), task_of(seed=1)))
    for one, two in zip(once, again, strict=True):
        assert all(np.array_equal(one.fields[name], two.fields[name]) for name in one.fields)
    assert any(
        not np.array_equal(one.fields["source_ids"], two.fields["source_ids"])
        for one, two in zip(once, other, strict=True)
    )
    places = Counter(
        place for sample in once for place, token in enumerate(sample.fields["source_ids"].tolist()) if token >= FIRST
    )
    assert places[0] and places[62] and min(places[place] for place in range(2, 60)) > 0


def test_the_masking_is_fixed_for_good() -> None:
    """A checkpoint made today goes on with the same samples tomorrow, on another numpy too."""
    (sample,) = joined(task_of(16, [{"noise_density": 0.3, "mean_span_length": 2}]), "0123456789abcdef")
    source, target = (
        " ".join(map(TOKENIZER.token_of, sample.fields[name].tolist())) for name in ("source_ids", "target_ids")
    )
    assert source == "<extra_id_0> 1 2 3 <extra_id_1> 7 8 9 a b c d <extra_id_2> f </s> </s>"
    assert target == "<extra_id_0> 0 <extra_id_1> 4 5 6 <extra_id_2> e </s>"


def test_parts_are_positive_sum_up_and_are_equally_likely() -> None:
    words = np.random.PCG64(0)
    counts = Counter(tuple(random_parts(5, 3, words).tolist()) for _ in range(3000))
    assert set(counts) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert min(counts.values()) > 400
    assert random_parts(4, 1, words).tolist() == [4] and random_parts(3, 3, words).tolist() == [1, 1, 1]


def test_ul2_mixes_denoisers_by_weight_each_with_its_mode() -> None:
    samples = joined(task_of(64, UL2), *(f"{number}: {number**3} and some words" for number in range(2500)))
    modes = Counter(TOKENIZER.token_of(int(sample.fields["source_ids"][0])) for sample in samples)
    assert modes["[S]"] / len(samples) == pytest.approx(0.5, abs=0.05)
    assert modes["[R]"] / len(samples) == pytest.approx(0.25, abs=0.05)
    assert {len(sample.fields["source_ids"]) for sample in samples} == {64}
    for sample in samples:
        if TOKENIZER.token_of(int(sample.fields["source_ids"][0])) == "[S]":
            assert sample.fields["source_ids"][-2:].tolist() == [FIRST, TOKENIZER.eos_id]
            assert (sample.fields["target_ids"] >= FIRST).sum() == 1
    assert task_of(64, UL2).max_length == max(64, *(len(sample.fields["target_ids"]) for sample in samples))


def test_bad_records_are_told_apart_and_joined_around() -> None:
    task = task_of()
    before, bad, after = task.encode([{"text": "a"}, {"text": " "}, {"text": "b"}])
    assert bad == BadRecord("column 'text' is empty")
    assert isinstance(before, Encoded) and isinstance(after, Encoded)
    assert before.fields["ids"].tolist() == [*TOKENIZER.encode_batch(["a"])[0], TOKENIZER.eos_id]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 4}, "task.input_length=4"),
        ({"sentinel": "<gap>"}, "task.sentinel=<gap>"),
        ({"denoisers": []}, "task.denoisers is empty"),
        ({"denoisers": [{"noise_density": 1.5, "mean_span_length": 3}]}, "denoisers.0.noise_density=1.5 must be"),
        ({"denoisers": [{"noise_density": 0.1, "mean_span_length": 0.5}]}, "denoisers.0.mean_span_length=0.5 must be"),
        ({"denoisers": [{"noise_density": 0.1, "mean_span": 3}]}, "mean_span is not known; did you mean"),
        ({"denoisers": [{**T5, "weight": 0}]}, "all weights are 0"),
        ({"denoisers": [{**T5, "mode": "[Q]"}]}, r'need 1 tokens .*: tokenizer.special_tokens=\["\[Q\]"\]'),
        ({"denoisers": [{"noise_density": 0.9, "mean_span_length": 1}]}, "inputs of exactly 64 tokens cannot come"),
        ({"length": 4000}, r'need 222 tokens .*: tokenizer.special_tokens=\["<extra_id_\{0..221\}>"\]'),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(**options)


@pytest.fixture
def data(tmp_path: Path) -> StreamData:
    for split, count in (("train", 400), ("validation", 30)):
        lines = [f'{{"text": "{split} {number} {"word " * (number % 23)}"}}\n' for number in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    return StreamData(str(tmp_path), lanes=4, block=32, trace=True)


@pytest.mark.parametrize("batching", ["bucketed", "padded"])
def test_training_pads_nothing_and_ranks_and_resumption_change_nothing(
    tmp_path: Path, data: StreamData, batching: str
) -> None:
    data.batching = batching  # type: ignore[assignment]
    task = task_of()
    options = {"task": task, "global_size": 8}
    whole = steps_of(data, 12, **options)
    for step in whole[0]:
        assert step.num_padding == 0
        assert all(batch["source_ids"].shape[1] == 64 for batch in step.micro_batches)
    assert merged(steps_of(data, 12, world_size=2, **options)) == merged(whole)
    resumed = steps_of(data, 7, world_size=4, states=saved(steps_of(data, 5, world_size=2, **options)), **options)
    assert merged(resumed) == merged(whole)[5:]
    ids = [id for step in merged(whole) for id in step]
    assert len(set(ids)) > 60


def test_another_epoch_is_cut_and_masked_in_another_way(data: StreamData) -> None:
    loader = loader_of(data, task_of(), global_size=8, epochs=2)
    seen: list[tuple[float, bytes]] = []
    for step in loader:
        if step.exhausted:
            break
        for batch in step.micro_batches:
            seen += [(step.epoch, row.numpy().tobytes()) for row in batch["source_ids"]]
    loader.close()
    first = {row for epoch, row in seen if epoch <= 1}
    second = {row for epoch, row in seen if epoch > 1}
    assert len(first) > 50 and len(second) > 50 and len(first & second) < 0.1 * len(second)


def test_evaluation_joins_in_the_order_of_the_file_whatever_the_ranks(data: StreamData) -> None:
    corpus = Corpus(data, {"": task_of()})
    alone = corpus.evaluation_samples("validation", 0, 1, None)
    shared = [corpus.evaluation_samples("validation", rank, 3, None) for rank in range(3)]
    assert sorted(sample.index for part in shared for sample in part) == [sample.index for sample in alone]
    assert {len(sample.encoded.fields["source_ids"]) for sample in alone} == {64}
    assert TOKENIZER.decode(restored(alone[0].encoded)).startswith("validation 0")
    assert corpus.first_sample().fields["source_ids"].shape == (64,)


def test_packing_is_refused_for_there_is_nothing_to_pack(data: StreamData) -> None:
    data.batching = "packed"
    with pytest.raises(ConfigError, match=r"samples of SpanCorruption cannot share rows; use data.batching=bucketed"):
        loader_of(data, task_of())


def test_an_own_tokenizer_needs_its_sentinels() -> None:
    plain: Tokenizer = ByteTokenizer().prepare(lambda: iter(()))
    with pytest.raises(ConfigError, match=r"need 3 tokens"):
        SpanCorruption(plain, "text", 50, [T5])


def test_sources_of_a_mixture_are_joined_each_for_itself(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name * 30}"}}\n' * 300)
    sources = {name: {"path": str(tmp_path / f"{name}.jsonl"), "weight": 1.0 + (name == "b")} for name in "ab"}
    data = StreamData(sources=sources, lanes=4, block=64, trace=True)
    options = {"task": task_of(), "global_size": 8}
    whole = steps_of(data, 10, **options)
    letters = Counter(
        frozenset(TOKENIZER.decode(row.tolist()))
        for step in whole[0]
        for batch in step.micro_batches
        for row in batch["source_ids"]
    )
    assert set(letters) == {frozenset("a"), frozenset("b")}
    assert 1.5 < letters[frozenset("b")] / letters[frozenset("a")] < 2.5
    resumed = steps_of(data, 6, world_size=2, states=saved(steps_of(data, 4, **options)), **options)
    assert merged(resumed) == merged(whole)[4:]
