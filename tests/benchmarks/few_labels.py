"""Results of notebook 11: accuracy against labels a class, 2 to 64, by what is done with them; the time beside it.

    python tests/benchmarks/few_labels.py    # writes results/few_labels.json; resumes; two trainings at a time

Every method starts from the same pretrained MiniLM, and of a draw all have the same labelled texts, each set a part of
the larger ones.  Accuracies are on up to 1,000 rows of the corpora's own test splits.  Methods:
- zero-shot: no label; the class whose name, in words, has the nearest vector by cosine.
- prototypes: the class whose labelled texts have the nearest mean vector.
- probe: logistic regression (C = 1) on the vectors as they are.
- fine-tuning: encoder and a new head, UPDATES of 16 texts.
- contrastive: SetFit's recipe: pairs of the same and of different classes, ITERATIONS of both a text, one pass over
  them by the cosine loss, at most PAIR_UPDATES of 16 pairs; then the probe on the new vectors.
Fine-tuning and contrastive have a learning rate for each corpus, searched with a draw of its own (SEARCH_SEED), of
SEARCHED labels a class, by accuracy on the validation split: more labels than few, which the others do not need.
Intents are the first ten of banking77.  Training computes in bf16, with float32 weights; seconds are those of training,
and in the row of part "vectors" of all the corpus's vectors, of which prototypes and the probe need the labelled ones.
"""

import functools
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from record import Job, Table, side_by_side, started, subset

import ftlib
from ftlib.methods.fewshot import contrastive_pairs, prototype_logits, prototypes
from ftlib.tasks.task import auto_class

ABOUT = "MiniLM, accuracy against labels a class"
MODEL: str | None = "minilm"  # or a folder with its weights; None: a tiny random one
CORPORA = ("rotten-tomatoes", "banking77", "clinc150")  # what data/sources.toml has of these
INTENTS = 10  # the first of banking77's 77, and of clinc150's
NAMES = {"rotten-tomatoes": ("a bad film", "a good film")}  # of the others the labels' own, without underscores
SHOTS, SEEDS, SEARCH_SEED, SEARCHED = (2, 4, 8, 16, 32, 64), (0, 1, 2, 3, 4), 100, 8
TRAINED, FIXED = ("fine-tuning", "contrastive"), ("prototypes", "probe")
RATES = {"fine-tuning": (1e-4, 2e-4, 4e-4), "contrastive": (1e-5, 2e-5, 4e-5)}
UPDATES, PAIR_UPDATES, ITERATIONS, BATCH = 120, 250, 20, 16
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TEST: int | None = 1000  # rows of the other splits; None: all
TOY = {
    "SHOTS": (2,), "SEEDS": (0,), "SEARCHED": 2, "RATES": dict.fromkeys(RATES, (1e-4,)), "UPDATES": 2,
    "PAIR_UPDATES": 2, "TEST": 8, "MODEL": None,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the data


@functools.cache
def corpus_of(name: str) -> tuple[dict[str, tuple[list[str], np.ndarray]], list[str]]:
    """({split: (texts, labels)}, what each class is called in words)."""
    data = ftlib.load_corpus(name)
    names = data["train"].features["label"].names
    kept = len(names) if name in NAMES else min(INTENTS, len(names))
    found = {}
    for split, rows in data.items():
        rows = rows.filter(lambda label: label < kept, input_columns="label")
        rows = rows if split == "train" else subset(rows, TEST)
        found[split] = list(rows["text"]), np.array(rows["label"])
    return found, [*NAMES.get(name, [one.replace("_", " ") for one in names[:kept]])]


def drawn(corpus: str, shots: int, seed: int) -> list[int]:
    """`shots` rows of every class, the first of an order that the seed gives, so that fewer are a part of more."""
    labels = corpus_of(corpus)[0]["train"][1]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    each = [order[labels[order] == label][:shots] for label in np.unique(labels)]
    return [int(row) for rows in zip(*each, strict=True) for row in rows]


@functools.cache
def tokenizer() -> Any:
    return ftlib.load_tokenizer("minilm")


def model_for(task: str, seed: int = 0, **options: Any) -> Any:
    if MODEL:
        return ftlib.unpad(ftlib.load_model(MODEL, task=task, seed=seed, **options))
    torch.manual_seed(seed)
    return auto_class(task).from_config(transformers.BertConfig(**TINY, **options))


def vectors(model: Any, texts: list[str]) -> np.ndarray:
    return ftlib.predict(model, texts, tokenizer=tokenizer(), max_length=64)


@functools.cache
def as_it_is(corpus: str) -> dict[str, np.ndarray]:
    """{split: vectors of its texts} by the pretrained model."""
    model = model_for("sentence-embedding")
    return {split: vectors(model, texts) for split, (texts, _) in corpus_of(corpus)[0].items()}


# -------------------------------------------------------------------------------------------------- the methods


def trained(model: Any, rows: Any, rate: float, seed: int, steps: int) -> float:
    """Seconds."""
    how = dict(batch_size=BATCH, max_steps=steps, learning_rate=rate, seed=seed, precision="bf16", progress=False)
    return ftlib.fit(model, rows, tokenizer=tokenizer(), config=ftlib.TrainConfig(**how)).seconds


def probed(known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(known, labels).predict(asked)


def zero_shot(corpus: str, split: str) -> np.ndarray:
    called = vectors(model_for("sentence-embedding"), corpus_of(corpus)[1])
    return (as_it_is(corpus)[split] @ called.T).argmax(1)


def by_prototypes(corpus: str, rows: list[int], split: str) -> np.ndarray:
    found, labels = as_it_is(corpus), torch.from_numpy(corpus_of(corpus)[0]["train"][1][rows])
    means = prototypes(torch.from_numpy(found["train"][rows]), labels)
    return prototype_logits(torch.from_numpy(found[split]), means).argmax(1).numpy()


def by_probe(corpus: str, rows: list[int], split: str) -> np.ndarray:
    found = as_it_is(corpus)
    return probed(found["train"][rows], corpus_of(corpus)[0]["train"][1][rows], found[split])


def fine_tuned(corpus: str, rows: list[int], split: str, rate: float, seed: int) -> tuple[np.ndarray, float]:
    """The predictions, and the seconds of training."""
    splits, names = corpus_of(corpus)
    texts, labels = splits["train"]
    table = {"text": [texts[row] for row in rows], "label": labels[rows].tolist()}
    model = model_for("sequence-classification", seed, num_labels=len(names))
    seconds = trained(model, ftlib.tokenize(table, tokenizer(), max_length=64), rate, seed, UPDATES)
    return ftlib.predict(model, splits[split][0], tokenizer=tokenizer(), max_length=64), seconds


def contrasted(corpus: str, rows: list[int], split: str, rate: float, seed: int) -> tuple[np.ndarray, float]:
    splits, _ = corpus_of(corpus)
    texts, labels = splits["train"]
    pairs, scores = contrastive_pairs(labels[rows], iterations=ITERATIONS, seed=seed)
    own = [texts[row] for row in rows]
    first, second = ([own[place] for place in side] for side in pairs.T)
    table = {"text": first, "text_pair": second, "label": scores.tolist()}
    table = ftlib.tokenize(table, tokenizer(), max_length=64, task="sentence-embedding")
    model = model_for("sentence-embedding")
    seconds = trained(model, table, rate, seed, min(PAIR_UPDATES, -(-len(pairs) // BATCH)))
    return probed(vectors(model, own), labels[rows], vectors(model, splits[split][0])), seconds


def accuracy(corpus: str, split: str, predicted: np.ndarray) -> float:
    return float((predicted == corpus_of(corpus)[0][split][1]).mean())


# ------------------------------------------------------------------------------------------------------ the grid


def trial(corpus: str, method: str, shots: int, seed: int, split: str, rate: float) -> dict[str, float]:
    train = {"fine-tuning": fine_tuned, "contrastive": contrasted}[method]
    predicted, seconds = train(corpus, drawn(corpus, shots, seed), split, rate, seed)
    return {"accuracy": accuracy(corpus, split, predicted), "seconds": seconds}


def searched(table: Table, corpus: str, method: str) -> float:
    """The rate of a method on a corpus."""
    key = {"part": "rates", "corpus": corpus, "method": method, "shots": SEARCHED, "seed": SEARCH_SEED}
    try_rate = functools.partial(trial, corpus, method, SEARCHED, SEARCH_SEED, "validation")
    best = lambda row: (row["accuracy"], row["rate"])  # noqa: E731  # of equal ones the largest: below all are alike
    return table.best_rate(key, RATES[method], try_rate, best)


def tested(table: Table, corpus: str, method: str, shots: int, seed: int) -> None:
    rate = searched(table, corpus, method)
    key = {"part": "accuracy", "corpus": corpus, "method": method, "shots": shots, "seed": seed, "rate": rate}
    table.row(key, lambda: trial(corpus, method, shots, seed, "test", rate))


def without_training(table: Table, corpus: str) -> None:
    begin = time.perf_counter()
    count = sum(map(len, as_it_is(corpus).values()))
    key = {"part": "accuracy", "corpus": corpus}
    table.row({"part": "vectors", "corpus": corpus}, lambda: {"texts": count, "seconds": time.perf_counter() - begin})
    none = key | {"method": "zero-shot", "shots": 0, "seed": 0}
    names = corpus_of(corpus)[1]
    table.row(none, lambda: {"accuracy": accuracy(corpus, "test", zero_shot(corpus, "test")), "names": names})
    functions = dict(zip(FIXED, (by_prototypes, by_probe), strict=True))
    for shots, seed, method in itertools.product(SHOTS, SEEDS, FIXED):
        predicted = functools.partial(functions[method], corpus, drawn(corpus, shots, seed), "test")
        own = key | {"method": method, "shots": shots, "seed": seed}
        table.row(own, lambda predicted=predicted: {"accuracy": accuracy(corpus, "test", predicted())})


def jobs() -> list[Job]:
    """What needs no training, the rates, then a draw after the other, of each the largest set first."""
    known = [name for name in CORPORA if name in ftlib.assets.manifest()]
    found = [Job(corpus, (without_training, corpus)) for corpus in known]
    found += [Job(f"{c} {m}", (searched, c, m)) for c, m in itertools.product(known, TRAINED)]
    for seed, shots, corpus, method in itertools.product(SEEDS, SHOTS[::-1], known, TRAINED):
        call = (tested, corpus, method, shots, seed)
        found.append(Job(f"{corpus} {method} {shots} {seed}", call, f"{corpus} {method}"))
    return found


def table(folder: Path) -> Table:
    return Table("few_labels", "python tests/benchmarks/few_labels.py", ABOUT, folder=folder)


def main() -> None:
    side_by_side(started(globals(), ABOUT), jobs(), workers=0 if MODEL is None else 2)


if __name__ == "__main__":
    main()
