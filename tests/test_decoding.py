"""Beam search and sampling against definitions computed by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from trainer.decoding import BeamOptions, SampleOptions, beam_search, sample
from trainer.errors import ConfigError
from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.models.lstm_seq2seq import LSTMSeq2Seq

PAD, BOS, EOS = 0, 1, 2


def tiny_model(vocab_size=5, seed=0, kind="transformer"):
    if kind == "transformer":
        model = EncoderDecoder(
            vocab_size, 16, 2, 32, encoder_layers=1, decoder_layers=2, max_positions=32, tie_embeddings=False
        )
    elif kind == "lstm":
        model = LSTMSeq2Seq(
            vocab_size, d_model=16, hidden_size=16, num_layers=1, attention="luong", tie_embeddings=False
        )
    else:
        model = Decoder(vocab_size, d_model=16, num_heads=2, d_ff=32, num_layers=2, init_std=0.3, max_positions=32)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.embedding.weight.mul_(3.0)  # distributions that differ from position to position ...
        model.head.weight.mul_(3.0 if kind == "transformer" else 10.0)
        model.head.weight[EOS].mul_(2.0)  # ... and ends that come at different times
    return model.eval()


def sources(lengths, vocab_size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return {"source_ids": ids, "source_mask": mask}


def row_of(batch, index):
    length = int(batch["source_mask"][index].sum())
    return {name: tensor[index : index + 1, :length] for name, tensor in batch.items()}


def search(model, batch, **options):
    all_finished = options.pop("all_finished", None)
    with torch.inference_mode():
        return beam_search(model, batch, BOS, EOS, PAD, BeamOptions(**options), all_finished=all_finished)


def score(model, batch, ids, length_penalty, kind="gnmt"):
    """log P of `ids` (with its end token, where it has one) over the penalty, by one uncached forward pass."""
    with torch.inference_mode():
        logits = model({**batch, "decoder_input_ids": torch.tensor([[BOS, *ids[:-1]]])})[0]
    log_probs = logits.index_fill(1, torch.tensor([PAD]), -torch.inf).log_softmax(-1)
    total = sum(float(log_probs[position, token]) for position, token in enumerate(ids))
    return total / ((5 + len(ids)) / 6 if kind == "gnmt" else len(ids)) ** length_penalty


@pytest.mark.parametrize(
    ("length_penalty", "kind"), [(0.0, "gnmt"), (0.6, "gnmt"), (2.0, "gnmt"), (0.6, "power"), (2.0, "power")]
)
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_wide_enough_for_everything_finds_what_brute_force_finds(length_penalty, kind, seed):
    model, batch, longest = tiny_model(seed=seed), sources([3], seed=seed), 4
    words = [token for token in range(5) if token not in (PAD, EOS)]
    everything = [[*prefix, EOS] for length in range(longest) for prefix in itertools.product(words, repeat=length)] + [
        list(whole) for whole in itertools.product(words, repeat=longest)
    ]
    best = max(everything, key=lambda ids: score(model, batch, ids, length_penalty, kind))
    penalty = {"length_penalty": length_penalty, "length_penalty_kind": kind}
    found = search(model, batch, beam_size=5**longest, max_length=longest, **penalty)
    assert found == [[token for token in best if token != EOS]]


def test_the_length_penalty_can_change_the_winner():
    lengths = set()
    for alpha in (0.0, 5.0):
        found = search(tiny_model(seed=3), sources([3] * 8), beam_size=20, max_length=12, length_penalty=alpha)
        lengths.add(sum(map(len, found)))
    assert min(lengths) < max(lengths)


@pytest.mark.parametrize("length_penalty", [0.6, 9.0])
@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_one_beam_is_the_greedy_path(kind, length_penalty):
    model, batch = tiny_model(20, kind=kind), sources([7, 2, 5], 20)
    greedy = []
    with torch.inference_mode():
        for index in range(3):
            row, ids = row_of(batch, index), [BOS]
            while len(ids) <= 10 and ids[-1] != EOS:
                logits = model({**row, "decoder_input_ids": torch.tensor([ids])})[0, -1]
                logits[PAD] = -torch.inf
                ids.append(int(logits.argmax()))
            greedy.append([token for token in ids[1:] if token != EOS])
    assert search(model, batch, beam_size=1, max_length=10, length_penalty=length_penalty) == greedy


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_results_do_not_depend_on_the_rest_of_the_batch(kind, beam_size):
    model, batch = tiny_model(20, kind=kind), sources([9, 2, 5, 1, 7, 7], 20)
    together = search(model, batch, beam_size=beam_size, max_length=15)
    alone = [search(model, row_of(batch, index), beam_size=beam_size, max_length=15)[0] for index in range(6)]
    assert together == alone
    assert len(set(map(len, together))) > 1


def test_a_wider_beam_never_scores_lower_on_this_model():
    model, batch = tiny_model(20), sources([4], 20)

    def reached(beam_size):
        ids = search(model, batch, beam_size=beam_size, max_length=8, length_penalty=0.0)[0]
        return score(model, batch, ids if len(ids) == 8 else [*ids, EOS], 0.0)

    assert reached(1) <= reached(50)


def test_the_ratio_limits_each_sentence_by_its_own_source():
    model = tiny_model(20)
    endless = BeamOptions(beam_size=2, max_length=30, max_length_ratio=2.0, max_length_offset=1)
    with torch.inference_mode():
        found = beam_search(model, sources([6, 2, 4], 20), BOS, 19, PAD, endless)
    assert [len(ids) <= limit for ids, limit in zip(found, (13, 5, 9), strict=True)] == [True] * 3
    assert max(map(len, found)) == 13


def test_no_step_goes_beyond_the_models_positions():
    model = EncoderDecoder(
        20, d_model=16, num_heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, positions="learned", max_positions=6
    )
    model.reset_parameters(torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = beam_search(model.eval(), sources([4], 20), BOS, 19, PAD, BeamOptions(max_length=100))
    assert len(found[0]) <= 6


class Counting:
    """A model that counts its calls."""

    def __init__(self, model):
        self.model, self.max_positions, self.rows = model, model.max_positions, []

    def start_decoding(self, batch):
        return self.model.start_decoding(batch)

    def decode_step(self, state, token_ids):
        self.rows.append(len(token_ids))
        return self.model.decode_step(state, token_ids)


def test_a_finished_rank_goes_on_with_the_others_and_keeps_its_results():
    batch, reports = sources([3, 5], 20), []

    def all_finished(done):
        reports.append(done)
        return len(reports) > 40  # far beyond the positions of the model

    counting = Counting(tiny_model(20))
    assert search(counting, batch, max_length=6, all_finished=all_finished) == search(
        tiny_model(20), batch, max_length=6
    )
    assert len(counting.rows) == 40 and reports[-1]
    first_done = reports.index(True)
    assert first_done <= 6 and counting.rows[first_done:] == [1] * (40 - first_done)


def test_finished_sentences_leave_the_batch():
    counting = Counting(tiny_model(20))
    lengths = list(map(len, search(counting, sources([9, 2, 5, 1, 7, 7], 20), beam_size=1, max_length=15)))
    assert counting.rows == [sum(length >= step for length in lengths) for step in range(len(counting.rows))]
    assert counting.rows[0] == 6 and counting.rows[-1] < 6


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_sampling_at_temperature_zero_is_greedy(kind):
    model, batch = tiny_model(20, kind=kind), sources([7, 2, 5], 20)
    with torch.inference_mode():
        sampled = sample(model, batch, BOS, EOS, SampleOptions(max_length=10, temperature=0))
        assert sampled == sample(model, batch, BOS, EOS, SampleOptions(max_length=10, top_k=1))
        assert sampled == sample(model, batch, BOS, EOS, SampleOptions(max_length=10, top_p=1e-6))
    if not any(PAD in ids for ids in sampled):
        assert sampled == search(model, batch, beam_size=1, max_length=10)


def test_sampling_follows_the_distribution_and_its_restrictions():
    model = tiny_model(8, kind="decoder")
    prompt = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        probabilities = model({"input_ids": prompt})[0, -1].softmax(-1)
        batch = {"input_ids": prompt.expand(20_000, 3)}

        def frequencies(**options):
            generator = torch.Generator().manual_seed(0)
            ids = sample(model, batch, BOS, EOS, SampleOptions(max_length=1, **options), generator)
            drawn = torch.tensor([row[0] if row else EOS for row in ids])
            return torch.bincount(drawn, minlength=8) / len(drawn)

        order = probabilities.argsort(descending=True)
        assert torch.allclose(frequencies(), probabilities, atol=0.015)
        warm = probabilities.log().div(2).softmax(-1)
        assert torch.allclose(frequencies(temperature=2.0), warm, atol=0.015)
        top = frequencies(top_k=3)
        expected = torch.zeros(8).index_copy(0, order[:3], probabilities[order[:3]])
        assert torch.allclose(top, expected / expected.sum(), atol=0.015)
        needed = int((probabilities[order].cumsum(0) < 0.6).sum()) + 1
        nucleus = frequencies(top_p=0.6)
        assert set(nucleus.nonzero()[:, 0].tolist()) == set(order[:needed].tolist())


def test_prompts_of_different_lengths_continue_as_if_alone():
    model = tiny_model(20, kind="decoder")
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, PAD, PAD], [11, PAD, PAD, PAD, PAD]])
    lengths = [5, 3, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        options = SampleOptions(max_length=8, temperature=0)
        together = sample(model, {"input_ids": ids, "attention_mask": mask}, BOS, EOS, options)
        alone = [
            sample(model, {"input_ids": row[None, :n]}, BOS, EOS, options)[0]
            for row, n in zip(ids, lengths, strict=True)
        ]
        beams = beam_search(
            model, {"input_ids": ids, "attention_mask": mask}, BOS, EOS, PAD, BeamOptions(beam_size=3, max_length=8)
        )
        beams_alone = [
            beam_search(model, {"input_ids": row[None, :n]}, BOS, EOS, PAD, BeamOptions(beam_size=3, max_length=8))[0]
            for row, n in zip(ids, lengths, strict=True)
        ]
    assert together == alone
    assert beams == beams_alone


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beam_size": 0}, "beam_size=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"length_penalty": -1.0}, "length_penalty=-1.0"),
        ({"length_penalty_kind": "other"}, "length_penalty_kind=other .* gnmt or power"),
    ],
)
def test_impossible_beam_options_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        BeamOptions(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"temperature": -1.0}, "temperature=-1.0"), ({"top_k": 0}, "top_k=0"), ({"top_p": 1.5}, "top_p=1.5")],
)
def test_impossible_sampling_options_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        SampleOptions(**options)
