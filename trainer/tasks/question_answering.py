"""Question answering as text to text: a question and its context in, the answer out, by an encoder-decoder."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from trainer.data.sources import column
from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Record
from trainer.tasks.text import TextTokenizer, text_at
from trainer.tasks.text_to_text import TextToText


class QuestionAnswering(TextToText):
    """Teacher-forced cross-entropy with label smoothing; evaluated by beam search, exact match and F1.

    The answer column holds a text, or a list of texts that are all right, of which the first is trained on (as SQuAD's
    `answers.text`). template: what the encoder reads, made of {question} and {context}; generate's texts are such, too.
    max_source_length, max_target_length: tokens with the end token; a longer record is skipped, or cut with
    overlong="truncate". beam_size, length_penalty, length_penalty_kind: of the beam search in evaluation
    (`trainer.decoding.BeamOptions`).
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        question_column: str,
        context_column: str,
        answer_column: str,
        template: str = "question: {question} context: {context}",
        label_smoothing: float = 0.0,
        beam_size: int = 1,
        length_penalty: float = 1.0,
        length_penalty_kind: str = "gnmt",
        max_source_length: int = 512,
        max_target_length: int = 64,
        overlong: str = "skip",
        z_loss: float = 0.0,
        start_token: str | None = None,
    ) -> None:
        """Raises ConfigError for options that cannot be."""
        super().__init__(
            tokenizer,
            context_column,
            answer_column,
            label_smoothing=label_smoothing,
            beam_size=beam_size,
            length_penalty=length_penalty,
            length_penalty_kind=length_penalty_kind,
            max_source_length=max_source_length,
            max_target_length=max_target_length,
            overlong=overlong,
            z_loss=z_loss,
            start_token=start_token,
        )
        missing = [name for name in ("{question}", "{context}") if name not in template]
        if missing:
            raise ConfigError(f"task.template={template!r} has no {' and no '.join(missing)}.")
        self.required_columns = (question_column, context_column, answer_column)
        self._question_column = question_column
        self._template = template

    def source_text(self, record: Record) -> str | BadRecord:
        """The question and the context in the template."""
        question, context = text_at(record, self._question_column), text_at(record, self._source_column)
        for text in (question, context):
            if isinstance(text, BadRecord):
                return text
        return self._template.replace("{question}", str(question).strip()).replace("{context}", str(context).strip())

    def target_text(self, record: Record) -> str | BadRecord:
        """The first answer."""
        answers = self._answers(record)
        return answers if isinstance(answers, BadRecord) else answers[0]

    def _answers(self, record: Record) -> list[str] | BadRecord:
        """All of them; empty ones in a list are none."""
        try:
            value = column(record, self._target_column)
        except KeyError:
            value = None
        if isinstance(value, str) or not isinstance(value, Sequence):
            text = text_at(record, self._target_column)
            return text if isinstance(text, BadRecord) else [text]
        texts = [text for text in value if isinstance(text, str) and text.strip()]
        return texts or BadRecord(f"column '{self._target_column}' holds no answer")

    def source_and_reference(self, record: Record) -> tuple[str, str]:
        """The text the encoder reads, and the answers, one a line."""
        source, answers = self.source_text(record), self._answers(record)
        assert isinstance(source, str) and isinstance(answers, list), "the record was accepted by encode"
        return source, "\n".join(" ".join(answer.split()) for answer in answers)

    def score(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
    ) -> dict[str, float | str]:
        """Percentages as SQuAD computes them (Rajpurkar et al. 2016, section 6.1): `exact_match`, and `f1` of the
        tokens, each of the best of the answers; case, punctuation, articles and spaces do not count.

        `most_frequent_exact_match`: what the commonest of all answers here would score, given to every question.
        """
        answers = [[normalised(one) for one in reference.split("\n")] for reference in references]
        given = [normalised(one) for one in hypotheses]
        common = Counter(one for right in answers for one in set(right)).most_common(1)
        scores: dict[str, list[float]] = {
            "exact_match": [float(one in right) for one, right in zip(given, answers, strict=True)],
            "f1": [max(token_f1(one, a) for a in right) for one, right in zip(given, answers, strict=True)],
            "most_frequent_exact_match": [float(common[0][0] in right) for right in answers],
        }
        return {name: 100.0 * sum(values) / max(1, len(values)) for name, values in scores.items()}


def normalised(answer: str) -> str:
    """Lower case, without punctuation (of ASCII) and English articles, words one space apart."""
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(hypothesis: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words of two normalised answers, 0 to 1; equal ones have 1."""
    given, right = hypothesis.split(), answer.split()
    if not given or not right:
        return float(given == right)
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right))
