"""Results of notebook 06: heads on masked words, going on with pretraining and what it gives a task, spans on T5.

    python tests/benchmarks/pretraining.py    # writes results/pretraining.json; resumes; two trainings at a time

A rate is searched for each part and way, with a seed of its own (SEARCH_SEED) on validation rows, until the best is
inside of what was tried; results are of test rows, the same for all, with the same masks.  The seed draws training
rows, order, masks, dropout, and what is new in a model.  Masked rows have LENGTH tokens, a step BATCH of them.
- heads: a new head on MiniLM, from "counts" (`ftlib.masked_head`) or at "random", on WikiText-2: the masked loss before
  and after.
- start: MiniLM with a head from counts after START steps on both texts in equal parts, so that the head is no longer
  young.  It is kept in build/pretraining.
- going on: from that start on abstracts of PubMed (without those of BC5CDR), or, as the control, on WikiText-2 for as
  many steps at PubMed's rate: the text alone differs.  Masked losses on both.
- films, names: the encoder of each, and MiniLM as it comes, fine-tuned with the same seed: accuracy on rotten-tomatoes;
  F1 of chemicals and diseases in abstracts of BC5CDR.
- spans: flan-t5-titles, embeddings and output layer fixed, on paragraphs of WikiText-2 with spans left out.
How decoders from nothing scale is measured by scaling.py.
On two cores the grid takes 30 minutes, on a busy machine 50 (0.7 s a step of masked words, 0.3 s one of films).
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
from record import Job, Table, side_by_side, started, subset

import ftlib
from ftlib.tasks.task import auto_class

ABOUT = "MiniLM's masked words on PubMed against WikiText-2, and its tasks after that; new heads; spans on T5"
REAL = True  # pretrained models, not tiny random ones
FOLDER = Path(__file__).parents[2] / "build" / "pretraining"
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
TEXTS = {"PubMed": ("pubmed-titles", "abstract"), "WikiText-2": ("wikitext-2", "text")}
LENGTH, BATCH, POOL, ASKED = 64, 16, 6400, 200  # tokens; rows a step, to draw from, of the other splits
START = 80
PARTS = {  # part: (steps, rates)
    "heads": (60, (2.5e-4, 5e-4, 1e-3)), "going on": (200, (2.5e-4, 5e-4, 1e-3)), "films": (100, (5e-5, 1e-4, 2e-4)),
    "names": (64, (1.5e-4, 3e-4, 6e-4)), "spans": (16, (3e-4, 1e-3, 3e-3)),
}  # fmt: skip
TASKS = {  # part: (corpus, kind, columns, score, rows to train on, rows a step, most tokens, rows asked)
    "films": ("rotten-tomatoes", "sequence-classification", ("text", "label"), "accuracy", 500, 16, 64, None),
    "names": ("bc5cdr", "token-classification", ("tokens", "tags"), "f1", 64, 4, 512, 100),
}
WAYS = {  # job: its parts
    "counts": ("heads",), "random": ("heads",), "PubMed": ("going on", "films", "names"),
    "WikiText-2": ("going on", "films", "names"), "MiniLM": ("films", "names"), "T5": ("spans",),
}  # fmt: skip
SPANS, SPAN_BATCH = 60, 8  # test paragraphs; paragraphs a step
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TINY_T5 = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
TOY = {
    "REAL": False, "SEEDS": (0,), "BATCH": 2, "POOL": 12, "ASKED": 3, "START": 2, "SPANS": 2, "SPAN_BATCH": 2,
    "PARTS": dict.fromkeys(PARTS, (2, (1e-3,))),
    "TASKS": {task: (*own[:4], 4, 2, own[6], 4) for task, own in TASKS.items()},
}  # fmt: skip


@functools.cache
def corpus(name: str) -> Any:
    return ftlib.load_corpus(name)


@functools.cache
def tokenizer(name: str = "minilm") -> Any:
    return ftlib.load_tokenizer(name)


@functools.cache
def masked_rows(text: str, split: str) -> list[dict]:
    name, column = TEXTS[text]
    tagged = corpus("bc5cdr") if text == "PubMed" else {}
    known = {own[-60:] for rows in tagged.values() for own in rows["text"]}
    texts = (own for own in corpus(name)[split][column] if own[-60:] not in known)
    stream = ftlib.PackedText(texts, tokenizer(), LENGTH, task="masked-lm")
    return list(itertools.islice(stream, POOL if split == "train" else ASKED))


@functools.cache
def span_rows(split: str) -> list[dict]:
    """Paragraphs of 61 to 89 words with spans left out, always the same ones."""
    words, place = tokenizer("flan-t5-titles"), ("train", "validation", "test").index(split)
    lines = [line.replace(" @-@ ", "-") for text in corpus("wikitext-2")[split]["text"] for line in text.split("\n")]
    lines = [line for line in lines if 60 < len(line.split()) < 90][: SPANS if place else 8 * SPANS]
    ids = words(lines, add_special_tokens=False)["input_ids"]
    return [ftlib.corrupt_spans(own, words, key=[0, place, i]) for i, own in enumerate(ids)]


def model_for(kind: str | None, seed: int = 0, names: list[str] | None = None) -> Any:
    """MiniLM, with a head for a kind of task; or T5."""
    both = kind == "seq2seq-lm"
    if REAL:
        return ftlib.load_model("flan-t5-titles" if both else "minilm", task=kind, seed=seed, label_names=names)
    torch.manual_seed(seed)
    if both:
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**TINY_T5))
    config = transformers.BertConfig(**TINY, num_labels=len(names or "ab"))
    return auto_class(kind).from_config(config) if kind else transformers.BertModel(config)


def fitted(model: Any, rows: Any, steps: int, rate: float, seed: int, words: Any = None, **options: Any) -> float:
    """Seconds."""
    how = dict(max_steps=steps, learning_rate=rate, seed=seed, progress=False, batch_size=BATCH, precision="bf16")
    return ftlib.fit(model, rows, tokenizer=words or tokenizer(), config=ftlib.TrainConfig(**how | options)).seconds


def headed(way: str, seed: int, split: str, rate: float) -> dict[str, float]:
    steps, encoder = PARTS["heads"][0], model_for(None)
    rows, asked = subset(masked_rows("WikiText-2", "train"), steps * BATCH, seed), masked_rows("WikiText-2", split)
    if way == "counts":
        model = ftlib.masked_head(encoder, rows)
    else:
        torch.manual_seed(seed)
        model = transformers.BertForMaskedLM(encoder.config)
        model.bert.load_state_dict(encoder.state_dict(), strict=False)  # which has a pooler
    before = ftlib.evaluate(ftlib.unpad(model), asked)["loss"]
    seconds, after = fitted(model, rows, steps, rate, seed), ftlib.evaluate(model, asked)
    return {"before": before, "loss": after["loss"], "accuracy": after["accuracy"], "seconds": seconds}


def losses(model: Any, split: str) -> dict[str, float]:
    """The masked loss on each text."""
    return {text: ftlib.evaluate(model, masked_rows(text, split))["loss"] for text in TEXTS}


def begin(table: Table, folder: Path) -> None:
    """Make the common start, unless the folder holds it."""

    def measure() -> dict[str, float]:
        rows = [row for text in TEXTS for row in subset(masked_rows(text, "train"), START * BATCH // 2, SEARCH_SEED)]
        model = ftlib.unpad(ftlib.masked_head(model_for(None), rows))
        fitted(model, rows, START, searched(table, folder, "heads", "counts"), SEARCH_SEED)
        found = losses(model, "test")
        ftlib.save(ftlib.repad(model), folder)
        return found

    made = None if (folder / "config.json").is_file() else measure()
    table.row({"part": "start", "steps": START}, lambda: made or measure())


@functools.lru_cache(maxsize=1)  # several tasks of a way and seed follow each other
def gone_on(folder: Path, text: str, seed: int, rate: float) -> tuple[dict, dict[str, float]]:
    """(the encoder's weights, masked losses)"""
    steps, model = PARTS["going on"][0], ftlib.unpad(ftlib.load(folder))
    seconds = fitted(model, subset(masked_rows(text, "train"), steps * BATCH, seed), steps, rate, seed)
    found = losses(model, "validation" if seed == SEARCH_SEED else "test")
    return model.bert.state_dict(), found | {"loss": found[text], "seconds": seconds}


def downstream(task: str, weights: dict | None, seed: int, split: str, rate: float) -> dict[str, float]:
    name, kind, (text, label), score, count, batch, longest, most = TASKS[task]
    data, columns = corpus(name), dict(text=text, label=label, task=kind, max_length=longest)
    feature = data["train"].features[label]
    model = model_for(kind, seed, getattr(feature, "feature", feature).names)
    if weights:
        missing, odd = model.bert.load_state_dict(weights, strict=False)
        assert not odd and all("pooler" in one for one in missing), "not all of the encoder went over"
    known = ftlib.tokenize(subset(data["train"], count, seed), tokenizer(), **columns)
    asked = ftlib.tokenize(subset(data[split], most), tokenizer(), **columns)
    seconds = fitted(ftlib.unpad(model), known, PARTS[task][0], rate, seed, batch_size=batch)
    return {"score": ftlib.evaluate(model, asked)[score], "seconds": seconds}


def spanned(seed: int, split: str, rate: float) -> dict[str, float]:
    model, steps = ftlib.unpad(model_for("seq2seq-lm")), PARTS["spans"][0]
    ftlib.tune(model, "frozen-embeddings")
    model.lm_head.weight.requires_grad = False
    before, rows = ftlib.evaluate(model, span_rows(split))["loss"], subset(span_rows("train"), steps * SPAN_BATCH, seed)
    options = dict(batch_size=SPAN_BATCH, precision="auto")
    seconds = fitted(model, rows, steps, rate, seed, tokenizer("flan-t5-titles"), **options)
    return {"before": before, "loss": ftlib.evaluate(model, span_rows(split))["loss"], "seconds": seconds}


def measured(table: Table, folder: Path, part: str, way: str, seed: int, split: str, rate: float) -> dict[str, float]:
    if part == "heads":
        return headed(way, seed, split, rate)
    if part == "spans":
        return spanned(seed, split, rate)
    if part == "going on":
        return gone_on(folder, way, seed, rate)[1]
    weights = gone_on(folder, way, seed, searched(table, folder, "going on", way))[0] if way in TEXTS else None
    return downstream(part, weights, seed, split, rate)


def searched(table: Table, folder: Path, part: str, way: str) -> float:
    """The rate; PubMed's for the control too."""
    way, (steps, rates) = "PubMed" if part == "going on" else way, PARTS[part]
    key = {"part": f"{part}, rates", "way": way, "steps": steps, "seed": SEARCH_SEED}
    measure = functools.partial(measured, table, folder, part, way, SEARCH_SEED, "validation")
    return table.best_rate(key, rates, measure, lambda row: row["score"] if part in TASKS else -row["loss"])


def work(table: Table, folder: Path, way: str, seed: int | None = None) -> None:
    """The rates of a way, and of a seed the results."""
    for part in WAYS[way]:
        rate = searched(table, folder, part, way)
        key = {"part": part, "way": way, "seed": seed, "rate": rate, "steps": PARTS[part][0]}
        if seed is not None:
            table.row(key, functools.partial(measured, table, folder, part, way, seed, "test", rate))


def jobs(folder: Path) -> list[Job]:
    """Rates, what others wait for first; then a seed after the other."""
    after = {"PubMed": "start", "WikiText-2": "PubMed"}
    found = [Job(way, (work, folder, way), after.get(way)) for way in WAYS]
    found.insert(1, Job("start", (begin, folder), "counts"))
    return found + [Job(f"{w} {seed}", (work, folder, w, seed), w) for seed, w in itertools.product(SEEDS, WAYS)]


def main() -> None:
    table = started(globals(), ABOUT)
    folder = FOLDER if REAL else table.path.parent / "start"
    side_by_side(table, jobs(folder), workers=2 if REAL else 0)


if __name__ == "__main__":
    main()
