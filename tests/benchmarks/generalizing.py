"""Results of notebook 09: more text from the text, and what holds a model back, where all of MiniLM learns.

    python tests/benchmarks/generalizing.py    # writes results/generalizing.json; resumes; two trainings at a time

Film reviews (rotten-tomatoes).  A seed draws the labeled texts, fewer being a part of more, and is that of the new
head, of the order and of what is random in a way; all ways of a size have the same texts and make the same updates.
"nothing" is what it says: no dropout and no weight decay either.  Parts
- masked words: MiniLM with a head on them, taught by film reviews without labels (the training texts, then imdb's),
  is the source of synonyms; kept in build/generalizing.
- test, at each of SIZES: changed copies behind the texts (COPIES of each), by deletion or swap of words as EDA does it,
  or synonyms, words that the masked model expects; mixup of what the head reads.  ftlib's own strengths.
- test, at HELD labels: REMEDIES one by one, and together, each at its weakest.  R-Drop has dropout, 0.1: it needs one.
- search: the rate of each way and size at its middle strength, until the best is inside of what was tried, then the
  strength at that rate, on validation texts with a draw of its own (SEARCH_SEED).  Swap and synonyms take deletion's
  rate, together R-Drop's.  Best is the least loss after a temperature: it tells rates apart more surely than the
  accuracy of 533 texts, and leaves alone what a temperature repairs.
A row has accuracy, loss (nats) and expected calibration error (15 bins), the latter two also divided by the
temperature that is best on the validation texts: "cooled".  All computes in bf16, with float32 weights.
Left out: back-translation, as no model at hand goes back from French; early stopping, which makes fewer updates.
On two cores the grid takes 45 minutes by 100 sentences a second each, 65 by the 0.3 s of an update on a busy machine.
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
SIZES = {50: (40, 16), 500: (100, 16), 2000: (130, 32)}  # labels: (updates, texts of each): all copies come up
COPIES = {50: 8, 500: 2, 2000: 1}  # changed ones of each text
HELD = 500  # labels of the remedies
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
RATES = (5e-5, 1e-4, 2e-4)
LENGTH, MORE, MASK_STEPS, MASK_BATCH, MASK_RATE = 64, "imdb", 300, 16, 5e-4
TEST: int | None = None  # texts of validation and test: all
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
CHANGES = ("deletion", "swap", "synonyms")
AUGMENTED = ("nothing", *CHANGES, "mixup")
RATE_OF = {"swap": "deletion", "synonyms": "deletion", "together": "R-Drop"}
REMEDIES: dict[str, tuple[str, tuple[float, ...]]] = {  # way: (what is set, its strengths, the weakest first)
    "weight decay": ("weight_decay", (1.0, 10.0, 100.0)),
    "L1": ("l1", (0.1, 0.5, 2.0)),
    "dropout": ("dropout", (0.1, 0.3, 0.5)),
    "label smoothing": ("label_smoothing", (0.1, 0.3, 0.6)),
    "R-Drop": ("r_drop", (1.0, 4.0, 16.0)),
    "mixout": ("mixout", (0.5, 0.7, 0.9)),
}
TOY = {
    "MODEL": None, "SIZES": {4: (1, 4), 8: (2, 4)}, "COPIES": {4: 2, 8: 1}, "HELD": 8, "SEEDS": (0,), "RATES": (1e-3,),
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
        rows = list(itertools.islice(stream, MASK_STEPS * MASK_BATCH))
        asked = ftlib.tokenize(subset(film["validation"], TEST), tokenizer(), task="masked-lm", max_length=LENGTH)
        model = ftlib.unpad(ftlib.masked_head(model_for(None), rows))
        before = ftlib.evaluate(model, asked)["loss"]
        seconds = fitted(model, rows, max_steps=MASK_STEPS, batch_size=MASK_BATCH, learning_rate=MASK_RATE)
        after = ftlib.evaluate(model, asked)
        ftlib.save(ftlib.repad(model), folder)
        return {"before": before, "loss": after["loss"], "accuracy": after["accuracy"], "seconds": seconds}

    made = None if (folder / "config.json").is_file() else measure()
    table.row({"part": "masked words", "steps": MASK_STEPS}, lambda: made or measure())


def fitted(model: Any, rows: Any, loss: Any = None, **options: Any) -> float:
    """Seconds."""
    config = ftlib.TrainConfig(precision="bf16", progress=False, **options)
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
    own, rows, (steps, batch) = settings(way, strength), training_rows(folder, way, count, seed), SIZES[count]
    model = ftlib.unpad(model_for("sequence-classification", seed, num_labels=2))
    if p := own.pop("mixout", None):
        ftlib.tune(model, "mixout", p=p)
    with augmentation.mixup(model) if way == "mixup" else nullcontext() as loss:
        own |= dict(max_steps=steps, batch_size=batch, learning_rate=rate, seed=seed)
        seconds = fitted(model, rows, loss, **own)
    asked = {name: held_out(name) for name in ("validation", split)}
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        found = {name: (ftlib.predict(model, rows, output="logits"), labels) for name, (rows, labels) in asked.items()}
    divisor, (logits, labels) = best_temperature(*found["validation"]), found[split]
    names, values = ("loss", "error", "cooled_loss", "cooled_error"), losses(logits, labels)
    scores = dict(zip(names, (*values, *losses(logits, labels, divisor)), strict=True)) | {"temperature": divisor}
    return {"accuracy": float((logits.argmax(1) == labels).mean()), **scores, "seconds": seconds}


def searched(table: Table, folder: Path, way: str, count: int) -> tuple[float | None, float]:
    """(strength, None for a way without one; rate)."""
    if way in RATE_OF:
        return None, searched(table, folder, RATE_OF[way], count)[1]
    better: Callable = lambda row: -row["cooled_loss"]  # noqa: E731
    key = {"part": "search", "way": way, "count": count, "seed": SEARCH_SEED}
    tried = functools.partial(trial, folder, way, count, SEARCH_SEED, "validation")
    _, strengths = REMEDIES.get(way, ("", (None,)))
    middle = strengths[len(strengths) // 2]
    rate = table.best_rate(key | {"strength": middle}, RATES, functools.partial(tried, middle), better)
    rows = [table.row(key | {"strength": one, "rate": rate}, functools.partial(tried, one, rate)) for one in strengths]
    return max(rows, key=better)["strength"], rate


def tested(table: Table, folder: Path, way: str, count: int, seed: int) -> None:
    strength, rate = searched(table, folder, way, count)
    key = {"part": "test", "way": way, "count": count, "seed": seed, "strength": strength, "rate": rate}
    measure = functools.partial(trial, folder, way, count, seed, "test", strength, rate)
    table.row(key | dict(zip(("steps", "batch"), SIZES[count], strict=True)), measure)


def jobs(folder: Path) -> list[Job]:
    """The masked model, all searches, the largest sets first; then a draw after the other."""
    every = [(way, count) for count in sorted(SIZES, reverse=True) for way in AUGMENTED]
    every += [(way, HELD) for way in (*REMEDIES, "together")]
    found = [Job("masked words", (masked_model, folder))]
    for way, count in every:
        if way not in RATE_OF:
            after = "masked words" if way == RATE_OF["synonyms"] else None
            found.append(Job(f"{way} {count}", (searched, folder, way, count), after))
    for seed, (way, n) in itertools.product(SEEDS, every):
        found.append(Job(f"{way} {n} {seed}", (tested, folder, way, n, seed), f"{RATE_OF.get(way, way)} {n}"))
    return found


def main() -> None:
    table = started(globals(), ABOUT)
    folder = FOLDER if MODEL else table.path.parent / "masked"
    side_by_side(table, jobs(folder), workers=2 if MODEL else 0)


if __name__ == "__main__":
    main()
