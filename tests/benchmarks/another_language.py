"""Results of notebook 06b: does counting characters beat a fine-tuned ALBERT whose settings are searched, over draws?

    python tests/benchmarks/another_language.py    # writes results/another_language.json; resumes

A seed draws ROWS reviews of Ctrip, as the notebook does; all ways learn from the same.  ALBERT-tiny reads them in
Traditional characters, the first 62 tokens, or 254 (a review has 84 characters, by the median).  Counting is TF-IDF of
characters and pairs under logistic regression, on as many characters, or all.  Rate and epochs, or C, are those of the
best validation accuracy with a draw of its own.  Accuracy is of all test reviews.  20 to 30 minutes of two cores.
"""

import functools

import numpy as np
import transformers
from record import Job, Table, side_by_side, started
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import ftlib

REAL, ROWS, ASKED, SEEDS, SEARCH_SEED = True, 640, None, (0, 1, 2, 3, 4), 100  # not toys; reviews; asked: all
EPOCHS, RATES, STRENGTHS = (4, 8), (1e-4, 2e-4, 4e-4), (1.0, 3.0, 10.0, 30.0, 100.0)
MOST = {"first 62": 62, "first 254": 254, "whole": None}  # characters
WAYS = ("ALBERT, first 62", "ALBERT, first 254", *(f"counting, {read}" for read in MOST))
TINY = dict(vocab_size=21128, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=32)
TOY = {"REAL": False, "ROWS": 24, "ASKED": 16, "SEEDS": (0,), "EPOCHS": (1, 2), "RATES": (1e-3,)}


@functools.cache
def reviews(script: str = "as they come") -> dict[str, tuple[list[str], np.ndarray]]:
    """{split: (reviews, labels)}"""
    lines = (ftlib.assets.path("opencc") / "STCharacters.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if line and not line.startswith("#")]
    first = {ord(a): b.split(" ")[0] for a, b in pairs} if script == "Traditional" else {}
    data = ftlib.load_corpus("ctrip-zh")
    data = {split: rows[: len(rows) if split == "train" else ASKED] for split, rows in data.items()}
    return {split: ([t.translate(first) for t in own["text"]], np.array(own["label"])) for split, own in data.items()}


def drawn(seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(len(reviews()["train"][1]))[:ROWS].tolist()


def counted(most: int | None, seed: int, split: str, strength: float) -> dict[str, float]:
    (texts, labels), (asked, answers), own = reviews()["train"], reviews()[split], drawn(seed)
    table = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(table, LogisticRegression(C=strength, max_iter=1000))
    model.fit([texts[i][:most] for i in own], labels[own])
    return {"accuracy": model.score([text[:most] for text in asked], answers)}


def tuned(most: int, seed: int, split: str, epochs: int, rate: float) -> dict[str, float]:
    words, (texts, labels) = ftlib.load_tokenizer("albert-tiny-zh"), reviews("Traditional")["train"]
    kind = dict(task="sequence-classification", num_labels=2, seed=seed)
    tiny = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**TINY))
    model = ftlib.unpad(ftlib.load_model("albert-tiny-zh", **kind) if REAL else tiny)
    rows = {"text": [texts[i] for i in drawn(seed)], "label": labels[drawn(seed)].tolist()}
    config = ftlib.TrainConfig(epochs=epochs, batch_size=16, learning_rate=rate, seed=seed, progress=False)
    run = ftlib.fit(model, ftlib.tokenize(rows, words, max_length=most + 2), tokenizer=words, config=config)
    asked, answers = reviews("Traditional")[split]
    right = ftlib.predict(model, asked, tokenizer=words, max_length=most + 2) == answers
    return {"accuracy": float(right.mean()), "seconds": run.seconds}


def measured(table: Table, way: str, seed: int | None = None) -> None:
    """Search a way's settings, and with a seed test it."""
    key = {"part": "search", "way": way, "seed": SEARCH_SEED}
    train = functools.partial(tuned if "ALBERT" in way else counted, MOST[way.split(", ")[1]])
    for epochs in EPOCHS if "ALBERT" in way else ():
        own = functools.partial(train, SEARCH_SEED, "validation", epochs)
        table.best_rate(key | {"epochs": epochs}, RATES, own, lambda row: row["accuracy"])
    for c in STRENGTHS if "counting" in way else ():
        table.row(key | {"C": c}, functools.partial(train, SEARCH_SEED, "validation", c))
    best = max((row for row in table.content["rows"] if key.items() <= row.items()), key=lambda row: row["accuracy"])
    if seed is not None:
        chosen = {name: best[name] for name in ("epochs", "rate", "C") if name in best}
        table.row(key | {"part": "test", "seed": seed} | chosen, lambda: train(seed, "test", *chosen.values()))


def main() -> None:
    table = started(globals(), "Chinese hotel reviews: counting, and ALBERT-tiny")
    every = [(way, seed) for seed in (None, *SEEDS) for way in WAYS]
    jobs = [Job(f"{way} {seed}", (measured, way, seed), None if seed is None else f"{way} None") for way, seed in every]
    side_by_side(table, jobs, workers=2 if REAL else 0)


if __name__ == "__main__":
    main()
