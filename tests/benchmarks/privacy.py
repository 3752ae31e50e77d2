"""What privacy costs, and what it stops: DP-SGD on rotten-tomatoes with MiniLM, and attacks on the models.

    python tests/benchmarks/privacy.py    # writes results/privacy.json; goes on where it stopped

Parts
- search: the learning rate of every strategy, with noise and without, by validation accuracy, seed 100.
- accuracy: strategies, budgets and seeds; accuracy on the 533 test sentences, and the loss-threshold attack: the share
  of pairs of a training and a test sentence in which the former has the lower loss (AUC; 0.5: nothing to see).
- shadow: models of random halves of 800 sentences, without noise and with; the log-odds of the label of each of them.
  From these the notebook computes the likelihood-ratio attack (LiRA) of every model, the others being its shadows.
- speed: seconds of a step of 32 rows and its peak memory beside Opacus', with per-row gradients and with its own ghost
  clipping, in turn; full fine-tuning, head and LoRA.

A budget of "inf" is ordinary fine-tuning with the same batches and steps, none of its rows cut, no noise.  delta is
1 / (10 · rows).  The seed changes the head's first weights and the rows; the noise is the system's.
"""

import itertools
import json
import sys
from functools import partial
from typing import Any

import torch
from paired import alone, run_rounds, spread, timed
from record import Table, started
from sklearn.metrics import roc_auc_score

import ftlib
from ftlib.core.batches import collate

SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
BUDGETS = (1.0, 3.0, 8.0, "inf")
STRATEGIES = {"full": {}, "lora": {"rank": 8}, "head-only": {}}
RATES = {"full": (2e-4, 5e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2), "head-only": (3e-3, 1e-2, 3e-2)}
ROWS, BATCH, STEPS, CUT = None, 512, 120, 0.5  # rows: all; sentences a step; steps; max_grad_norm
MODELS, POOL, SHADOW = 16, 800, (64, 100)  # of the shadows: how many, sentences, (batch, steps)
ROUNDS, STEP_ROWS = 5, 32
TOY = {"SEEDS": (0,), "BUDGETS": (8.0, "inf"), "STRATEGIES": {"head-only": {}}, "RATES": {"head-only": (1e-2,)},
       "ROWS": 24, "BATCH": 8, "STEPS": 2, "ROUNDS": 1, "STEP_ROWS": 4}  # fmt: skip


def model_of(strategy: str, seed: int) -> Any:
    model = ftlib.unpad(ftlib.load_model("minilm", task="sequence-classification", num_labels=2, seed=seed))
    seeded = {"seed": seed} if strategy == "lora" else {}
    ftlib.tune(model, strategy, **STRATEGIES[strategy], **seeded)
    return model


def rows_of(split: str) -> list[dict[str, Any]]:
    """Every sentence once: the same twice would count twice."""
    data = ftlib.tokenize(ftlib.load_corpus("rotten-tomatoes")[split], ftlib.load_tokenizer("minilm"), max_length=64)
    return list({tuple(row["input_ids"]): dict(row) for row in data}.values())


def log_odds(model: Any, rows: list) -> torch.Tensor:
    """How much likelier the model finds each row's label than the other, in nats, (rows,)."""
    logits = torch.from_numpy(ftlib.predict(model, rows, output="logits"))
    labels = torch.tensor([row["labels"] for row in rows])[:, None]
    return (logits.gather(1, labels) - logits.gather(1, 1 - labels))[:, 0]


def trained(strategy: str, budget: Any, rate: float, seed: int, rows: list, batch: int, steps: int) -> tuple[Any, Any]:
    privacy = None if budget == "inf" else ftlib.Privacy(
        delta=0.1 / len(rows), epsilon=budget, max_grad_norm=CUT, accountant="prv")  # fmt: skip
    model = model_of(strategy, seed)
    config = ftlib.TrainConfig(
        max_steps=steps, batch_size=batch, micro_batch_size=64, learning_rate=rate, seed=seed, privacy=privacy,
        progress=False, weight_decay=0.0,
    )  # fmt: skip
    return model, ftlib.fit(model, rows, config=config)


def measured(strategy: str, budget: Any, rate: float, seed: int, tokens: dict, split: str) -> dict[str, Any]:
    model, run = trained(strategy, budget, rate, seed, tokens["train"], min(BATCH, len(tokens["train"])), STEPS)
    count = len(tokens["test"])
    seen, unseen = (log_odds(model, tokens[name][:count]) for name in ("train", "test"))
    members = [1] * len(seen) + [0] * len(unseen)
    return {
        split: ftlib.evaluate(model, tokens[split])["accuracy"], "epsilon": run.epsilon, "seconds": run.seconds,
        "attack_auc": float(roc_auc_score(members, torch.cat((seen, unseen)))),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip


def shadow(budget: Any, number: int, rate: float, pool: list) -> dict[str, Any]:
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(number)).tolist()
    members = sorted(order[: len(pool) // 2])
    model, run = trained("full", budget, rate, number, [pool[i] for i in members], *SHADOW)
    found = log_odds(model, pool)
    return {"members": members, "log_odds": [round(float(x), 3) for x in found], "epsilon": run.epsilon}


def work(name: str, strategy: str, rows: list) -> Any:
    """A private step of the rows by ftlib or by Opacus, as a function: {"seconds": ...}."""
    from ftlib.methods.privacy import Privacy, private_gradient

    model, batch = model_of(strategy, 0), collate(rows)
    ftlib.repad(model)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(len(rows), -1)  # for Opacus a row each
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if name == "ftlib":
        loss = partial(torch.nn.functional.cross_entropy, reduction="none")
        settings = Privacy(delta=1e-5, noise_multiplier=1.0, max_grad_norm=CUT)
        each = lambda model, batch: loss(model(**{n: batch[n] for n in inputs}).logits, batch["labels"])  # noqa: E731
        gradient = private_gradient(each, settings, 1.0, len(rows), torch.Generator())

        def step() -> None:
            sgd.zero_grad()
            gradient(model, [batch])
            sgd.step()
    else:
        from opacus import PrivacyEngine
        from torch.utils.data import DataLoader

        mode = "ghost" if name.endswith("ghost") else "hooks"
        made = PrivacyEngine().make_private(
            module=model, optimizer=sgd, data_loader=DataLoader(rows, batch_size=len(rows)), noise_multiplier=1.0,
            max_grad_norm=CUT, poisson_sampling=False, grad_sample_mode=mode,
            **({"criterion": torch.nn.CrossEntropyLoss()} if mode == "ghost" else {}),
        )  # fmt: skip
        private, optimizer = made[0], made[1]
        criterion = made[2] if mode == "ghost" else torch.nn.CrossEntropyLoss()

        def step() -> None:
            optimizer.zero_grad()
            criterion(private(**inputs).logits, batch["labels"]).backward()
            optimizer.step()

    return lambda: timed(step, "nothing")


WAYS = ("ftlib", "opacus", "opacus, ghost")


def peak(name: str, strategy: str) -> dict[str, float]:
    step = work(name, strategy, rows_of("train")[:STEP_ROWS])
    step()
    with ftlib.measure() as cost:
        step()
    return {"peak_mb": cost.peak_mb}


def speed(strategy: str, rows: list) -> list[dict[str, Any]]:
    found = run_rounds({name: work(name, strategy, rows) for name in WAYS}, ROUNDS)
    seconds = {name: [one["seconds"] for one in own[1:]] for name, own in found.items()}
    ratios = {name: [a / b for a, b in zip(own, seconds["ftlib"], strict=True)] for name, own in seconds.items()}
    return [
        {"method": name, "seconds_a_step": spread(seconds[name]), "against_ftlib": spread(ratios[name])}
        | {"rows": len(rows)} | alone(__file__, "--one", name, strategy)
        for name in WAYS
    ]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(peak(*sys.argv[2:])))
        return
    table: Table = started(globals(), "Privacy: MiniLM on rotten-tomatoes (Pang and Lee 2005)")
    tokens = {split: rows_of(split)[:ROWS] for split in ("train", "validation", "test")}
    best = {}
    for strategy, private in itertools.product(STRATEGIES, (True, False)):
        budget = BUDGETS[-2] if private else BUDGETS[-1]
        key = {"part": "search", "strategy": strategy, "budget": budget, "seed": SEARCH_SEED, "steps": STEPS}
        rate = partial(lambda s, b, rate: measured(s, b, rate, SEARCH_SEED, tokens, "validation"), strategy, budget)
        best[strategy, private] = table.best_rate(key, RATES[strategy], rate, lambda row: row["validation"])
    for strategy, budget, seed in itertools.product(STRATEGIES, BUDGETS, SEEDS):
        rate = best[strategy, budget != "inf"]
        key = {"part": "accuracy", "strategy": strategy, "budget": budget, "seed": seed, "rate": rate, "steps": STEPS}
        table.row(key, partial(measured, strategy, budget, rate, seed, tokens, "test"))
    for budget, number in itertools.product(("inf", 8.0) if "full" in STRATEGIES else (), range(MODELS)):
        rate = best["full", budget != "inf"]
        key = {"part": "shadow", "budget": budget, "number": number, "rate": rate, "steps": SHADOW[1]}
        table.row(key, partial(shadow, budget, number, rate, tokens["train"][:POOL]))
    for strategy in STRATEGIES:
        if not any(row.get("part") == "speed" and row["strategy"] == strategy for row in table.content["rows"]):
            table.replace({"part": "speed", "strategy": strategy}, speed(strategy, tokens["train"][:STEP_ROWS]))


if __name__ == "__main__":
    main()
