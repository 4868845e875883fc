"""Summarisation: a document in, its summary out, by an encoder-decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version

from trainer.errors import ConfigError, SetupError
from trainer.tasks.text import TextTokenizer
from trainer.tasks.text_to_text import TextToText

ROUGE = ("rouge1", "rouge2", "rougeL")


class Summarisation(TextToText):
    """Teacher-forced cross-entropy with label smoothing; evaluated by beam search and ROUGE.

    prefix: what every document begins with, such as "summarize: " for public T5 models. max_source_length,
    max_target_length: tokens with the end token; a longer record is cut, or skipped with overlong="skip". beam_size,
    length_penalty, length_penalty_kind: of the beam search in evaluation (`trainer.decoding.BeamOptions`). lead_words:
    first words of the document that are the baseline `lead_rouge1` ... rouge_tokenize: "english" as rouge-score has it
    (the letters a-z and digits, lower case; for figures to compare with published ones) or "unicode" (words of any
    script). start_token: see `Translation`.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        source_column: str,
        target_column: str,
        prefix: str = "",
        label_smoothing: float = 0.1,
        beam_size: int = 4,
        length_penalty: float = 1.0,
        length_penalty_kind: str = "gnmt",
        max_source_length: int = 512,
        max_target_length: int = 128,
        overlong: str = "truncate",
        lead_words: int = 50,
        rouge_tokenize: str = "english",
        z_loss: float = 0.0,
        start_token: str | None = None,
    ) -> None:
        """Raises ConfigError for options that cannot be, SetupError without rouge-score."""
        super().__init__(
            tokenizer,
            source_column,
            target_column,
            label_smoothing=label_smoothing,
            beam_size=beam_size,
            length_penalty=length_penalty,
            length_penalty_kind=length_penalty_kind,
            max_source_length=max_source_length,
            max_target_length=max_target_length,
            overlong=overlong,
            prefix=prefix,
            z_loss=z_loss,
            start_token=start_token,
        )
        if lead_words < 1:
            raise ConfigError(f"task.lead_words={lead_words}: the baseline needs at least 1 word.")
        if rouge_tokenize not in ("english", "unicode"):
            raise ConfigError(f"task.rouge_tokenize={rouge_tokenize} is not known; choose one of english, unicode.")
        try:  # now, not at the first evaluation
            import rouge_score  # noqa: F401
        except ImportError as error:
            raise SetupError("ROUGE needs the package rouge-score; install shardwright[metrics].") from error
        self._lead_words = lead_words
        self._rouge_tokenize = rouge_tokenize

    def score(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
    ) -> dict[str, float | str]:
        """Mean F1 of ROUGE-1, -2 and -L (Lin 2004) by rouge-score, 0 to 100, without stemming; and the same as
        `lead_rouge1` ... of the first `lead_words` words of the document."""
        leads = [" ".join(source.split()[: self._lead_words]) for source in sources]
        lead = self._rouge(leads, references)
        return {
            **self._rouge(hypotheses, references),
            **{f"lead_{name}": value for name, value in lead.items()},
            "rouge_signature": f"rouge-score:{version('rouge-score')}|stem:no|tok:{self._rouge_tokenize}",
        }

    def _rouge(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE), tokenizer=_Words() if self._rouge_tokenize == "unicode" else None)
        scores = [scorer.score(*pair) for pair in zip(references, hypotheses, strict=True)]
        return {name: 100.0 * sum(one[name].fmeasure for one in scores) / max(1, len(scores)) for name in ROUGE}


class _Words:
    """A tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())
