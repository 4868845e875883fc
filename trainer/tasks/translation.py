"""Translation: a source text in, a target text out, by an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.errors import ConfigError
from trainer.tasks.text import TextTokenizer
from trainer.tasks.text_to_text import TextToText

BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "none")
"""Those of sacreBLEU that download nothing."""


class Translation(TextToText):
    """Teacher-forced cross-entropy with label smoothing; evaluated by beam search and sacreBLEU.

    max_source_length, max_target_length: tokens with the end-of-sentence token; a longer record is skipped, or cut with
    overlong="truncate". beam_size, length_penalty, length_penalty_kind: of the beam search in evaluation
    (`trainer.decoding.BeamOptions`). bleu_tokenize: sacreBLEU's
    tokenizer ("13a"; "zh", "ja-mecab", "char" for languages without spaces). start_token: what a target begins with
    (None: the tokenizer's begin token); weights that others trained want theirs, BART's "</s>".
    """

    max_length_ratio = 2.0  # an untrained model does not find the end

    def __init__(
        self,
        tokenizer: TextTokenizer,
        source_column: str,
        target_column: str,
        label_smoothing: float = 0.1,
        z_loss: float = 0.0,
        beam_size: int = 4,
        length_penalty: float = 1.0,
        length_penalty_kind: str = "gnmt",
        max_source_length: int = 128,
        max_target_length: int = 128,
        overlong: str = "skip",
        bleu_tokenize: str = "13a",
        start_token: str | None = None,
    ) -> None:
        """Raises ConfigError for options that cannot be."""
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
            z_loss=z_loss,
            start_token=start_token,
        )
        _check_bleu_tokenize(bleu_tokenize)
        self._bleu_tokenize = bleu_tokenize

    def score(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
    ) -> dict[str, float | str]:
        """Corpus BLEU and chrF by sacreBLEU (Post 2018), and `copy_bleu`: what copying the source would score."""
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        bleu, chrf = BLEU(tokenize=self._bleu_tokenize), CHRF()
        return {
            "bleu": bleu.corpus_score(list(hypotheses), [list(references)]).score,
            "chrf": chrf.corpus_score(list(hypotheses), [list(references)]).score,
            "copy_bleu": bleu.corpus_score(list(sources), [list(references)]).score,
            "bleu_signature": str(bleu.get_signature()),
            "chrf_signature": str(chrf.get_signature()),
        }


def _check_bleu_tokenize(name: str) -> None:
    """Find out now, not at the first evaluation, that sacreBLEU cannot tokenize so."""
    if name not in BLEU_TOKENIZERS:
        raise ConfigError(f"task.bleu_tokenize={name} is not known; choose one of {', '.join(BLEU_TOKENIZERS)}.")
    from sacrebleu.metrics.bleu import BLEU

    try:
        BLEU(tokenize=name)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"task.bleu_tokenize={name} cannot be used: {error}") from error
