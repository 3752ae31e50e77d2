"""Preferences and rewards on SmolLM2-135M-Instruct: DPO, fine-tuning on the chosen, GRPO on a reward with a hole.

    python tests/benchmarks/preferences.py    # rows of results/preferences.json; goes on where it stopped

The model is to answer a bank's customers (questions of banking77, 4 to 16 words long) shortly.  Answers are drawn at
temperature 0.7, 48 tokens at most.  Parts:

answers     four answers to each of 96 training and 32 validation questions.  A pair is the shortest and the longest of
            those that came to their end, where they are 5 words apart or more.
search      three learning rates for each method: the loss of the validation pairs after STEPS steps, seed 0.
            Fine-tuning does best at RATE; DPO's loss falls with the rate, knowing nothing of what is lost: RATE too.
preference  training on 64 pairs, 8 a step, by DPO at three betas and by fine-tuning on the chosen answers; and the
            model as it is, asked as always, and asked for eight words.  Then answers to 32 test questions: their words,
            whether they share a long word with the question, their KL to the model as it was (its log-probability
            less the reference's, at the temperature of the draws); bits per byte of 20 film reviews (imdb, 96 tokens).
reward      GRPO, 8 answers of 24 tokens to each of 2 questions a step.  The reward "count" is how many polite words an
            answer has; "once" is what was meant, see `once`.  Both are recorded in every run.

LoRA of rank 8 on all linear layers, AdamW without decay, a linear schedule (for GRPO a constant rate).  A seed is that
of LoRA's first weights, of the order of the pairs or questions, and of the draws.  CPU, bf16 where it pays.
"""

import argparse
import os
import random
import re
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch starts
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from record import RESULTS, Table

import ftlib
from ftlib.core.batches import collate
from ftlib.core.device import choose_precision, computing
from ftlib.methods import preferences
from ftlib.methods.token_losses import sequence_log_probs

SYSTEM = "You are the friendly and polite help desk of a bank. Answer in one short sentence."
ASKED = SYSTEM + " Use at most eight words."
TEMPERATURE, LENGTH, ROLLOUT = 0.7, 48, 24
PAIRS, PAIRS_A_STEP, STEPS, REWARD_STEPS = 64, 8, 12, 12
BETAS, RATES, SEEDS = (0.02, 0.1, 0.5), (3e-4, 1e-3, 3e-3), (0, 1, 2)
RATE = 1e-3
POLITE = re.compile(r"\b(sorry|please|thanks?|happy|glad|welcome)\b", re.IGNORECASE)

tokenizer = ftlib.load_tokenizer("smollm2")
autocast = computing(torch.device("cpu"), choose_precision(torch.device("cpu"))[0])


def questions(split: str, count: int) -> list[str]:
    texts = [text for text in ftlib.load_corpus("banking77")[split]["text"] if 4 <= len(text.split()) <= 16]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[i] for i in order[:count]]


def ask(question: str, system: str = SYSTEM) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def words(text: str) -> int:
    return len(text.split())


def on_topic(question: str, answer: str) -> bool:
    """Whether a word of the question, of five letters or more, stands in the answer."""
    return bool(set(re.findall(r"[a-z]{5,}", question.lower())) & set(re.findall(r"[a-z]{5,}", answer.lower())))


def count(text: str) -> float:
    return float(len(POLITE.findall(text)))


def once(text: str) -> float:
    """One polite word, in 4 to 20 words."""
    return float(count(text) == 1 and 4 <= words(text) <= 20)


def fresh(seed: int) -> Any:
    model = ftlib.load_model("smollm2", task="causal-lm")
    ftlib.tune(model, "lora", targets="all-linear", seed=seed)
    return ftlib.unpad(model)


def adamw(model: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def drawn(model: Any, prompts: list, length: int, seed: int) -> list[list[int]]:
    return ftlib.generate(
        model, prompts, tokenizer=tokenizer, max_new_tokens=length, batch_size=64, temperature=TEMPERATURE, seed=seed,
        autocast=autocast(), tokens=True,
    )  # fmt: skip


def text(ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------------ the pairs


def answers(split: str, number: int, each: int = 4) -> dict[str, Any]:
    asked = questions(split, number)
    found = drawn(fresh(0), [ask(question) for question in asked for _ in range(each)], LENGTH, 0)
    both = [[text(ids), ids[-1] == tokenizer.eos_token_id] for ids in found]  # and whether it came to its end
    return {"questions": asked, "answers": [both[i * each : (i + 1) * each] for i in range(number)]}


def pairs_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for question, found in zip(row["questions"], row["answers"], strict=True):
        ended = sorted((answer for answer, end in found if end and answer.strip()), key=words)
        if ended and words(ended[-1]) - words(ended[0]) >= 5:
            said = [[{"role": "assistant", "content": ended[i]}] for i in (0, -1)]
            out.append({"prompt": ask(question), "chosen": said[0], "rejected": said[1]})
    return out


def batches(pairs: list, seed: int) -> Iterator[list]:
    order, draw = list(range(len(pairs))), random.Random(seed)
    while True:
        draw.shuffle(order)
        for i in range(0, len(order) - PAIRS_A_STEP + 1, PAIRS_A_STEP):
            yield [preferences.preference_batch([pairs[j] for j in order[i : i + PAIRS_A_STEP]])]


def imitate(model: Any, step: list) -> torch.Tensor:
    """Supervised fine-tuning on the chosen answers of the same batches, a mean over their tokens."""
    (batch,) = step
    half = {name: value.chunk(2)[0] for name, value in batch.items() if name != "reference"}
    with autocast():
        loss = -sequence_log_probs(model, half).sum() / (half["labels"] != -100).sum()
    loss.backward()
    return loss.detach()


def gains(model: Any, pairs: list) -> tuple[torch.Tensor, torch.Tensor]:
    """How much log-probability chosen and rejected answers gained against the reference, (pairs,) each."""
    batch = preferences.preference_batch(pairs)
    reference = batch.pop("reference")
    model.eval()
    with torch.no_grad(), autocast():
        return (sequence_log_probs(model, batch) - reference).chunk(2)


def trained(method: str, beta: float, rate: float, seed: int, rows: list[list]) -> tuple[Any, dict[str, Any]]:
    """The model after STEPS steps, and what was seen in each and of the validation pairs at the end."""
    model, (train, validation) = fresh(seed), rows
    gradient = preferences.dpo(beta, autocast=autocast) if method == "dpo" else imitate
    curve, start = [], time.perf_counter()
    schedule = partial(ftlib.schedule_factor, warmup=2)
    optimizer = adamw(model, rate)
    for record in ftlib.steps(
        model, batches(train, seed), optimizer, total=STEPS, gradient=gradient, schedule=schedule
    ):
        curve.append({"loss": record["loss"]} | getattr(gradient, "last", {}))
    seconds = time.perf_counter() - start
    chosen, rejected = gains(model, validation)
    margin = chosen - rejected
    tokens = sum(sum(label != -100 for label in pair["chosen"]["labels"]) for pair in validation)
    losses = {
        "dpo": -torch.nn.functional.logsigmoid(beta * margin).mean().item(),
        "sft": -(sum(pair["chosen"]["reference"] for pair in validation) + chosen.sum().item()) / tokens,
    }
    found = {"margin": margin.mean(), "accuracy": (margin > 0).float().mean(), "chosen": chosen.mean()}
    found = {name: value.item() for name, value in found.items()} | {"rejected": rejected.mean().item()}
    return model, {"loss": losses[method], "seconds": seconds, "validation": found, "curve": curve}


def tested(model: Any, seed: int, system: str = SYSTEM) -> dict[str, Any]:
    """Answers to the test questions, and what was lost."""
    asked = questions("test", 32)
    found = drawn(model, [ask(question, system) for question in asked], LENGTH, 1000 + seed)
    said = [text(ids) for ids in found]
    kl = torch.zeros(len(asked))
    if system == SYSTEM:
        before = [ftlib.tasks.language_modeling.prompt_ids(tokenizer, ask(question), "") for question in asked]
        rows = [{"input_ids": a + b, "labels": [-100] * len(a) + b} for a, b in zip(before, found, strict=True)]
        batch = collate(rows)
        with torch.no_grad(), autocast():
            own = preferences.label_log_probs(model, batch, TEMPERATURE).sum(1)
            with preferences.without_adapters(model):
                kl = own - preferences.label_log_probs(model, batch, TEMPERATURE).sum(1)
    films = [{"text": review} for review in ftlib.load_corpus("imdb")["test"]["text"][:40:2]]
    other = ftlib.evaluate(
        model, ftlib.tokenize(films, tokenizer, task="causal-lm", max_length=96), tokenizer=tokenizer
    )
    return {
        "words": [words(one) for one in said],
        "kl": [round(value, 3) for value in kl.tolist()],
        "on_topic": [on_topic(q, a) for q, a in zip(asked, said, strict=True)],
        "bits_per_byte": other["bits_per_byte"],
        "examples": list(zip(asked[:6], said[:6], strict=True)),
    }


def untrained(system: str, seed: int) -> dict[str, Any]:
    return tested(fresh(seed), seed, system)


def preferred(method: str, beta: float, rate: float, seed: int, rows: list[list]) -> dict[str, Any]:
    model, found = trained(method, beta, rate, seed, rows)
    return found | tested(model, seed)


# ----------------------------------------------------------------------------------------------------------- the reward


def rewarded(name: str, beta: float, seed: int) -> dict[str, Any]:
    """GRPO on this reward; what was seen in every step, the KL in every fourth and the last."""
    model, reward = fresh(seed), {"count": count, "once": once}[name]
    asked = questions("train", 400)
    random.Random(seed).shuffle(asked)
    seen: list[dict[str, Any]] = []
    spent = {"drawing": 0.0, "training": 0.0}
    common = dict(temperature=TEMPERATURE, autocast=autocast, reference=preferences.without_adapters)
    ways = [preferences.grpo(beta=b, **common) for b in (beta, beta or 1e-9)]  # the second looks at the KL

    def rolled() -> Iterator[list]:
        for number in range(REWARD_STEPS):
            said: list[tuple[str, str]] = []

            def heard(prompt: list, answer: str, said: list = said) -> float:
                said.append((prompt[1]["content"], answer))
                return reward(answer)

            draw = partial(drawn, length=ROLLOUT, seed=1000 * (seed + 1) + number)
            start = time.perf_counter()
            prompts = [ask(question) for question in asked[2 * number : 2 * number + 2]]
            step = preferences.rollouts(model, prompts, heard, generate=draw, tokenizer=tokenizer)
            spent["drawing"] += time.perf_counter() - start
            texts = [answer for _, answer in said]
            means = {"count": map(count, texts), "once": map(once, texts), "words": map(words, texts)}
            means |= {"on_topic": (on_topic(*one) for one in said)}
            seen.append({key: statistics.fmean(values) for key, values in means.items()})
            seen[-1] |= {"distinct": len(set(texts)) / len(texts), "example": texts[0]}
            yield step

    def gradient(model: Any, step: list) -> torch.Tensor:
        start, look = time.perf_counter(), len(seen) % 4 == 1 or len(seen) == REWARD_STEPS
        loss = ways[look](model, step)
        spent["training"] += time.perf_counter() - start
        seen[-1]["kl"] = ways[look].last["kl"] if look else None
        return loss

    schedule = partial(ftlib.schedule_factor, schedule="constant")
    for _ in ftlib.steps(model, rolled(), adamw(model, RATE), total=REWARD_STEPS, gradient=gradient, schedule=schedule):
        pass
    return {"curve": seen} | spent


# ---------------------------------------------------------------------------------------------------------------- parts

PARTS = ("answers", "search", "preference", "reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    about = "Preferences and rewards, SmolLM2-135M-Instruct; questions of banking77 (Casanueva et al. 2020, CC BY 4.0)"
    table = Table("preferences", "python tests/benchmarks/preferences.py", about, folder=options.results)
    parts = (("train", 96), ("validation", 32))
    stored = [table.row({"part": "answers", "split": s}, partial(answers, s, n)) for s, n in parts]
    train, validation = (preferences.preference_rows(pairs_of(row), tokenizer) for row in stored)
    rows = [train[:PAIRS], validation]
    if {"search", "preference"} & set(options.only):  # of the base: the same for all seeds
        rows = [preferences.reference_log_probs(fresh(0), part, autocast=autocast) for part in rows]
    for method in ("dpo", "sft") if "search" in options.only else ():
        for rate in RATES:
            measured = partial(trained, method, 0.1, rate, 0, rows)
            table.row({"part": "search", "method": method, "rate": rate}, lambda m=measured: m()[1])
    if "preference" in options.only:
        for seed in SEEDS:
            for way, system in (("none", SYSTEM), ("asked", ASKED)):
                key = {"part": "preference", "method": way, "beta": None, "rate": None, "seed": seed}
                table.row(key, partial(untrained, system, seed))
            for method, beta in (("sft", None), *(("dpo", beta) for beta in BETAS)):
                key = {"part": "preference", "method": method, "beta": beta, "rate": RATE, "seed": seed}
                table.row(key, partial(preferred, method, beta or 0.1, RATE, seed, rows))
    if "reward" in options.only:
        for seed in SEEDS:
            for name, beta in (("count", 0.0), ("count", 0.5), ("once", 0.0)):
                key = {"part": "reward", "reward": name, "beta": beta, "rate": RATE, "seed": seed}
                table.row(key, partial(rewarded, name, beta, seed))


if __name__ == "__main__":
    main()
