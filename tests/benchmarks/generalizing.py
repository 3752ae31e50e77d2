"""Results of notebook 09: more text from the text, and what holds a model back, where all of MiniLM learns.

    python tests/benchmarks/generalizing.py    # writes results/generalizing.json; resumes; two trainings at a time

Film reviews (rotten-tomatoes).  A seed draws the labeled texts, fewer being a part of more, and is that of the new
head, of the order and of what is random in a way; all ways of a size have the same texts and make the same updates.
"nothing" is what it says: no dropout and no weight decay either.  Parts
- masked words: MiniLM with a head on masked words, taught by film reviews without labels (the training texts, then
  imdb's); the source of synonyms, kept in build/generalizing.
- test, at each of SIZES: changed copies behind the texts (COPIES of each), by deletion or swap of words as EDA does it,
  or synonyms, words that the masked model expects; mixup of what the head reads.  ftlib's own strengths.
- test, at HELD labels: REMEDIES one by one, and together, each at its weakest.  R-Drop has dropout, 0.1: it needs one.
- search: the rate of each way and size, at its middle strength, until the best is inside of what was tried; then the
  strength at that rate; both on the validation texts, with a draw of its own (SEARCH_SEED).  Deletion's rate also
  serves swap and synonyms.  Best is the least loss after a temperature, which tells rates apart more surely than the
  accuracy of 533 texts, and does not punish what a temperature repairs.
A row has accuracy, loss (nats) and expected calibration error (15 bins), the latter two also divided by the
temperature that is best on the validation texts: "cooled".  Training computes in bf16, with float32 weights.
Left out: back-translation, as no model at hand goes back from French; early stopping, which makes fewer updates.

By 100 sentences a second and core the grid takes 50 minutes of two cores, by the 50 of a busy machine 80.
"""

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from record import Job, Table, side_by_side, started, subset

import ftlib
from ftlib import augmentation
from ftlib.tasks.calibration import calibration_error, temperature
from ftlib.tasks.task import auto_class

ABOUT = "MiniLM on film reviews: augmentation at three sizes, regularizers at one"
MODEL: str | None = "minilm"  # None: a tiny random one
FOLDER = Path(__file__).parents[2] / "build" / "generalizing"
SIZES = {50: 50, 500: 100, 2000: 200}  # labels: updates of BATCH
COPIES = {50: 8, 500: 2, 2000: 1}  # changed ones of each text
HELD = 500  # labels of the remedies
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
RATES = (5e-5, 1e-4, 2e-4)
BATCH, LENGTH = 16, 64
MASK_STEPS, MASK_RATE, MORE = 300, 5e-4, "imdb"
TEST: int | None = None  # texts of validation and test: all
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
CHANGES = ("deletion", "swap", "synonyms")
AUGMENTED = ("nothing", *CHANGES, "mixup")
RATE_OF = {"swap": "deletion", "synonyms": "deletion"}
REMEDIES: dict[str, tuple[str, tuple[float, ...]]] = {  # way: (what is set, its strengths, the weakest first)
    "weight decay": ("weight_decay", (1.0, 10.0, 100.0)),
    "L1": ("l1", (0.1, 0.5, 2.0)),
    "dropout": ("dropout", (0.1, 0.3, 0.5)),
    "label smoothing": ("label_smoothing", (0.1, 0.3, 0.6)),
    "R-Drop": ("r_drop", (1.0, 4.0, 16.0)),
    "mixout": ("mixout", (0.5, 0.7, 0.9)),
}
TOY = {
    "MODEL": None, "SIZES": {4: 1, 8: 2}, "COPIES": {4: 2, 8: 1}, "HELD": 8, "SEEDS": (0,), "RATES": (1e-3,),
    "MASK_STEPS": 2, "MORE": "rotten-tomatoes", "TEST": 12,
    "REMEDIES": {way: (field, values[:2]) for way, (field, values) in REMEDIES.items()},
}  # fmt: skip


@functools.cache
def corpus(name: str) -> Any:
    return ftlib.load_corpus(name)


@functools.cache
def tokenizer() -> Any:
    return ftlib.load_tokenizer("minilm")


@functools.cache
def held_out(split: str) -> tuple[Any, np.ndarray]:
    """(tokenized texts, their labels)"""
    rows = subset(corpus("rotten-tomatoes")[split], TEST)
    return ftlib.tokenize(rows, tokenizer(), max_length=LENGTH), np.array(rows["label"])


@functools.lru_cache(maxsize=2)  # those of a search come again
def training_rows(folder: Path, way: str, count: int, seed: int) -> Any:
    rows = subset(corpus("rotten-tomatoes")["train"], count, seed)
    if way in CHANGES:
        rows = ftlib.augment(rows, change(folder, way), COPIES[count], seed=seed)
    return ftlib.tokenize(rows, tokenizer(), max_length=LENGTH)


@functools.cache
def change(folder: Path, way: str) -> Callable:
    if way == "synonyms":
        return augmentation.masked_words(ftlib.load(folder), tokenizer())
    return {"deletion": augmentation.delete_words, "swap": augmentation.swap_words}[way]


def model_for(task: str | None, seed: int = 0, **options: Any) -> Any:
    if MODEL:
        return ftlib.load_model(MODEL, task=task, seed=seed, **options)
    torch.manual_seed(seed)
    config = transformers.BertConfig(**TINY, **options)
    return auto_class(task).from_config(config) if task else transformers.BertModel(config)


def masked_model(table: Table, folder: Path) -> None:
    """Make the source of synonyms, unless the folder holds it."""

    def measure() -> dict[str, float]:
        film = corpus("rotten-tomatoes")
        texts = itertools.chain(film["train"]["text"], corpus(MORE)["train"]["text"])
        stream = ftlib.PackedText(texts, tokenizer(), LENGTH, task="masked-lm")
        rows = list(itertools.islice(stream, MASK_STEPS * BATCH))
        asked = ftlib.tokenize(subset(film["validation"], TEST), tokenizer(), task="masked-lm", max_length=LENGTH)
        model = ftlib.unpad(ftlib.masked_head(model_for(None), rows))
        before = ftlib.evaluate(model, asked)["loss"]
        seconds = fitted(model, rows, max_steps=MASK_STEPS, learning_rate=MASK_RATE)
        after = ftlib.evaluate(model, asked)
        ftlib.save(ftlib.repad(model), folder)
        return {"before": before, "loss": after["loss"], "accuracy": after["accuracy"], "seconds": seconds}

    made = None if (folder / "config.json").is_file() else measure()
    table.row({"part": "masked words", "steps": MASK_STEPS}, lambda: made or measure())


def fitted(model: Any, rows: Any, loss: Any = None, **options: Any) -> float:
    """Seconds."""
    config = ftlib.TrainConfig(batch_size=BATCH, precision="bf16", progress=False, **options)
    return ftlib.fit(model, rows, tokenizer=tokenizer(), config=config, loss=loss).seconds


def settings(way: str, strength: float | None) -> dict[str, Any]:
    """Fields of TrainConfig, and "mixout"."""
    plain: dict[str, Any] = {"dropout": 0.0, "weight_decay": 0.0}
    if way == "together":
        return plain | {field: strengths[0] for field, strengths in REMEDIES.values()}
    own = {REMEDIES[way][0]: strength} if way in REMEDIES else {}
    return plain | ({"dropout": 0.1} if way == "R-Drop" else {}) | own


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    try:
        return temperature(logits, labels)
    except ValueError:  # not better than chance, as with too small a rate: no logits at all are best
        return 1e6


def losses(logits: np.ndarray, labels: np.ndarray, divisor: float = 1.0) -> tuple[float, float]:
    """(mean cross-entropy, expected calibration error) of logits divided by a temperature."""
    log_p = F.log_softmax(torch.from_numpy(logits).double() / divisor, dim=-1)  # (texts, classes)
    return F.nll_loss(log_p, torch.from_numpy(labels)).item(), calibration_error(log_p.exp(), labels)


def trial(
    folder: Path, way: str, count: int, seed: int, split: str, strength: float | None, rate: float
) -> dict[str, float]:
    """Train, and measure on a split."""
    own, rows = settings(way, strength), training_rows(folder, way, count, seed)
    model = ftlib.unpad(model_for("sequence-classification", seed, num_labels=2))
    if p := own.pop("mixout", None):
        ftlib.tune(model, "mixout", p=p)
    with augmentation.mixup(model) if way == "mixup" else nullcontext() as loss:
        seconds = fitted(model, rows, loss, max_steps=SIZES[count], learning_rate=rate, seed=seed, **own)
    found = {name: (ftlib.predict(model, held_out(name)[0], output="logits"), held_out(name)[1])
             for name in {"validation", split}}  # fmt: skip
    divisor, (logits, labels) = best_temperature(*found["validation"]), found[split]
    names, values = ("loss", "error", "cooled_loss", "cooled_error"), losses(logits, labels)
    scores = dict(zip(names, (*values, *losses(logits, labels, divisor)), strict=True))
    right = float((logits.argmax(1) == labels).mean())
    return {"accuracy": right, **scores, "temperature": divisor, "seconds": seconds}


def searched(table: Table, folder: Path, way: str, count: int) -> tuple[float | None, float]:
    """(strength, None for a way without one; rate)."""
    way, better = RATE_OF.get(way, way), lambda row: -row["cooled_loss"]
    key = {"part": "search", "way": way, "count": count, "seed": SEARCH_SEED}
    tried = functools.partial(trial, folder, way, count, SEARCH_SEED, "validation")
    strengths: tuple = REMEDIES[way][1] if way in REMEDIES else (None,)
    middle = strengths[len(strengths) // 2]
    rate = table.best_rate(key | {"strength": middle}, RATES, functools.partial(tried, middle), better)
    rows = [table.row(key | {"strength": one, "rate": rate}, functools.partial(tried, one, rate)) for one in strengths]
    return max(rows, key=better)["strength"], rate


def tested(table: Table, folder: Path, way: str, count: int, seed: int) -> None:
    strength, rate = searched(table, folder, way, count)
    key = {"part": "test", "way": way, "count": count, "seed": seed, "strength": strength, "rate": rate}
    measure = functools.partial(trial, folder, way, count, seed, "test", strength, rate)
    table.row(key | {"steps": SIZES[count]}, measure)


def jobs(folder: Path) -> list[Job]:
    """The masked model, all searches, the largest sets first; then a draw after the other."""
    every = [(way, count) for count in sorted(SIZES, reverse=True) for way in AUGMENTED]
    every += [(way, HELD) for way in (*REMEDIES, "together")]
    found = [Job("masked words", (masked_model, folder))]
    for way, count in every:
        if way not in RATE_OF:
            after = "masked words" if way in RATE_OF.values() else None  # of which synonyms takes the rate
            found.append(Job(f"{way} {count}", (searched, folder, way, count), after))
    for seed, (way, count) in itertools.product(SEEDS, every):
        call = (tested, folder, way, count, seed)
        found.append(Job(f"{way} {count} {seed}", call, f"{RATE_OF.get(way, way)} {count}"))
    return found


def main() -> None:
    table = started(globals(), ABOUT)
    folder = FOLDER if MODEL else table.path.parent / "masked"
    side_by_side(table, jobs(folder), workers=2 if MODEL else 0)


if __name__ == "__main__":
    main()
