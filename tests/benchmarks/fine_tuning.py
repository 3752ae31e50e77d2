"""Results of notebooks 03 and 04: strategies, learning rates, learning curves on rotten-tomatoes, with seeds.

    python tests/benchmarks/fine_tuning.py    # writes results/fine_tuning.json; resumes

Parts
- search: learning rates of three strategies on 500 sentences, seed 0.
- rates, twice, accuracy: as in strategies.py.  Three strategies on 2,000 sentences; full
  fine-tuning on 50 to all of them, with its own rate at every size, and so many updates that twice as many don't help.
- probe: logistic regression on features of the encoder as it is; its C by validation accuracy.

Every run starts from the same pretrained MiniLM; the seed changes the head's first weights, the choice and order of
the training sentences, and dropout.  Accuracies are on the corpus's own 533 test sentences.
"""

import itertools
from typing import Any

from record import Table, started
from sklearn.linear_model import LogisticRegression
from strategies import accuracies, chosen

import ftlib

SEEDS = (0, 1, 2, 3, 4)
RATES = {
    "full": (1e-5, 5e-5, 1.5e-4, 5e-4, 1e-3, 3e-3),
    "last-layers": (1.5e-4, 5e-4, 1.5e-3),
    "head-only": (5e-4, 1.5e-3, 5e-3),
}
SEARCHED = (500, 160)  # sentences, updates
COMPARED = {2000: (32, 320, "fp32")}
CURVE = {
    count: (batch_size, updates, "fp32")
    for count, batch_size, updates in (
        (50, 16, 80), (100, 16, 120), (200, 16, 160), (500, 32, 160), (1000, 32, 200), (2000, 32, 320), (7464, 32, 700)
    )
}  # fmt: skip
CS = (0.01, 0.1, 1.0, 10.0)
TOY = {"SEEDS": (0,), "RATES": {"full": (1e-4,)}, "SEARCHED": (8, 2), "COMPARED": {8: (4, 2, "fp32")}}
TOY["CURVE"] = TOY["COMPARED"]


def probes(table: Table, data: Any, tokenizer: Any) -> None:
    model, splits = ftlib.load_model("minilm"), ("train", "validation", "test")
    x = {s: ftlib.extract_features(model, data[s]["text"], tokenizer=tokenizer, max_length=128) for s in splits}
    y = {split: data[split].with_format("numpy")["label"][:] for split in splits}

    def probe(count: int, seed: int) -> dict[str, float]:
        rows = chosen(y["train"].tolist(), count, seed)
        tried = [LogisticRegression(C=c, max_iter=5000).fit(x["train"][rows], y["train"][rows]) for c in CS]
        best = max(tried, key=lambda one: one.score(x["validation"], y["validation"]))
        return {"test": float(best.score(x["test"], y["test"])), "C": best.C}

    for count, seed in itertools.product(CURVE, SEEDS):
        key = {"part": "probe", "strategy": "probe", "count": count, "seed": seed}
        table.row(key, lambda key=key: probe(key["count"], key["seed"]))


def main() -> None:
    table = started(globals(), "MiniLM on rotten-tomatoes, test accuracy")
    data, tokenizer = ftlib.load_corpus("rotten-tomatoes"), ftlib.load_tokenizer("minilm")
    tokens = ftlib.tokenize(data, tokenizer, max_length=128)
    probes(table, data, tokenizer)

    def searched(strategy: str, rate: float) -> dict[str, float]:
        model = ftlib.unpad(ftlib.load_model("minilm", task="sequence-classification", num_labels=2, seed=0))
        ftlib.tune(model, strategy)
        config = ftlib.TrainConfig(max_steps=SEARCHED[1], batch_size=32, learning_rate=rate, seed=0, progress=False)
        rows = tokens["train"].select(chosen(list(data["train"]["label"]), SEARCHED[0], seed=0))
        run = ftlib.fit(model, rows, tokenizer=tokenizer, config=config)
        last = [record["loss"] for record in run.history[-10:]]
        scores = {split: ftlib.evaluate(model, tokens[split])["accuracy"] for split in ("validation", "test")}
        return {**scores, "loss_last": sum(last) / len(last)}

    for strategy, rates in RATES.items():
        for rate in rates:
            key = {"part": "search", "strategy": strategy, "rate": rate, "count": SEARCHED[0], "steps": SEARCHED[1]}
            table.row(key | {"seed": 0}, lambda strategy=strategy, rate=rate: searched(strategy, rate))
    accuracies(SEEDS, ["full"], tokens, table, CURVE)
    accuracies(SEEDS, list(RATES), tokens, table, COMPARED)


if __name__ == "__main__":
    main()
