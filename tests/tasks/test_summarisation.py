"""Summarisation cuts long documents, and its scores are rouge-score's beside those of the first words."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from trainer.composition import compose
from trainer.config import to_config
from trainer.errors import ConfigError, SetupError
from trainer.models.decoder import Decoder
from trainer.parts import check_fit
from trainer.tasks import Encoded, PacksRows, ScoresText
from trainer.tasks.summarisation import Summarisation

DOCUMENTS = ["the cat sat on the mat and slept all day", "rain fell on the roof of the old house"]
SUMMARIES = ["the cat slept", "rain fell on the house"]


def test_a_long_document_is_cut_and_every_one_begins_with_the_prefix(tokenizer: Any) -> None:
    task = Summarisation(tokenizer, "document", "summary", prefix="s:", max_source_length=5, max_target_length=4)
    assert isinstance(task, ScoresText) and isinstance(task, PacksRows)
    (sample,) = task.encode([{"document": "abcdef", "summary": "xyz"}])
    assert isinstance(sample, Encoded)
    assert tokenizer.decode(sample.fields["source_ids"].tolist()) == "s:ab"
    assert sample.fields["source_ids"][-1] == tokenizer.eos_id
    (prompt,) = task.encode_prompts(["abcdef"])
    assert isinstance(prompt, Encoded) and prompt.fields["source_ids"].tolist() == sample.fields["source_ids"].tolist()
    assert task.source_and_reference({"document": "abcdef", "summary": "xyz"}) == ("abcdef", "xyz")


def test_rouge_counts_shared_words_pairs_and_order_and_the_lead_is_scored_too(tokenizer: Any) -> None:
    task = Summarisation(tokenizer, "document", "summary", lead_words=3)
    scores = task.score(["the cat slept", "the house on rain"], SUMMARIES, DOCUMENTS)
    # second: 4 words of which all 4 are among the 5 of the reference; no pair but "the house"; longest common: 2
    assert scores["rouge1"] == pytest.approx(50 * (1 + 2 * 4 / 9))
    assert scores["rouge2"] == pytest.approx(50 * (1 + 2 / 7))
    assert scores["rougeL"] == pytest.approx(50 * (1 + 2 * 2 / 9))
    # the leads are "the cat sat" and "rain fell on"
    assert scores["lead_rouge1"] == pytest.approx(50 * (2 / 3 + 2 * 3 / 8))
    assert scores["lead_rouge2"] == pytest.approx(50 * (1 / 2 + 2 * 2 / 6))
    assert "tok:english" in str(scores["rouge_signature"])


def test_other_scripts_have_words_when_asked(tokenizer: Any) -> None:
    hypotheses, references = ["дом под дождём"], ["старый дом"]
    assert Summarisation(tokenizer, "d", "s").score(hypotheses, references, [""])["rouge1"] == 0.0
    unicode = Summarisation(tokenizer, "d", "s", rouge_tokenize="unicode").score(hypotheses, references, [""])
    assert unicode["rouge1"] == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lead_words": 0}, "task.lead_words=0"),
        ({"rouge_tokenize": "german"}, "task.rouge_tokenize=german"),
        ({"max_target_length": 1}, "task.max_target_length=1"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(tokenizer: Any, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Summarisation(tokenizer, "document", "summary", **option)


def test_without_rouge_score_the_extra_is_named_at_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(SetupError, match=r"shardwright\[metrics\]"):
        Summarisation(tokenizer, "document", "summary")


def test_a_model_that_writes_no_targets_is_refused(tokenizer: Any) -> None:
    """One message for all tasks of text to text."""
    config = to_config(compose(["model=decoder", "task=summarisation", "name=x", "steps=1", "batch.global_size=1"]))
    task = Summarisation(tokenizer, "document", "summary")
    with pytest.raises(ConfigError, match=r"Summarisation trains models for text_to_text, and this Decoder is one for"):
        check_fit(config, task, Decoder(260, d_model=8, num_heads=2, d_ff=8, num_layers=1), None)
