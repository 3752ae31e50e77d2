"""Results of notebook 05: multi-task against single-task models, with seeds.

    python tests/benchmarks/multitask.py    # writes tests/benchmarks/results/multitask.json; resumes

Two settings.  "atis": intent and slots of the same sentences, one encoder or two; the joint model makes as many
steps as each single model, half of what the two make together.  "unlike": sentiment (rotten-tomatoes), paraphrase
pairs (mrpc) and bank intents (banking77), one encoder for all or one each; the joint model makes as many steps as
the three single models together.
"""

import torch
from record import Table

import ftlib

SEEDS = (0, 1, 2)
RATE = {"atis": 6e-4, "unlike": 5e-4}
Head = ftlib.Head


def subset(dataset, count: int, seed: int):
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return dataset.select(order[:count])


def train(heads: dict, datasets: dict, tests: dict, steps: int, rate: float, seed: int, temperature: float = 1.0):
    model = ftlib.unpad(ftlib.MultiTaskModel(ftlib.load_model("minilm"), heads, seed=seed))
    config = ftlib.TrainConfig(max_steps=steps, learning_rate=rate, seed=seed, temperature=temperature, progress=False)
    run = ftlib.fit(model, datasets, config=config)
    return {**ftlib.evaluate(model, tests), "seconds": run.seconds, "steps": run.steps}


def main() -> None:
    table = Table("multitask", "python tests/benchmarks/multitask.py", "MiniLM, multi-task against single-task")
    tokenizer = ftlib.load_tokenizer("minilm")

    atis = ftlib.load_corpus("atis")
    intents, tags = atis["train"].features["intent"].names, atis["train"].features["tags"].feature.names
    heads = {
        "intent": Head("sequence-classification", len(intents), tuple(intents)),
        "slots": Head("token-classification", len(tags), tuple(tags)),
    }
    columns = {"intent": "intent", "slots": "tags"}
    tokens = ftlib.tokenize(atis, tokenizer, text="tokens", label=columns)
    for seed in SEEDS:
        rows = subset(tokens["train"], 2000, seed)
        for tasks in (["intent"], ["slots"], ["intent", "slots"]):
            chosen = [{**row, "labels": {t: row["labels"][t] for t in tasks}} for row in rows]
            tests = [{**row, "labels": {t: row["labels"][t] for t in tasks}} for row in tokens["test"]]
            table.row(
                {"part": "atis", "tasks": "+".join(tasks), "seed": seed},
                lambda t=tasks, c=chosen, e=tests, s=seed: train(
                    {n: heads[n] for n in t}, {"atis": c}, {"atis": e}, 3 * 2000 // 32, RATE["atis"], s
                ),
            )

    corpora = {"sentiment": "rotten-tomatoes", "pairs": "mrpc", "intents": "banking77"}
    data = {task: ftlib.load_corpus(name) for task, name in corpora.items()}
    heads = {
        task: Head("sequence-classification", d["train"].features["label"].num_classes) for task, d in data.items()
    }
    tokens = {task: ftlib.tokenize(d, tokenizer, max_length=96) for task, d in data.items()}
    sizes = {"sentiment": 600, "pairs": 300, "intents": 1200}
    for seed in SEEDS:
        train_sets = {task: subset(tokens[task]["train"], size, seed) for task, size in sizes.items()}
        tests = {task: subset(tokens[task]["test"], 500, 0) for task in sizes}
        for task, size in sizes.items():
            table.row(
                {"part": "unlike", "tasks": task, "temperature": None, "seed": seed},
                lambda t=task, n=size, s=seed, a=train_sets, e=tests: train(
                    {t: heads[t]}, {t: a[t]}, {t: e[t]}, 2 * n // 32, RATE["unlike"], s
                ),
            )
        for temperature in (1.0, 5.0):
            table.row(
                {"part": "unlike", "tasks": "all", "temperature": temperature, "seed": seed},
                lambda k=temperature, s=seed, a=train_sets, e=tests: train(
                    heads, a, e, 2 * sum(sizes.values()) // 32, RATE["unlike"], s, k
                ),
            )


if __name__ == "__main__":
    main()
