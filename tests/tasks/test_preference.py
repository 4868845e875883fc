"""DPO: the loss against its formula, what the reference is worth, and records that cannot be used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainer.composition import compose
from trainer.config import to_config
from trainer.data.tokenizer import ByteTokenizer, Tokenizer
from trainer.errors import ConfigError, DataError
from trainer.loop import blank_of
from trainer.models.decoder import Decoder
from trainer.parts import check_fit
from trainer.tasks import BadRecord, Encoded, GeneratesText, PacksRows, ScoresBatches
from trainer.tasks.preference import Preference

RECORDS = [
    {"prompt": "Why?", "chosen": "So.", "rejected": "No idea.", "chosen_logp": -3.0, "rejected_logp": -4.5},
    {
        "prompt": [{"role": "user", "content": "And?"}],
        "chosen": "Yes",
        "rejected": "n",
        "chosen_logp": -9,
        "rejected_logp": -2,
    },
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return ByteTokenizer().prepare(lambda: iter(()))


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(260, 16, 2, d_ff=16, num_layers=1, init_std=0.5)
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model


def batch_of(task: Preference, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    samples = task.encode(records)
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return task.collate(samples)  # type: ignore[arg-type]


def log_prob(model: Decoder, tokenizer: Tokenizer, question: str, answer: str) -> torch.Tensor:
    """Of the answer and the end token, token by token."""
    (asked, told) = tokenizer.encode_batch([f"[user]\n{question}", "[assistant]\n"])
    prompt = [tokenizer.bos_id, *asked, tokenizer.eos_id, *told]
    (ids,) = tokenizer.encode_batch([answer])
    whole = torch.tensor([[*prompt, *ids, tokenizer.eos_id]])
    scores = model({"input_ids": whole[:, :-1]}).log_softmax(-1)
    return scores[0].gather(1, whole[0, 1:, None])[len(prompt) - 1 :].sum()


def test_the_loss_is_that_of_the_paper(tokenizer: Tokenizer, model: Decoder) -> None:
    """Rafailov et al. 2023, equation 7, worked out one answer at a time; and its gradient."""
    task = Preference(tokenizer, beta=0.3)
    sums = task.loss(model, batch_of(task, RECORDS))
    expected = torch.zeros(())
    correct = 0
    for question, record in zip(("Why?", "And?"), RECORDS, strict=True):
        chosen = log_prob(model, tokenizer, question, record["chosen"]) - record["chosen_logp"]
        rejected = log_prob(model, tokenizer, question, record["rejected"]) - record["rejected_logp"]
        expected = expected - torch.log(torch.sigmoid(0.3 * (chosen - rejected)))
        correct += bool(chosen > rejected)
    torch.testing.assert_close(sums.objective, expected)
    assert (sums.num_target_tokens.item(), sums.num_correct.item()) == (2, correct)
    assert not sums.nll.requires_grad and sums.nll == sums.objective
    (ours,) = torch.autograd.grad(sums.objective, model.head.weight)  # type: ignore[union-attr]
    (theirs,) = torch.autograd.grad(expected, model.head.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(ours, theirs)


def test_a_model_that_is_its_reference_has_no_margin(tokenizer: Tokenizer, model: Decoder) -> None:
    """So training begins at a loss of ln 2, which shows that the columns belong to the weights."""
    blind = Preference(tokenizer, reference_columns=())
    scores = blind.log_probs(model, batch_of(blind, RECORDS)).tolist()
    scored = [
        {**record, "chosen_logp": chosen, "rejected_logp": rejected}
        for record, (chosen, rejected) in zip(RECORDS, scores, strict=True)
    ]
    task = Preference(tokenizer)
    batch = batch_of(task, scored)
    assert float(task.loss(model, batch).objective.detach()) == pytest.approx(2 * math.log(2), abs=1e-5)
    assert isinstance(task, ScoresBatches)
    found = task.batch_scores(model, batch)
    assert found["reward_margin"] == (pytest.approx(0, abs=1e-5), 2.0)
    assert set(found) == {"reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward"}


def test_scores_are_means_of_pairs_and_blanks_weigh_nothing(tokenizer: Tokenizer, model: Decoder) -> None:
    task = Preference(tokenizer, beta=0.5)
    batch = batch_of(task, RECORDS)
    both = [task.batch_scores(model, batch_of(task, [record])) for record in RECORDS]
    together = task.batch_scores(model, batch)
    for name, (total, count) in together.items():
        assert count == 2
        assert total == pytest.approx(sum(one[name][0] for one in both), rel=1e-4), name
    margin = together["chosen_reward"][0] - together["rejected_reward"][0]
    assert together["reward_margin"][0] == pytest.approx(margin, rel=1e-4)
    assert together["reward_accuracy"][0] == float(task.loss(model, batch).num_correct)
    blank = blank_of(batch)
    sums = task.loss(model, blank)
    assert float(sums.objective.detach()) == 0.0 and int(sums.num_target_tokens) == 0
    assert all(score == (0.0, 0.0) for score in task.batch_scores(model, blank).values())


def test_a_pair_is_two_rows(tokenizer: Tokenizer) -> None:
    task = Preference(tokenizer)
    batch = batch_of(task, RECORDS)
    assert batch["input_ids"].shape[0] == 4 and batch["reference"].tolist() == [-3.0, -4.5, -9.0, -2.0]
    real = int(batch["attention_mask"].sum())
    assert task.num_positions(batch) == (batch["labels"].numel(), batch["labels"].numel() - real)
    (sample, _) = task.encode(RECORDS)
    assert isinstance(sample, Encoded) and sample.num_target_tokens == 1
    assert not isinstance(task, PacksRows) and isinstance(task, GeneratesText)
    assert isinstance(task.encode_prompts(["Why?"])[0], Encoded)


def test_earlier_answers_belong_to_the_question(tokenizer: Tokenizer) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    task = Preference(tokenizer, reference_columns=())
    (sample,) = task.encode([{"prompt": talk, "chosen": "d", "rejected": "ee"}])
    assert isinstance(sample, Encoded)
    assert [int((sample.fields[f"{side}_labels"] >= 0).sum()) for side in ("chosen", "rejected")] == [2, 3]


def test_missing_scores_of_the_reference_name_the_cure(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no column chosen_logp .* python -m trainer\.reference_scores run=NAME"):
        Preference(tokenizer).encode([{"prompt": "a", "chosen": "b", "rejected": "c"}])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "column 'prompt' is empty"),
        ({"prompt": [{"role": "me", "content": "a"}]}, "has the role 'me'"),
        ({"rejected": 3}, "column 'rejected' holds int, not text"),
        ({"chosen_logp": float("nan")}, "column 'chosen_logp' holds nan, not a log-probability"),
        ({"chosen": "a" * 200}, "tokens are more than task.sequence_length=100"),
    ],
)
def test_a_record_that_is_no_pair_says_why(tokenizer: Tokenizer, change: dict[str, Any], reason: str) -> None:
    (bad,) = Preference(tokenizer, sequence_length=100).encode([{**RECORDS[0], **change}])
    assert isinstance(bad, BadRecord) and reason in bad.reason


def test_options_that_cannot_be_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"task\.beta=0"):
        Preference(tokenizer, beta=0)
    with pytest.raises(ConfigError, match=r"task\.reference_columns=\['a'\]"):
        Preference(tokenizer, reference_columns=["a"])


def test_ranks_do_not_share_its_sequences(tokenizer: Tokenizer, model: Decoder) -> None:
    """A part of the positions knows no log-probability of a whole answer."""
    config = to_config(
        compose(["experiment=dpo_small", "engine=zero2", "engine.sequence_parallel=2", "tokenizer.path=somewhere"])
    )
    with pytest.raises(
        ConfigError, match=r"engine\.sequence_parallel=2: the loss of Preference is no sum over positions"
    ):
        check_fit(config, Preference(tokenizer), model, tokenizer)
