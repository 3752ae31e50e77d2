"""Results of notebooks 03 and 04: strategies, learning rates, learning curves on rotten-tomatoes, with seeds.

    python tests/benchmarks/fine_tuning.py    # writes tests/benchmarks/results/fine_tuning.json; resumes

Every run starts from the same pretrained MiniLM; the seed changes the head's first weights, the choice and order
of the training sentences, and dropout.  Accuracies are on the corpus's own 533 test sentences.
"""

import torch
from record import Table
from sklearn.linear_model import LogisticRegression

import ftlib

SEEDS = (0, 1, 2)
EPOCHS = 2
# Tried on 500 sentences; the best on the validation split (of equals the larger) is used for everything else.
RATES = {
    "full": (1e-5, 5e-5, 1.5e-4, 5e-4, 1e-3, 3e-3),
    "last-layers": (1.5e-4, 5e-4, 1.5e-3),
    "head-only": (5e-4, 1.5e-3, 5e-3),
}


def main() -> None:
    table = Table("fine_tuning", "python tests/benchmarks/fine_tuning.py", "MiniLM on rotten-tomatoes, test accuracy")
    data = ftlib.load_corpus("rotten-tomatoes")
    tokenizer = ftlib.load_tokenizer("minilm")
    tokens = ftlib.tokenize(data, tokenizer, max_length=128)

    def chosen(count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(data["train"]), generator=generator)[:count].tolist()

    def train(strategy: str, rate: float, count: int, seed: int, epochs: int = EPOCHS) -> dict:
        model = ftlib.load_model("minilm", task="sequence-classification", num_labels=2, seed=seed)
        ftlib.unpad(model)
        report = ftlib.tune(model, strategy)
        config = ftlib.TrainConfig(
            epochs=epochs,
            batch_size=min(32, max(8, count // 10)),
            learning_rate=rate,
            seed=seed,
            progress=False,
        )
        with ftlib.measure() as cost:
            run = ftlib.fit(model, tokens["train"].select(chosen(count, seed)), tokenizer=tokenizer, config=config)
        return {
            "accuracy": ftlib.evaluate(model, tokens["test"])["accuracy"],
            "validation": ftlib.evaluate(model, tokens["validation"])["accuracy"],
            "loss_last": sum(h["loss"] for h in run.history[-10:]) / len(run.history[-10:]),
            "trainable": report.trainable,
            "seconds": run.seconds,
            "peak_mb": cost.peak_mb,
        }

    best = {}
    for strategy, rates in RATES.items():
        tried = [
            table.row(
                {"part": "search", "strategy": strategy, "rate": rate, "count": 500, "seed": 0},
                lambda s=strategy, r=rate: train(s, r, 500, 0, 4),
            )
            for rate in rates
        ]
        best[strategy] = max(tried, key=lambda row: (row["validation"], row["rate"]))["rate"]
    for seed in SEEDS:
        for strategy, rate in best.items():
            table.row(
                {"part": "strategies", "strategy": strategy, "rate": rate, "count": 2000, "seed": seed},
                lambda s=strategy, r=rate, k=seed: train(s, r, 2000, k),
            )

    features: dict[str, object] = {}

    def probe(count: int, seed: int) -> dict:
        if not features:
            model = ftlib.load_model("minilm")
            for split in ("train", "test"):
                features[split] = ftlib.extract_features(
                    model, data[split]["text"], tokenizer=tokenizer, max_length=128
                )
        rows = chosen(count, seed)
        labels = [data["train"][i]["label"] for i in rows]
        classifier = LogisticRegression(max_iter=2000).fit(features["train"][rows], labels)
        return {"accuracy": float(classifier.score(features["test"], data["test"]["label"]))}

    for count in (50, 100, 200, 500, 1000, 2000, len(data["train"])):
        for seed in SEEDS:
            table.row(
                {"part": "curve", "strategy": "probe", "count": count, "seed": seed},
                lambda c=count, k=seed: probe(c, k),
            )
    for count in (50, 100, 200, 500, 1000):  # 2000 is measured above
        for seed in SEEDS:
            epochs = max(EPOCHS, -(-500 // count))  # small sets need more passes to see 500 sentences
            table.row(
                {
                    "part": "curve",
                    "strategy": "full",
                    "rate": best["full"],
                    "count": count,
                    "epochs": epochs,
                    "seed": seed,
                },
                lambda c=count, k=seed, e=epochs: train("full", best["full"], c, k, e),
            )


if __name__ == "__main__":
    main()
