"""Results of notebook 08b: titles and French by a small T5 after a short training, and what tunes a translator.

    python tests/benchmarks/seq2seq.py    # writes results/seq2seq.json; resumes; two trainings at a time

The model is flan-t5-titles (77 million parameters), trained as the notebook does it: embeddings and output layer stay,
unpadded, in bf16 where that pays.  Questions, corpora and test rows are the notebook's, the test larger: what do more
examples bring when the number of updates stays, and what does LoRA?  A way to train has a learning rate of its own,
searched with another seed by the score of its answers to validation rows until the best is inside; then three seeds,
greedy answers to the same test rows.  The seed draws the training rows, their order and dropout.
- titles: 48 or 192 abstracts of pubmed-titles, cut at 192 tokens, 24 updates for both; 192 also with LoRA.  Score:
  ROUGE-L.
- french: 128 or 768 English sentences of tatoeba-en-fr, of at most seven words, 48 updates for both.  Score: chrF.
- opus: a real translator, opus-mt-en-fr (75 million parameters), on 2,000 pairs of tatoeba-en-fr, 125 updates.  Score:
  chrF.  Left out, and said, where the asset is not in the cache or its tokenizer's package is lacking.
Beside them the model as it comes, and what costs nothing: the abstract's first sentence, its first words (as many as a
title has), the English sentence left as it is.
"each" has the score of every test row, for intervals over rows; "address", of French, the shares of answers that say
vous and tu, "wanted" those of the references, "others" the score where the reference says neither.

The grid takes about an hour of one core of an AMD EPYC with AVX512_BF16 (estimated from the steps of notebook 08b),
half as long with two free ones: 18 searched ways and rates, 18 tests.  A quarter of it is opus.
"""

import functools
import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from record import Job, side_by_side, started, subset

import ftlib
from ftlib.core.device import choose_device, choose_precision, computing
from ftlib.tasks.overlap import bleu, chrf, rouge

ABOUT = "flan-t5-titles taught titles of abstracts, and French; opus-mt-en-fr tuned on the French of Tatoeba"
REAL = True  # models, not tiny random ones
SEEDS, SEARCH_SEED = (0, 1, 2), 100
RATES = {"layers": (3e-4, 1e-3, 3e-3), "lora": (3e-3, 1e-2, 3e-2), "translator": (1e-5, 3e-5, 1e-4)}
LIMIT = 192  # tokens of a source
TOY = {"REAL": False, "SEEDS": (0,), "RATES": {"layers": (1e-3,), "lora": (1e-2,), "translator": (1e-3,)}, "LIMIT": 24}
TOY_SIZES = {"counts": (4, 8), "steps": 2, "batch": 2, "validation": 2, "test": 3, "tokens": 4}
ADDRESS = {"vous": r"\b(vous|votre|vos)\b", "tu": r"\b(tu|te|toi|ton|ta|tes)\b|\bt['’]"}  # how French says "you"
PLAIN = str.maketrans({"À": "A", "Ç": "C", "Ê": "E", "œ": "oe", "ë": "e", "ï": "i", "\u202f": " ", "\xa0": " "})


class Part(NamedTuple):
    """A model, a corpus as sources and targets, and how much of it is trained and tested."""

    model: str
    corpus: str
    source: str
    target: str
    prefix: str
    score: str
    counts: tuple[int, ...]  # training rows
    steps: int
    batch: int
    validation: int  # rows
    test: int
    tokens: int  # most of an answer
    longest: int  # most words of a source
    letters: dict[int, str]  # what is written in place of letters that the tokenizer lacks
    plain: dict[str, Callable[[str, int], str]]  # answers that cost nothing, of a source and the words of a target


def first_sentence(text: str, words: int) -> str:
    return re.split(r"(?<=[.?!])\s+", text)[0]


def first_words(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


PARTS = {
    "titles": Part("flan-t5-titles", "pubmed-titles", "abstract", "title", "", "rougeL", (48, 192), 24, 8, 32, 80,
                   48, 10_000, {}, {"first sentence": first_sentence, "first words": first_words}),
    "french": Part("flan-t5-titles", "tatoeba-en-fr", "en", "fr", "translate English to French: ", "chrf", (128, 768),
                   48, 16, 100, 200, 24, 7, PLAIN, {"the English sentence": lambda text, words: text}),
    "opus": Part("opus-mt-en-fr", "tatoeba-en-fr", "en", "fr", "", "chrf", (2000,), 125, 16, 200, 400, 60, 999, {}, {}),
}  # fmt: skip


def part_of(name: str) -> Part:
    return PARTS[name] if REAL else PARTS[name]._replace(**TOY_SIZES)


def lacking(name: str) -> str | None:
    """What keeps a part from being measured here."""
    [row] = ftlib.assets.describe([PARTS[name].model])
    if REAL and row["optional"] and not row["present"]:
        return f"{row['name']} is not in the cache: python -m ftlib data fetch {row['name']} ({row['megabytes']} MB)"
    if REAL and row["optional"] and importlib.util.find_spec("sentencepiece") is None:
        return "no package reads its tokenizer: pip install sentencepiece sacremoses"
    return None


def ways(name: str) -> dict[str, tuple[int, str]]:
    """{way: (training rows, what moves)}"""
    counts = part_of(name).counts
    found = {f"{count:,}": (count, "translator" if name == "opus" else "layers") for count in counts}
    return found | ({f"{counts[-1]:,}, LoRA": (counts[-1], "lora")} if name == "titles" else {})


def loaded(name: str, seed: int) -> Any:
    """A part's model, or a tiny random one of its kind that reads the T5's tokens."""
    if REAL:
        return ftlib.unpad(ftlib.load_model(PARTS[name].model, task="seq2seq-lm").to(choose_device()))
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    t5 = dict(d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    marian = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    marian |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, eos_token_id=1, forced_eos_token_id=None)
    kind, sizes = ("marian", marian) if name == "opus" else ("t5", t5)
    config = AutoConfig.for_model(kind, d_model=16, vocab_size=32128, decoder_start_token_id=0, **sizes)
    torch.manual_seed(seed)
    return ftlib.unpad(AutoModelForSeq2SeqLM.from_config(config))


@functools.cache  # of a process: to read one again takes seconds
def loaded_corpus(name: str) -> Any:
    return ftlib.load_corpus(name)


def rows_of(name: str, split: str, count: int, seed: int) -> list[dict[str, str]]:
    """`source` and `target` texts."""
    part = part_of(name)
    drawn = subset(loaded_corpus(part.corpus)[split], None, seed)
    short = (row for row in drawn if len(row[part.source].split()) <= part.longest)
    return [
        {"source": row[part.source], "target": row[part.target].translate(part.letters)}
        for row in itertools.islice(short, count)
    ]


def scored(part: Part, answers: list[str], rows: list[dict[str, str]]) -> dict[str, Any]:
    """The scores of all answers together, and the part's own of each."""
    wanted = [row["target"] for row in rows]
    own: Callable = {"rougeL": lambda a, b: rouge(a, b)["rougeL"], "chrf": chrf}[part.score]
    each = [round(own([a], [b]), 4) for a, b in zip(answers, wanted, strict=True)]
    whole = {"bleu": bleu(answers, wanted), "chrf": chrf(answers, wanted), **rouge(answers, wanted)}
    words = fmean(len(answer.split()) for answer in answers)
    found = {"scores": whole, "score": own(answers, wanted), "each": each, "words": words}
    if part.target != "fr":
        return found
    pairs = zip(answers, wanted, strict=True)
    others = [pair for pair in pairs if not any(address(pair[1:]).values())] or [("", "")]
    forms = {"address": address(answers), "wanted": address(wanted)}
    return found | forms | {"others": own(*map(list, zip(*others, strict=True)))}


def address(texts: Sequence[str]) -> dict[str, float]:
    """Shares of French texts that say vous (to one or to several), and tu; a text can say both."""
    return {form: fmean(bool(re.search(words, text.lower())) for text in texts) for form, words in ADDRESS.items()}


def answered(name: str, model: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    part, device = part_of(name), choose_device()
    tokenizer = tokenizer_of(name)
    sources = ftlib.tokenize(rows, tokenizer, task="seq2seq-lm", prefix=part.prefix, max_length=LIMIT)
    half = computing(device, choose_precision(device)[0])()
    model.eval()
    options = dict(max_new_tokens=part.tokens, batch_size=50, autocast=half)
    answers = ftlib.generate(model, [row["input_ids"] for row in sources], tokenizer=tokenizer, **options)
    return scored(part, answers, rows)


def tokenizer_of(name: str) -> Any:
    return ftlib.load_tokenizer(PARTS[name].model if REAL else "flan-t5-titles")


def train(name: str, way: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """The scores on a split after a training."""
    part, (count, moves) = part_of(name), ways(name)[way]
    model, tokenizer = loaded(name, seed), tokenizer_of(name)
    if moves == "lora":
        ftlib.tune(model, "lora", seed=seed)
    else:
        ftlib.tune(model, "frozen-embeddings")
        model.lm_head.weight.requires_grad = False
    options = dict(task="seq2seq-lm", prefix=part.prefix, max_length=LIMIT)
    rows = ftlib.tokenize(rows_of(name, "train", count, seed), tokenizer, **options)
    options = dict(max_steps=part.steps, batch_size=part.batch, learning_rate=rate, seed=seed, progress=False)
    run = ftlib.fit(model, rows, tokenizer=tokenizer, config=ftlib.TrainConfig(**options))
    size = part.test if split == "test" else part.validation
    last = [record["loss"] for record in run.history[-10:]]
    beside = {"seconds": run.seconds, "loss_last": fmean(last), "precision": run.precision}
    return answered(name, model, rows_of(name, split, size, 0)) | beside


def untrained(table: Any, name: str) -> None:
    """Test rows answered by the model as it comes and by what costs nothing."""
    part = part_of(name)
    rows = rows_of(name, "test", part.test, 0)
    words = round(median(len(row["target"].split()) for row in rows_of(name, "train", part.validation, 0)))
    table.row({"part": name, "way": "as it comes"}, lambda: answered(name, loaded(name, 0), rows))
    for way, answer in part.plain.items():
        answers = [answer(row["source"], words) for row in rows]
        table.row({"part": name, "way": way}, lambda answers=answers: scored(part, answers, rows))


def searched(table: Any, name: str, way: str) -> float:
    """The rate of a way."""
    part, (count, moves) = part_of(name), ways(name)[way]
    key = {"part": f"{name}, rates", "way": way, "count": count, "steps": part.steps, "seed": SEARCH_SEED}
    return table.best_rate(
        key, RATES[moves], lambda rate: train(name, way, rate, SEARCH_SEED, "validation"), lambda row: row["score"]
    )  # fmt: skip


def tested(table: Any, name: str, way: str, seed: int) -> None:
    rate, part = searched(table, name, way), part_of(name)
    key = {"part": name, "way": way, "count": ways(name)[way][0], "rate": rate, "steps": part.steps, "seed": seed}
    table.row(key, lambda: train(name, way, rate, seed, "test"))


def jobs() -> list[Job]:
    """What costs nothing, all rates, then a seed after the other; what can't be measured here is said."""
    why = {name: lacking(name) for name in PARTS}
    for name, reason in why.items():
        if reason:
            print(f"{name}: not measured, {reason}", flush=True)
    names = [name for name in PARTS if not why[name]]
    found = [Job(f"{name} untrained", (untrained, name)) for name in names]
    every = [(name, way) for name in names for way in ways(name)]
    found += [Job(f"{name} {way}", (searched, name, way)) for name, way in every]
    for seed, (name, way) in itertools.product(SEEDS, every):
        found.append(Job(f"{name} {way} {seed}", (tested, name, way, seed), f"{name} {way}"))
    return found


def main() -> None:
    table = started(globals(), ABOUT)
    side_by_side(table, jobs(), workers=2 if REAL else 0)


if __name__ == "__main__":
    main()
