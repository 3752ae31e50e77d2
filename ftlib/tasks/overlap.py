"""How much of a text that was written stands in the texts that were wanted: BLEU, chrF, ROUGE, by the usual packages.

References are a text for each prediction, or several; names and options are the packages' own.

To copy: this file, sacrebleu and rouge-score.
Source: Papineni et al. 2002 (aclanthology.org/P02-1040), Popović 2015 (W15-3049), Lin 2004 (W04-1013); Post 2018
(arXiv:1804.08771) on why BLEU is computed by one program.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any


def bleu(predictions: Sequence[str], references: Sequence[Any], **options: Any) -> float:
    """BLEU of a whole corpus, 0 to 100.  options: sacrebleu's, tokenize="zh", lowercase=True, say.

    >>> round(bleu(["the cat sat on the mat"], ["the cat sat on a mat"]), 2)  # 100 * (5/6 * 3/5 * 2/4 * 1/3) ** (1/4)
    53.73
    """
    return _package("sacrebleu").corpus_bleu(*_streams(predictions, references), **options).score


def chrf(predictions: Sequence[str], references: Sequence[Any], **options: Any) -> float:
    """F2 of runs of 1 to 6 characters over a whole corpus, 0 to 100.  options: sacrebleu's, word_order=2 (chrF++), say.

    >>> chrf(["a cat"], ["a cat"]) == 100
    True
    """
    return _package("sacrebleu").corpus_chrf(*_streams(predictions, references), **options).score


def rouge(predictions: Sequence[str], references: Sequence[Any], stem: bool = False) -> dict[str, float]:
    """F1 of shared words, of pairs of words, and of the longest row of them in order, 0 to 1, each the mean over texts.

    Of several references the best one counts.  stem: word endings aside (Porter), for English.

    >>> rouge(["the cat sat"], ["a cat sat"])["rouge2"]  # one of two pairs
    0.5
    """
    kinds, wanted = ("rouge1", "rouge2", "rougeL"), _several(predictions, references)
    scorer = _package("rouge_score.rouge_scorer").RougeScorer(kinds, use_stemmer=stem)
    each = [scorer.score_multi(own, found) for found, own in zip(predictions, wanted, strict=True)]
    return {kind: sum(scores[kind].fmeasure for scores in each) / len(each) for kind in kinds}


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise ImportError(f"this score is computed by {package} ({error}): pip install {package}") from error


def _several(predictions: Sequence[str], references: Sequence[Any]) -> list[list[str]]:
    """The references of each prediction; ValueError naming the row for what is no text, or none."""
    if isinstance(predictions, str) or isinstance(references, str) or not len(predictions):
        raise ValueError("predictions and references must be lists of texts, at least one")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, {len(references)} references: need one, or some, for each")
    several = [[own] if isinstance(own, str) else list(own) for own in references]
    for row, (found, own) in enumerate(zip(predictions, several, strict=True)):
        if not own or not all(isinstance(text, str) for text in (found, *own)):
            raise ValueError(f"row {row}: {found!r:.60} for {own!r:.60}; need a text, and a text or several for it")
    return several


def _streams(predictions: Sequence[str], references: Sequence[Any]) -> tuple[list[str], list[list[str | None]]]:
    """As sacrebleu takes them: first references, second references, ...; None where a prediction has fewer."""
    several = _several(predictions, references)
    count = max(map(len, several))
    return list(predictions), [[own[i] if i < len(own) else None for own in several] for i in range(count)]
