"""Questions are put beside their contexts; answers are compared as SQuAD compares them."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Encoded, ScoresText
from trainer.tasks.question_answering import QuestionAnswering


@pytest.fixture
def task(tokenizer: Any) -> QuestionAnswering:
    return QuestionAnswering(tokenizer, "question", "context", "answers.text", template="{question}|{context}")


def record(question: object, context: object, answers: object) -> dict[str, Any]:
    return {"question": question, "context": context, "answers": {"text": answers}}


def test_the_template_makes_the_source_and_the_first_answer_is_the_target(
    task: QuestionAnswering, tokenizer: Any
) -> None:
    assert isinstance(task, ScoresText)
    one = record(" Who? ", "Ann {question}.", ["Ann", "Anna"])
    (sample,) = task.encode([one])
    assert isinstance(sample, Encoded)
    assert tokenizer.decode(sample.fields["source_ids"].tolist()) == "Who?|Ann {question}."
    assert tokenizer.decode(sample.fields["target_ids"].tolist()) == "Ann"
    assert task.source_and_reference(one) == ("Who?|Ann {question}.", "Ann\nAnna")
    assert task.target_bytes(one, sample) == 3
    assert task.required_columns == ("question", "context", "answers.text")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("", "c", "a"), "column 'question' is empty"),
        (record("q", None, "a"), "column 'context' is empty"),
        (record("q", "c", [" ", None]), "column 'answers.text' holds no answer"),
        (record("q", "c", 7), "column 'answers.text' holds int, not text"),
        ({"question": "q", "context": "c"}, "column 'answers.text' is missing"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(task: QuestionAnswering, bad: dict[str, Any], reason: str) -> None:
    before, result = task.encode([record("q", "c", "a"), bad])
    assert isinstance(before, Encoded) and result == BadRecord(reason)


def test_answers_count_without_case_punctuation_and_articles_and_the_best_counts(task: QuestionAnswering) -> None:
    references = ["Eiffel Tower\nTour Eiffel", "42", "Paris, France", "42"]
    hypotheses = ["the eiffel tower!", "24", "Paris in the France", "42"]
    scores = task.score(hypotheses, references, [""] * 4)
    assert scores["exact_match"] == 50.0
    assert scores["f1"] == pytest.approx(25 * (1 + 0 + 2 * 2 / 5 + 1))
    assert scores["most_frequent_exact_match"] == 50.0


def test_an_answer_of_articles_alone_is_found_only_by_its_like(task: QuestionAnswering) -> None:
    assert task.score(["a", "b"], ["The", "The"], ["", ""])["f1"] == 50.0


def test_a_template_without_its_places_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"task.template='\{question\}' has no \{context\}"):
        QuestionAnswering(tokenizer, "q", "c", "a", template="{question}")
