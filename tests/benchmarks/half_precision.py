"""Does training in bf16 learn what training in float32 learns?  Loss curves and accuracy, the same 5 seeds in both.

    python tests/benchmarks/half_precision.py    # writes results/half_precision.json; resumes

MiniLM on film reviews (rotten-tomatoes), `unpad`, dropout on; a seed gives both precisions the same head, sentences,
order and dropout masks.  Stored of each run: the loss of every step, accuracy and loss on the 533 test sentences
(computed in float32).
"""

import argparse
from pathlib import Path

import torch
from record import RESULTS, Table

import ftlib

SEEDS = (0, 1, 2, 3, 4)
PRECISIONS = ("fp32", "bf16")
ROWS, EPOCHS, RATE = 1280, 2, 1.5e-4  # 80 steps of 32; the rate that notebook 03 finds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="one seed, 64 sentences: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    seeds, count = (SEEDS[:1], 64) if args.toy else (SEEDS, ROWS)
    command = "python tests/benchmarks/half_precision.py"
    table = Table("half_precision", command, "MiniLM on rotten-tomatoes in float32 and bf16", folder=args.results)
    data, tokenizer = ftlib.load_corpus("rotten-tomatoes"), ftlib.load_tokenizer("minilm")
    tokens = ftlib.tokenize(data, tokenizer, max_length=128)
    tokens["test"] = tokens["test"].select(range(64)) if args.toy else tokens["test"]

    def train(seed: int, precision: str) -> dict:
        chosen = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        model = ftlib.unpad(ftlib.load_model("minilm", task="sequence-classification", num_labels=2, seed=seed))
        config = ftlib.TrainConfig(
            epochs=EPOCHS, batch_size=32, learning_rate=RATE, seed=seed, precision=precision, progress=False
        )
        run = ftlib.fit(model, tokens["train"].select(chosen), tokenizer=tokenizer, config=config)
        found = ftlib.evaluate(model, tokens["test"])
        losses = [round(record["loss"], 4) for record in run.history]
        return {"losses": losses, "accuracy": found["accuracy"], "test_loss": found["loss"]}

    for seed in seeds:
        for precision in PRECISIONS:
            table.row({"seed": seed, "precision": precision}, lambda s=seed, p=precision: train(s, p))


if __name__ == "__main__":
    main()
