"""Results of notebook 11: accuracy against labels a class, 2 to 64, by what is done with them; the time beside it.

    python tests/benchmarks/few_labels.py    # writes results/few_labels.json; resumes; two trainings at a time

Every method starts from the same pretrained MiniLM, and of a draw all have the same labeled texts, each set a part of
the larger ones.  Accuracies are on up to 1,000 rows of the corpora's own test splits.  Methods:
- zero-shot: no label; the class whose name, in words, has the nearest vector by cosine.
- prototypes: the class whose labeled texts have the nearest mean vector.
- probe: logistic regression (C = 1) on the vectors as they are.
- fine-tuning: encoder and a new head, UPDATES of 16 texts.
- contrastive: SetFit's recipe: pairs of the same and of different classes, ITERATIONS of both a text, one pass over
  them by the cosine loss, at most PAIR_UPDATES of 16 pairs; then the probe on the new vectors.
- prompting: SmolLM2 reads the labeled texts as "Review: …, Sentiment: positive", then one more; the likelier of two
  words.  "calibrated": their log-odds for the text "N/A" are taken off first (Zhao et al. 2021, arXiv:2102.09690).
Fine-tuning and contrastive have a learning rate for each corpus, searched with a draw of its own (SEARCH_SEED), of
SEARCHED labels a class, by accuracy on the validation split, and keep it with fewer: of a handful of labels there is
nothing to search with, and searched with 8 it was drawn by chance.
Intents are the first ten of banking77.  Training computes in bf16, with float32 weights; seconds are those of training,
and in the row of part "vectors" of all the corpus's vectors, of which prototypes and the probe need the labeled ones.

Part "active": which of POOL texts to label next, LABELS of them in turn; a probe on the vectors learns from them.
Part "new intents": clinc150's 150 intents in three, to learn from, to search settings, and new ones, drawn by the seed.
Accuracy over EPISODES of WAYS new intents, 1 or 5 texts each to learn from.  On the vectors of MiniLM as it is: nearest
prototype; a probe; a square matrix in front, from the identity, learned by prototypes' loss on episodes or, the control
of it, by telling all the known intents apart, then nearest prototype; matrix and head by first-order MAML and Reptile.
"prototypical, encoder" trains MiniLM by the same loss.  Settings are searched with SEARCH_SEED on the middle intents.
"""

import copy
import functools
import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from record import Job, Table, side_by_side, started, subset

import ftlib
from ftlib.core.batches import collate
from ftlib.methods import fewshot
from ftlib.methods.fewshot import contrastive_pairs, prototype_logits, prototypes
from ftlib.tasks.task import auto_class

ABOUT = "MiniLM, accuracy against labels a class"
MODEL: str | None = "minilm"  # or a folder with its weights; None: a tiny random one
CORPORA = ("rotten-tomatoes", "banking77")
INTENTS = 10  # the first of banking77's 77
NAMES = {"rotten-tomatoes": ("a bad film", "a good film")}  # of the others the labels' own, without underscores
SHOTS, SEEDS, SEARCH_SEED, SEARCHED = (64, 8, 2, 32, 16, 4), (0, 1, 2, 3, 4), 100, 64
PROMPTED, WORDS, ASKED = (0, 2, 4, 8, 16), (" negative", " positive"), 200  # labels a class; of rotten-tomatoes; texts
TRAINED, FIXED = ("fine-tuning", "contrastive"), ("prototypes", "probe")
RATES = {"fine-tuning": (1e-4, 2e-4, 4e-4), "contrastive": (1e-5, 2e-5, 4e-5)}
UPDATES, PAIR_UPDATES, ITERATIONS, BATCH = 120, 150, 20, 16
POOL, LABELS, DRAWS = 2000, (10, 20, 30, 40, 60, 80, 120, 160), tuple(range(20))
NEW = ("prototypes", "probe", "ordinary", "prototypical", "maml", "reptile", "prototypical, encoder")
OUTER, INNERS, ENCODERS = (3e-4, 1e-3, 3e-3), (0.03, 0.1, 0.3, 0.6), (1e-5, 2e-5, 4e-5)  # learning rates
WAYS, QUERIES, EPISODES, KNOWN, MIDDLE = 20, 5, 100, 90, 20  # the last two: intents; the other 40 are new
INNER, ADAPT, META, ENCODER = 5, 10, 300, 40  # inner steps, of a new episode; updates of 4 episodes, of 1
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TEST: int | None = 1000  # rows of the other splits; None: all
TOY = {
    "SHOTS": (2,), "SEEDS": (0,), "SEARCHED": 2, "RATES": dict.fromkeys(RATES, (1e-4,)), "UPDATES": 2,
    "PAIR_UPDATES": 2, "TEST": 8, "MODEL": None, "PROMPTED": (0, 2), "ASKED": 4, "DRAWS": (0,), "LABELS": (10, 12),
    "POOL": 40, "EPISODES": 2, "META": 2, "ENCODER": 1, "OUTER": (1e-3,), "INNERS": (1.0,), "ENCODERS": (1e-5,),
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


def probe(known: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(known, labels)


def probed(known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    return probe(known, labels).predict(asked)


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


def prompted(corpus: str, rows: list[int], texts: list[str]) -> np.ndarray:
    """The second word's log-odds against the first after every text, (texts,), the labeled rows in front."""
    model, tokenizer = speaker()
    splits, _ = corpus_of(corpus)
    known, labels = splits["train"]
    write = "Review: {}\nSentiment:{}\n\n".format
    prefix = "".join(write(known[row], WORDS[labels[row]]) for row in rows)
    first, second = (tokenizer(word).input_ids[0] for word in WORDS)
    way = model.lm_head.weight[second] - model.lm_head.weight[first]
    found = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=MODEL is not None):
        start = torch.tensor([tokenizer(prefix).input_ids]).long()  # (1, tokens), 0 without rows
        cache = model.model(start, use_cache=True).past_key_values if rows else None
        for begin in range(0, len(texts), 40):
            asked = [{"input_ids": tokenizer(write(t, "").rstrip()).input_ids} for t in texts[begin : begin + 40]]
            batch, own = collate(asked), copy.deepcopy(cache)
            if own:
                own.batch_repeat_interleave(len(asked))
            mask = torch.cat((torch.ones(len(asked), start.shape[1]).long(), batch["attention_mask"]), dim=1)
            hidden = model.model(batch["input_ids"], attention_mask=mask, past_key_values=own).last_hidden_state
            ends = hidden[torch.arange(len(asked)), batch["attention_mask"].sum(1) - 1]
            found.append(ends.float())
    return (torch.cat(found) @ way).detach().numpy()  # in float32: two log-odds of bf16 are often equal


@functools.cache
def speaker() -> tuple[Any, Any]:
    """The language model and its tokenizer."""
    tokenizer = ftlib.load_tokenizer("smollm2")
    if MODEL:
        return ftlib.load_model("smollm2", task="causal-lm").eval(), tokenizer
    tiny = TINY | {"vocab_size": len(tokenizer), "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny)).eval(), tokenizer


# ---------------------------------------------------------------------------- what to label next, and new intents


def active(table: Table, corpus: str, how: str, seed: int) -> None:
    """Labels are bought in rounds; random is the control, and every way has the same first ones."""
    found, (splits, _) = as_it_is(corpus), corpus_of(corpus)
    known, labels = found["train"][:POOL], splits["train"][1][:POOL]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(known))
    while len({*labels[order[: LABELS[0]]]}) < 2:
        order = rng.permutation(len(known))

    def run() -> dict[str, Any]:
        chosen, reached, model = [int(row) for row in order[: LABELS[0]]], [], None
        for count in LABELS:
            if more := count - len(chosen):
                left = np.setdiff1d(order, chosen, assume_unique=True)
                if how == "k-center":
                    chosen += fewshot.k_center(known, more, chosen)
                elif how == "random":
                    chosen += [int(row) for row in order[len(chosen) : count]]
                else:
                    unsure = fewshot.uncertainty(model.predict_proba(known[left]), how)
                    chosen += [int(row) for row in left[np.argsort(-unsure, kind="stable")[:more]]]
            model = probe(known[chosen], labels[chosen])
            reached.append(accuracy(corpus, "test", model.predict(found["test"])))
        return {"labels": [*LABELS], "accuracy": reached}

    table.row({"part": "active", "corpus": corpus, "how": how, "seed": seed}, run)


class Mapped(torch.nn.Module):
    """Vectors (texts, hidden) through a square matrix, to length 1; and, with classes, a linear head on these."""

    def __init__(self, hidden: int, classes: int = 0):
        super().__init__()
        self.map = torch.nn.Linear(hidden, hidden)
        torch.nn.init.eye_(self.map.weight), torch.nn.init.zeros_(self.map.bias)
        self.head = torch.nn.Linear(hidden, classes) if classes else None
        if self.head:
            torch.nn.init.zeros_(self.head.weight), torch.nn.init.zeros_(self.head.bias)

    def forward(self, vectors: torch.Tensor) -> Any:
        mapped = torch.nn.functional.normalize(self.map(vectors), dim=-1)
        return SimpleNamespace(logits=10 * self.head(mapped) if self.head else mapped)


@functools.cache
def intents(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """{"known", "middle", "new": (vectors, labels, texts)} of clinc150's training rows; every intent is in one."""
    data = ftlib.load_corpus("clinc150")["train"]
    texts, labels = list(data["text"]), np.array(data["label"])
    order, found = np.random.default_rng(seed).permutation(150), {}
    all_vectors = intent_vectors()
    for name, own in zip(("known", "middle", "new"), np.split(order, [KNOWN, KNOWN + MIDDLE]), strict=True):
        rows = np.flatnonzero(np.isin(labels, own))
        found[name] = torch.from_numpy(all_vectors[rows]), torch.from_numpy(labels[rows]), [texts[row] for row in rows]
    return found


@functools.cache
def intent_vectors() -> np.ndarray:
    return vectors(model_for("sentence-embedding"), list(ftlib.load_corpus("clinc150")["train"]["text"]))


def episodes_of(labels: torch.Tensor, shots: int, seed: int) -> Any:
    """Rows of support and queries, and their classes, without end."""
    for pair in fewshot.episodes(labels.tolist(), ways=WAYS, shots=shots, queries=QUERIES, seed=seed):
        yield [(torch.from_numpy(rows.flatten()), torch.arange(WAYS).repeat_interleave(rows.shape[1])) for rows in pair]


def stepped(model: torch.nn.Module, batches: Any, rate: float, count: int, gradient: Any = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in ftlib.steps(model, batches, optimizer, total=count, gradient=gradient):
        pass


def learned(method: str, seed: int, rate: float, inner: float) -> torch.nn.Module | None:
    """What a method knows of the known intents; None: no more than the vectors."""
    vectors, labels, texts = intents(seed)["known"]
    torch.manual_seed(seed)
    if method in ("prototypes", "probe"):
        return None
    if method == "ordinary":
        classes = torch.unique(labels, return_inverse=True)[1]
        model = Mapped(vectors.shape[1], KNOWN)
        drawn = (torch.randint(len(labels), (4 * WAYS * (5 + QUERIES),)) for _ in range(META))
        stepped(model, ([{"vectors": vectors[rows], "labels": classes[rows]}] for rows in drawn), rate, META)
        model.head = None
        return model
    stream = episodes_of(labels, 5, seed)
    if method == "prototypical, encoder":
        encoder, tokens = model_for("sentence-embedding", seed), tokenizer()(texts)["input_ids"]
        batch = lambda rows, own: collate([{"input_ids": tokens[row]} for row in rows]) | {"labels": own}  # noqa: E731
        batches = ([[batch(*one) for one in next(stream)]] for _ in range(ENCODER))
        with torch.autocast("cpu", torch.bfloat16):
            stepped(encoder, batches, rate, ENCODER, fewshot.prototypical("cosine", 10.0))
        return encoder
    batches = (
        [[{"vectors": vectors[rows], "labels": own} for rows, own in next(stream)] for _ in range(4)]
        for _ in range(META)
    )
    gradient = {
        "prototypical": lambda: fewshot.prototypical("cosine", 10.0),
        "maml": lambda: fewshot.first_order_maml(inner, INNER), "reptile": lambda: fewshot.reptile(inner, INNER),
    }[method]()  # fmt: skip
    model = Mapped(vectors.shape[1], 0 if method == "prototypical" else WAYS)
    stepped(model, batches, rate, META, gradient)
    return model


def answered(method: str, model: Any, support: torch.Tensor, own: torch.Tensor, queries: torch.Tensor, inner: float):
    """Predicted classes of the queries, (queries,), from the support's vectors and classes."""
    if method == "probe":
        return torch.from_numpy(probed(support.numpy(), own.numpy(), queries.numpy()))
    if method in ("maml", "reptile"):
        model = copy.deepcopy(model)
        sgd = torch.optim.SGD(model.parameters(), lr=inner)
        for _ in range(ADAPT):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(model(support).logits, own).backward()
            sgd.step()
        return model(queries).logits.argmax(1)
    return prototype_logits(queries, prototypes(support, own), "cosine").argmax(1)


def new_intents(method: str, seed: int, part: str, rate: float, inner: float) -> dict[str, float]:
    """{"1", "5": accuracy of so many texts an intent}, over episodes of a part's intents."""
    begin = time.perf_counter()
    model, (known, labels, texts) = learned(method, seed, rate, inner), intents(seed)[part]
    seconds = time.perf_counter() - begin
    if method == "prototypical, encoder":
        known = torch.from_numpy(vectors(model, texts))
    elif model is not None and method not in ("maml", "reptile"):
        known = model(known).logits.detach()
    found = {}
    for shots in (1, 5):
        stream, right = episodes_of(labels, shots, 1000 + seed), []
        for _ in range(EPISODES):
            (rows, own), (asked, wanted) = next(stream)
            right.append((answered(method, model, known[rows], own, known[asked], inner) == wanted).float().mean())
        found[str(shots)] = float(torch.stack(right).mean())
    return found | {"seconds": seconds}


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


def prompting(table: Table, seed: int) -> None:
    corpus = CORPORA[0]
    texts, labels = (own[:ASKED] for own in corpus_of(corpus)[0]["test"])
    for shots in PROMPTED if seed == SEEDS[0] else PROMPTED[1:]:

        def measure(shots: int = shots) -> dict[str, Any]:
            begin = time.perf_counter()
            odds = prompted(corpus, drawn(corpus, shots, seed), [*texts, "N/A"])
            seconds, right = time.perf_counter() - begin, labels == 1
            calibrated = {"accuracy": ((odds[:-1] > odds[-1]) == right).mean(), "said": (odds[:-1] > odds[-1]).mean()}
            found = {"accuracy": ((odds[:-1] > 0) == right).mean(), "said": (odds[:-1] > 0).mean()}
            found |= {f"calibrated_{name}": value for name, value in calibrated.items()}
            return {name: float(value) for name, value in found.items()} | {"seconds": seconds, "texts": len(texts)}

        table.row({"part": "accuracy", "corpus": corpus, "method": "prompting", "shots": shots, "seed": seed}, measure)


def bought(table: Table, corpus: str) -> None:
    ways = ("random", "entropy", "k-center") + ("margin",) * (corpus != CORPORA[0])  # of two classes it is entropy's
    for how, seed in itertools.product(ways, DRAWS):
        active(table, corpus, how, seed)


def chosen(table: Table, method: str) -> tuple[float, float]:
    """The outer rate and the inner one of a method on episodes of intents, by the middle ones."""
    if method in ("prototypes", "probe"):
        return 0.0, 0.0
    key = {"part": "settings", "method": method, "seed": SEARCH_SEED}
    value = lambda row: (row["5"], row["rate"])  # noqa: E731
    best = {}
    for inner in INNERS if method in ("maml", "reptile") else (0.0,):
        own = key | {"inner": inner}
        measure = functools.partial(new_intents, method, SEARCH_SEED, "middle", inner=inner)
        rates = ENCODERS if method == "prototypical, encoder" else OUTER
        rate = table.best_rate(own, rates, lambda rate, measure=measure: measure(rate=rate), value)
        best[rate, inner] = table.row(own | {"rate": rate}, dict)["5"]
    return max(best, key=best.__getitem__)


def on_new_intents(table: Table, method: str) -> None:
    rate, inner = chosen(table, method)
    for seed in SEEDS:
        key = {"part": "new intents", "method": method, "seed": seed, "rate": rate, "inner": inner}
        table.row(key, functools.partial(new_intents, method, seed, "new", rate, inner))


def jobs() -> list[Job]:
    """What needs no training or little, the rates, then sizes in the order of SHOTS, draw by draw."""
    found = [Job(corpus, (without_training, corpus)) for corpus in CORPORA]
    found += [Job(f"{c} {m}", (searched, c, m)) for c, m in itertools.product(CORPORA, TRAINED)]
    found += [Job(f"new intents {method}", (on_new_intents, method)) for method in NEW]
    found += [Job(f"active {corpus}", (bought, corpus)) for corpus in CORPORA]
    found += [Job(f"prompting {seed}", (prompting, seed)) for seed in SEEDS]
    for shots, seed, corpus, method in itertools.product(SHOTS, SEEDS, CORPORA, TRAINED):
        call = (tested, corpus, method, shots, seed)
        found.append(Job(f"{corpus} {method} {shots} {seed}", call, f"{corpus} {method}"))
    return found


def table(folder: Path) -> Table:
    return Table("few_labels", "python tests/benchmarks/few_labels.py", ABOUT, folder=folder)


def main() -> None:
    side_by_side(started(globals(), ABOUT), jobs(), workers=0 if MODEL is None else 2)


if __name__ == "__main__":
    main()
