"""How close generated answers are to reference answers: BLEU-4 and ROUGE-1, -2, -L, through sacrebleu and rouge-score.

The names and the range, 0 to 1, are PaddleNLP's. Text without spaces between words is compared by characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from oarsmith.errors import MissingExtraError

_HAN = "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
# Thai, Lao, Khmer and Burmese write no spaces between words either.
_OTHER_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = re.compile(f"[{_HAN}{_KANA}{_OTHER_UNSPACED}]")
_BEYOND_HAN = re.compile(f"[{_KANA}{_OTHER_UNSPACED}]")
# A character of unspaced text, or a run of letters and digits of any other script.
_WORD = re.compile(f"[{_HAN}{_KANA}{_OTHER_UNSPACED}]|(?:(?![{_HAN}{_KANA}{_OTHER_UNSPACED}])[^\\W_])+")


@dataclass(frozen=True)
class GenerationScores:
    """Over all answers, each from 0 to 1.

    Attributes:
        bleu4: of the corpus (Papineni et al. 2002), with sacrebleu's tokenizer for the kind of text.
        rouge1, rouge2, rougel: mean F1 over the answers (Lin 2004), without stemming.
        count: number of answers.
    """

    bleu4: float
    rouge1: float
    rouge2: float
    rougel: float
    count: int

    def record(self) -> dict[str, float]:
        """As part of an evaluation's record."""
        return {
            "eval_bleu4": self.bleu4,
            "eval_rouge1": self.rouge1,
            "eval_rouge2": self.rouge2,
            "eval_rougel": self.rougel,
        }


class Words:
    """rouge-score's tokenizer for any script: lower-case words of letters and digits, single characters where a script
    has no spaces. Of English it makes what rouge-score's own does (without stemming)."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def require_metrics(purpose: str) -> None:
    """Refuse early, not after hours of training.

    Raises:
        MissingExtraError: a package is missing.
    """
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "sacrebleu", "eval", purpose) from error


def score_answers(answers: Sequence[str], references: Sequence[str]) -> GenerationScores:
    """BLEU-4 and ROUGE of answers, each beside its reference.

    Raises:
        MissingExtraError: a package is missing.
    """
    assert len(answers) == len(references) and answers, (len(answers), len(references))
    require_metrics("scoring generated answers")
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    bleu = sacrebleu.corpus_bleu(list(answers), [list(references)], tokenize=bleu_tokenizer(references))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False, tokenizer=Words())
    rows = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    means = {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in ("rouge1", "rouge2", "rougeL")}
    return GenerationScores(bleu.score / 100, means["rouge1"], means["rouge2"], means["rougeL"], len(rows))


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's name of the tokenizer that fits most references: ``13a`` (words), ``zh`` or ``char``."""
    kinds = [_kind(text) for text in references]
    return max(("13a", "zh", "char"), key=kinds.count)


def _kind(text: str) -> str:
    if len(_UNSPACED.findall(text)) * 2 < len(_WORD.findall(text)):
        return "13a"
    return "char" if _BEYOND_HAN.search(text) else "zh"
