"""What privacy costs, and what it stops: DP-SGD on rotten-tomatoes with MiniLM, and attacks on the models.

    python tests/benchmarks/privacy.py    # writes results/privacy.json; resumes; two trainings at a time

Parts
- search: the learning rate of every strategy, with noise and without, by validation accuracy, seed 100.
- accuracy: strategies, budgets and seeds; accuracy on the 533 test sentences, and the loss-threshold attack: the share
  of pairs of a training and a test sentence in which the former has the lower loss (AUC; 0.5: nothing to see).
- shadow: models of random halves of some sentences, without noise and with, and the log-odds of the label of each.
- attack: from these, for every model, the others being its shadows: the loss threshold and the likelihood-ratio attack
  (LiRA, Carlini et al. 2022), as the AUC and the share of members found at 1 % false alarms.
- speed: seconds of a step and its peak memory beside Opacus', with per-row gradients and with its own ghost clipping,
  in turn, on one thread; full fine-tuning, LoRA and head.

Strategies: "vectors", a linear layer on the frozen encoder's mean vectors, which are computed once and stored; "lora";
"full". All of these draw as many sentences a step and make as many steps.  "vectors, longer" is the first with what it
can afford.  A budget of "inf" is ordinary fine-tuning with the same batches and steps, none of its rows cut, no noise.
delta is 1 / (10 * rows).  The seed changes the first weights; rows drawn and noise are the system's.

Counted in sentences that go forward and back: 34 trainings of 6,144 (LoRA and full, with noise and without: 3 rates and
5 seeds each, and two rates more where the best was at an end) and 20 shadows of 2,000.  With noise a thread does about
75 a second for LoRA and 40 for full, without 95 and 80: two trainings at a time, some 35 minutes; vectors 3, speed 5.
"""

import functools
import itertools
import json
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from paired import alone, run_rounds, spread, timed
from record import Job, Table, side_by_side, started
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

import ftlib
from ftlib.core.batches import collate
from ftlib.core.loop import schedule_factor, steps
from ftlib.methods.privacy import Privacy, Private

ABOUT = "Privacy: MiniLM on rotten-tomatoes (Pang and Lee 2005)"
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
STRATEGIES: dict[str, dict[str, Any]] = {"vectors": {}, "vectors, longer": {}, "lora": {"rank": 8}, "full": {}}
BUDGETS: dict[str, tuple] = {"vectors": (0.5, 1.0, 2.0, 4.0, 8.0, "inf"), "lora": (8.0, "inf"), "full": (8.0, "inf")}
BUDGETS["vectors, longer"] = BUDGETS["vectors"]
RATES = {"vectors": (0.03, 0.1, 0.3), "vectors, longer": (0.01, 0.03, 0.1), "lora": (1e-3, 3e-3, 1e-2),
         "full": (1e-4, 3e-4, 1e-3)}  # fmt: skip
ROWS: int | None = None  # training sentences; None: all
SIZES = {"": (256, 24), "vectors, longer": (1024, 200)}  # sentences a step, steps; "": of the others
CUT, SEARCHED = 0.5, 8.0  # max_grad_norm; the budget whose rates all private ones have
SHADOWS = {"full": (10, 400, 50, 40), "vectors": (48, 400, 100, 400)}  # models, sentences, of which a step, steps
ROUNDS, STEP_ROWS, TIMED = 3, 16, ("head-only", "lora", "full")
TOY = {
    "SEEDS": (0,), "STRATEGIES": {"vectors": {}, "lora": {"rank": 2}}, "BUDGETS": dict.fromkeys(BUDGETS, (8.0, "inf")),
    "RATES": {"vectors": (0.1,), "lora": (1e-3,)}, "ROWS": 24, "SIZES": {"": (8, 2)}, "ROUNDS": 1, "STEP_ROWS": 4,
    "SHADOWS": {"vectors": (4, 16, 8, 2)}, "TIMED": ("head-only",),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the data


@functools.cache
def sentences_of(split: str) -> list[tuple[str, dict[str, Any]]]:
    """Texts and their tokens, each once: the same twice would count twice."""
    data = ftlib.load_corpus("rotten-tomatoes")[split]
    tokens = ftlib.tokenize(data, ftlib.load_tokenizer("minilm"), max_length=64)
    found: dict[tuple, tuple[str, dict[str, Any]]] = {}
    for text, row in zip(data["text"], tokens, strict=True):
        found.setdefault(tuple(row["input_ids"]), (text, dict(row)))
    return [*found.values()][:ROWS]


def rows_of(split: str) -> list[dict[str, Any]]:
    return [row for _, row in sentences_of(split)]


@functools.cache
def vectors_of(split: str) -> torch.Tensor:
    """The frozen encoder's mean vectors of these, of length 1, float32 (rows, hidden)."""
    texts = [text for text, _ in sentences_of(split)]
    return torch.from_numpy(ftlib.extract_features("minilm", texts, max_length=64))


def labels_of(rows: list[dict]) -> torch.Tensor:
    return torch.tensor([row["labels"] for row in rows])


# ----------------------------------------------------------------------------------------------- the trainings


@functools.cache
def noise_of(budget: float, rows: int, batch: int, count: int) -> float:
    """The noise multiplier, for which Opacus' search takes seconds."""
    return Privacy(delta=0.1 / rows, epsilon=budget, accountant="prv").noise(batch / rows, count)


def privacy_of(budget: Any, rows: int, batch: int, count: int) -> Privacy | None:
    if budget == "inf":
        return None
    noise = noise_of(budget, rows, batch, count)
    return Privacy(delta=0.1 / rows, noise_multiplier=noise, max_grad_norm=CUT, accountant="prv")


def model_of(strategy: str, seed: int) -> nn.Module:
    model = ftlib.unpad(ftlib.load_model("minilm", task="sequence-classification", num_labels=2, seed=seed))
    seeded = {"seed": seed} if strategy == "lora" else {}
    ftlib.tune(model, strategy, **STRATEGIES.get(strategy, {}), **seeded)
    return model


def each_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["vectors"]), batch["labels"], reduction="none")


def mean_loss(model: nn.Module, step: list[dict]) -> torch.Tensor:
    loss = sum((each_loss(model, batch).mean() for batch in step), torch.zeros(()))
    return loss if not step else (loss.backward(), loss.detach())[1]


def on_vectors(x: torch.Tensor, y: torch.Tensor, budget: Any, rate: float, seed: int, batch: int, count: int) -> Any:
    """A linear layer on vectors, x (rows, hidden), trained as `fit` trains; the layer and its epsilon."""
    torch.manual_seed(seed)
    layer, settings = nn.Linear(x.shape[1], 2), privacy_of(budget, len(x), batch, count)
    drawing = Private(settings or Privacy(delta=0.1 / len(x), noise_multiplier=0.0), len(x), batch, count, x.device)
    where = ([i for _, i in drawn] for drawn in drawing.places())
    mask = torch.ones(len(x), 1, dtype=torch.long)  # a vector is a token
    batches = (
        [{"input_ids": mask[i], "attention_mask": mask[i], "vectors": x[i], "labels": y[i]}] if i else [] for i in where
    )
    records = steps(
        layer, batches, torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.0), total=count,
        gradient=drawing.gradient(each_loss) if settings else mean_loss, max_grad_norm=None if settings else 1.0,
        schedule=partial(schedule_factor, warmup=max(count // 10, 1)),
    )  # fmt: skip
    drawing.take(len([*records]))
    return layer, drawing.spent() if settings else None


def trained(strategy: str, budget: Any, rate: float, seed: int, places: list[int], size: tuple) -> tuple[Any, Any, Any]:
    """Trains on these training rows: the model, its epsilon, its seconds."""
    rows, (batch, count) = [rows_of("train")[i] for i in places], size
    batch = min(batch, len(rows))
    if strategy.startswith("vectors"):
        x = vectors_of("train")[places]
        made = timed(lambda: on_vectors(x, labels_of(rows), budget, rate, seed, batch, count), "run")
        return *made["run"], made["seconds"]
    model = model_of(strategy, seed)
    config = ftlib.TrainConfig(
        max_steps=count, batch_size=batch, micro_batch_size=64, learning_rate=rate, seed=seed, progress=False,
        privacy=privacy_of(budget, len(rows), batch, count), weight_decay=0.0,
    )  # fmt: skip
    run = ftlib.fit(model, rows, config=config)
    return model, run.epsilon, run.seconds


def log_odds(model: Any, split: str, places: Any) -> torch.Tensor:
    """How much likelier the model finds the label of each of these rows than the other one, in nats, (rows,)."""
    rows = [rows_of(split)[i] for i in places]
    if isinstance(model, nn.Linear):
        with torch.no_grad():
            logits = model(vectors_of(split)[[*places]])  # (rows, 2)
    else:
        logits = torch.from_numpy(ftlib.predict(model, rows, output="logits"))
    labels = labels_of(rows)[:, None]
    return (logits.gather(1, labels) - logits.gather(1, 1 - labels))[:, 0]


def measured(strategy: str, budget: Any, rate: float, seed: int, split: str) -> dict[str, Any]:
    size = SIZES.get(strategy, SIZES[""])
    model, epsilon, seconds = trained(strategy, budget, rate, seed, [*range(len(rows_of("train")))], size)
    found = {split: float((log_odds(model, split, range(len(rows_of(split)))) > 0).float().mean())}
    found |= {"epsilon": epsilon, "seconds": seconds}
    if split != "test":
        return found
    seen, unseen = (log_odds(model, name, range(len(rows_of("test")))) for name in ("train", "test"))
    members = [1] * len(seen) + [0] * len(unseen)
    moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found | {"attack_auc": float(roc_auc_score(members, torch.cat((seen, unseen)))), "trainable": moving}


# ------------------------------------------------------------------------------------------------- the attacks


def half(number: int, pool: int) -> list[int]:
    """The members of a shadow model's training set."""
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(number)).tolist()
    return sorted(order[: pool // 2])


def shadow(strategy: str, budget: Any, number: int, rate: float) -> dict[str, Any]:
    _, pool, *size = SHADOWS[strategy]
    model, epsilon, _ = trained(strategy, budget, rate, number, half(number, pool), tuple(size))
    odds = " ".join(f"{x:.2f}" for x in log_odds(model, "train", range(pool)).tolist())
    return {"log_odds": odds, "epsilon": epsilon}


def lira(odds: np.ndarray, inside: np.ndarray, target: int) -> np.ndarray:
    """log p(in) - log p(out) of each sentence for one model, the others being shadows; both (models, sentences).

    A normal distribution each, with a mean of its own and, as the shadows are few, one width for all.
    """
    others, member = np.delete(odds, target, 0), np.delete(inside, target, 0)
    means = [np.ma.masked_array(others, mask=away).mean(0) for away in (~member, member)]
    known = ~np.logical_or(*map(np.ma.getmaskarray, means))  # with shadows of either kind
    with_it, without = (mean.filled(0.0) for mean in means)
    width = np.where(member, others - with_it, others - without).std()
    score = norm.logpdf(odds[target], with_it, width) - norm.logpdf(odds[target], without, width)
    return np.where(known, score, 0.0)


def found_by(scores: np.ndarray, members: np.ndarray) -> dict[str, float]:
    false, true, _ = roc_curve(members, scores)
    return {"auc": float(roc_auc_score(members, scores)), "found_at_1": float(true[false <= 0.01].max())}


def attacks(odds: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
    """Means over all models as targets, and each one's AUC."""
    ways = {"threshold": lambda t: odds[t], "lira": lambda t: lira(odds, inside, t)}
    found = {way: [found_by(score(t), inside[t]) for t in range(len(odds))] for way, score in ways.items()}
    means = {way: {name: float(np.mean([one[name] for one in own])) for name in own[0]} for way, own in found.items()}
    return means | {"each": {way: [round(one["auc"], 4) for one in own] for way, own in found.items()}}


def attacked(table: Table, strategy: str, budget: Any) -> None:
    """All shadows of one strategy and budget, then the attacks."""
    models, pool, batch, count = SHADOWS[strategy]
    rate = searched(table, strategy, budget != "inf")
    key = {"part": "shadow", "strategy": strategy, "budget": budget, "rate": rate, "steps": count}

    def measure() -> dict[str, Any]:
        if strategy == "vectors":  # of which there are many, and which are quick
            rows = [shadow(strategy, budget, number, rate) for number in range(models)]
        else:
            rows = [table.row(key | {"number": n}, partial(shadow, strategy, budget, n, rate)) for n in range(models)]
        odds = np.array([[float(x) for x in row["log_odds"].split()] for row in rows])
        inside = np.array([np.isin(np.arange(pool), half(number, pool)) for number in range(models)])
        return attacks(odds, inside) | {"epsilon": rows[0]["epsilon"]}

    table.row(key | {"part": "attack", "models": models, "sentences": pool, "batch": batch}, measure)


# --------------------------------------------------------------------------------------------------- the speed


def work(name: str, strategy: str) -> Any:
    """A private step by ftlib or by Opacus, as a function: {"seconds": ...}."""
    from ftlib.methods.privacy import private_gradient

    rows = rows_of("train")[:STEP_ROWS]
    model, batch = ftlib.repad(model_of(strategy, 0)), collate(rows)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(len(rows), -1)  # for Opacus a row each
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if name == "ftlib":
        loss = partial(nn.functional.cross_entropy, reduction="none")
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
            **({"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}),
        )  # fmt: skip
        private, optimizer = made[0], made[1]
        criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

        def step() -> None:
            optimizer.zero_grad()
            criterion(private(**inputs).logits, batch["labels"]).backward()
            optimizer.step()

    return lambda: timed(step, "nothing")


WAYS = ("ftlib", "opacus", "opacus, ghost")


def peak(name: str, strategy: str, count: str) -> dict[str, float]:
    globals()["STEP_ROWS"] = int(count)
    torch.set_num_threads(1)
    step = work(name, strategy)
    step()
    with ftlib.measure() as cost:
        step()
    return {"peak_mb": cost.peak_mb}


def speed(strategy: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = run_rounds({name: work(name, strategy) for name in WAYS}, ROUNDS)
    seconds = {name: [one["seconds"] for one in own[1:]] for name, own in found.items()}
    ratios = {name: [a / b for a, b in zip(own, seconds["ftlib"], strict=True)] for name, own in seconds.items()}
    return [
        {"method": name, "seconds_a_step": spread(seconds[name]), "against_ftlib": spread(ratios[name])}
        | {"rows": STEP_ROWS, "threads": 1} | alone(__file__, "--one", name, strategy, str(STEP_ROWS))
        for name in WAYS
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the grid


def searched(table: Table, strategy: str, private: bool) -> float:
    budget = SEARCHED if private else "inf"
    key = {"part": "search", "strategy": strategy, "budget": budget, "seed": SEARCH_SEED}
    trial = lambda rate: measured(strategy, budget, rate, SEARCH_SEED, "validation")  # noqa: E731
    return table.best_rate(key, RATES[strategy], trial, lambda row: row["validation"])


def tested(table: Table, strategy: str, budget: Any, seed: int) -> None:
    rate, (batch, count) = searched(table, strategy, budget != "inf"), SIZES.get(strategy, SIZES[""])
    key = {"part": "accuracy", "strategy": strategy, "budget": budget, "seed": seed, "rate": rate}
    table.row(key | {"batch": batch, "steps": count}, partial(measured, strategy, budget, rate, seed, "test"))


def jobs() -> list[Job]:
    """All rates, the dearest first; then a seed after the other; the shadows last."""
    name = lambda strategy, private: f"{strategy} {'private' if private else 'inf'}"  # noqa: E731
    both = [*itertools.product([*STRATEGIES][::-1], (True, False))]
    found = [Job(name(*one), (searched, *one)) for one in both]
    for seed, strategy in itertools.product(SEEDS, [*STRATEGIES][::-1]):
        for budget in BUDGETS[strategy]:
            call = (tested, strategy, budget, seed)
            found.append(Job(f"{strategy} {budget} {seed}", call, name(strategy, budget != "inf")))
    for strategy, budget in itertools.product(SHADOWS, (SEARCHED, "inf")):
        call = (attacked, strategy, budget)
        found.append(Job(f"shadows {strategy} {budget}", call, name(strategy, budget != "inf")))
    return found


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(peak(*sys.argv[2:])))
        return
    table = started(globals(), ABOUT)
    side_by_side(table, jobs(), workers=0 if SEEDS == TOY["SEEDS"] else 2)
    for strategy in TIMED:
        if not any(row["part"] == "speed" and row["strategy"] == strategy for row in table.content["rows"]):
            table.replace({"part": "speed", "strategy": strategy}, speed(strategy))


if __name__ == "__main__":
    main()
