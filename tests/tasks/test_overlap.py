"""BLEU, chrF and ROUGE by hand, and against the packages called directly."""

import math
import sys

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from ftlib import metrics
from ftlib.tasks import overlap

FOUND = ["the cat sat on the mat", "a dog barked loudly at night", "nothing fits", "Rain, again."]
WANTED = ["the cat sat on a mat", "the dog barks loudly at night", "other words entirely", "rain again !"]
MORE = ["a cat sat on the mat", "dogs bark at night", "nothing at all fits here", "again rain"]


def test_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours; as long as wanted
    assert math.isclose(overlap.bleu(FOUND[:1], WANTED[:1]), 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert overlap.bleu(FOUND, FOUND) == pytest.approx(100) and overlap.chrf(FOUND, FOUND) == 100
    found = overlap.rouge(["a b c d"], ["b a c"])
    # words 3 of 4 and 3; pairs none; in order a c or b c: 2 of 4 and 3
    assert found == pytest.approx({"rouge1": 6 / 7, "rouge2": 0.0, "rougeL": 4 / 7})
    assert overlap.rouge(["a b", "c"], ["a b", "d"])["rouge1"] == 0.5  # the mean over texts


@pytest.mark.parametrize("options", [{}, {"lowercase": True}, {"tokenize": "char"}])
def test_bleu_is_sacrebleus(options):
    assert overlap.bleu(FOUND, WANTED, **options) == sacrebleu.corpus_bleu(FOUND, [WANTED], **options).score
    both = list(zip(WANTED, MORE, strict=True))
    assert overlap.bleu(FOUND, both, **options) == sacrebleu.corpus_bleu(FOUND, [WANTED, MORE], **options).score


def test_bleu_of_unequally_many_references():
    some = [[WANTED[0], MORE[0]], *WANTED[1:]]
    wanted = sacrebleu.corpus_bleu(FOUND, [WANTED, [MORE[0], None, None, None]]).score
    assert overlap.bleu(FOUND, some) == wanted != overlap.bleu(FOUND, WANTED)


@pytest.mark.parametrize("options", [{}, {"word_order": 2}])
def test_chrf_is_sacrebleus(options):
    assert overlap.chrf(FOUND, WANTED, **options) == sacrebleu.corpus_chrf(FOUND, [WANTED], **options).score


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_is_rouge_scores(stem):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem)
    each = [scorer.score(wanted, found) for found, wanted in zip(FOUND, WANTED, strict=True)]
    for kind, value in overlap.rouge(FOUND, WANTED, stem=stem).items():
        assert value == pytest.approx(sum(one[kind].fmeasure for one in each) / 4, abs=1e-12)
    best = overlap.rouge(FOUND, [[a, b] for a, b in zip(WANTED, MORE, strict=True)])
    assert all(value >= overlap.rouge(FOUND, WANTED)[kind] for kind, value in best.items())
    ends = {stemmed: overlap.rouge(["barked"], ["barks"], stem=stemmed)["rouge1"] for stemmed in (False, True)}
    assert ends == {False: 0.0, True: 1.0}


def test_the_scores_of_the_task():
    found = metrics.compute_metrics("seq2seq-lm", FOUND, WANTED)
    assert found == {"bleu": metrics.bleu(FOUND, WANTED), "chrf": metrics.chrf(FOUND, WANTED)} | metrics.rouge(
        FOUND, WANTED
    )


@pytest.mark.parametrize("score", [overlap.bleu, overlap.chrf, overlap.rouge])
@pytest.mark.parametrize(
    "found, wanted, said",
    [
        (["a"], ["a", "b"], "1 predictions, 2 references"),
        ([], [], "lists of texts, at least one"),
        ("ab", ["a", "b"], "lists of texts, at least one"),
        (["a", None], ["a", "b"], "row 1: None for"),
        (["a", "b"], ["a", []], r"row 1: 'b' for \[\]"),
        (["a"], [[1]], r"row 0: 'a' for \[1\]"),
    ],
)
def test_bad_input(score, found, wanted, said):
    with pytest.raises(ValueError, match=said):
        score(found, wanted)


@pytest.mark.parametrize("score, package", [("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge", "rouge-score")])
def test_without_the_package_its_name_is_the_remedy(score, package, monkeypatch):
    for name in ("sacrebleu", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        getattr(overlap, score)(["a"], ["a"])
