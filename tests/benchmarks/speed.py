"""ftlib against the stock tools on the same work: fine-tuning and feature extraction with MiniLM.

    python tests/benchmarks/speed.py    # writes tests/benchmarks/results/speed.json

Every round runs all methods one after the other, so that a machine whose speed drifts treats them alike; what is
kept is the median rate and the median of the ratios within a round.  Fine-tuning: 320 sentences of
rotten-tomatoes in batches of 32, the same sentences in the same order, dropout on, float32; the mean loss of each
method is stored beside its rate.
"""

import statistics
import tempfile
import time

import torch
from record import Table

import ftlib

ROUNDS = 3
COUNT = 320


def trainer_run(data, tokenizer) -> float:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    model = ftlib.load_model("minilm", task="sequence-classification", num_labels=2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=32,
            learning_rate=1.5e-4,
            warmup_steps=1,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)
        )
        return trainer.train().training_loss


def fit_run(data, tokenizer, unpad: bool) -> float:
    model = ftlib.load_model("minilm", task="sequence-classification", num_labels=2)
    if unpad:
        ftlib.unpad(model)
    config = ftlib.TrainConfig(epochs=1, learning_rate=1.5e-4, warmup_fraction=0.1, shuffle=False, progress=False)
    run = ftlib.fit(model, data, tokenizer=tokenizer, config=config)
    return statistics.fmean(record["loss"] for record in run.history)


def compare(table: Table, work: str, count: int, methods: dict) -> None:
    """Rounds of all methods in turn; rows with the median rate and the median ratio to the first method."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    results: dict[str, float] = {}
    for round_ in range(ROUNDS + 1):  # the first warms up
        for name, run in methods.items():
            start = time.perf_counter()
            results[name] = run()
            if round_:
                times[name].append(time.perf_counter() - start)
    first = times[next(iter(methods))]
    for name in methods:
        ratios = [a / b for a, b in zip(first, times[name], strict=True)]
        table.row(
            {"work": work, "method": name},
            lambda n=name, r=ratios: {
                "per_second": count / statistics.median(times[n]),
                "ratio": statistics.median(r),
                "ratio_min": min(r),
                "ratio_max": max(r),
                "rounds": ROUNDS,
                "result": results[n],
                "threads": torch.get_num_threads(),
            },
        )


def main() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    table = Table(
        "speed", "python tests/benchmarks/speed.py", "ftlib against the stock tools, same work, paired rounds"
    )
    table.content["rows"] = []  # paired numbers are measured together or not at all
    tokenizer = ftlib.load_tokenizer("minilm")
    data = ftlib.load_corpus("rotten-tomatoes")["train"].select(range(COUNT))
    tokens = ftlib.tokenize(data, tokenizer, max_length=128)
    compare(
        table,
        f"fine-tune, {COUNT} sentences, batch 32",
        COUNT,
        {
            "Trainer, as it comes": lambda: trainer_run(tokens, tokenizer),
            "ftlib.fit": lambda: fit_run(tokens, tokenizer, unpad=False),
            "ftlib.fit, ftlib.unpad": lambda: fit_run(tokens, tokenizer, unpad=True),
        },
    )
    place = str(ftlib.assets.path("minilm"))
    transformer = Transformer(place, max_seq_length=128)
    encoder = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")], device="cpu"
    )
    plain, unpadded = ftlib.load_model("minilm"), ftlib.unpad(ftlib.load_model("minilm"))
    texts = data["text"]
    compare(
        table,
        f"features, {COUNT} sentences, batch 64",
        COUNT,
        {
            "sentence-transformers encode": lambda: float(encoder.encode(list(texts), batch_size=64).mean()),
            "ftlib.extract_features": lambda: float(
                ftlib.extract_features(plain, texts, tokenizer=tokenizer, max_length=128).mean()
            ),
            "ftlib.extract_features, ftlib.unpad": lambda: float(
                ftlib.extract_features(unpadded, texts, tokenizer=tokenizer, max_length=128).mean()
            ),
        },
    )


if __name__ == "__main__":
    main()
