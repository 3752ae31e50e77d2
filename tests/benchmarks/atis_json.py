"""Results of notebook 08: SmolLM2 turns ATIS questions into JSON, by examples in the prompt or by LoRA, with seeds.

    python tests/benchmarks/atis_json.py    # writes results/atis_json.json; resumes

Parts
- prompts, rates: on validation questions, seed 0, 256 training questions: how many examples a prompt holds and which
  (the same for all questions, or the nearest to each), and LoRA's learning rate.  The best are used below.
- few-shot: the same examples for all; nearest: from so many training questions; copy: the nearest one's answer.
- lora: so many questions, so many steps; the same for 16, 64 and 256 questions, so that these differ in examples alone.
  longer: four times as many, one seed.  "general": bits a byte of film reviews, which no run trains on.

- tagger: MiniLM tags the words of so many questions, and the tags are read as slots; its rate is searched too.

The seed changes the choice and order of the training questions and what is added to the model.  Test: 60 questions.
"""

import itertools
import json
from typing import Any

import numpy as np
import torch
from record import started, subset
from sklearn.feature_extraction.text import TfidfVectorizer

import ftlib
from ftlib.core.device import choose_device, choose_precision

SYSTEM = {"role": "system", "content": "Answer with the slots of the question as JSON."}
SEEDS = (0, 1, 2)
PROMPTS = (("none", 0), ("same", 4), ("same", 8), ("same", 16), ("nearest", 2), ("nearest", 4), ("nearest", 8))
RATES = (1e-3, 3e-3, 1e-2)
RUNS = ((16, 64), (64, 64), (256, 64))  # training questions, steps of 4
LONGER = ((256, 256),)  # one seed
TAGGER_RATES = (2e-4, 6e-4, 2e-3)
TAGGER_STEPS = 256  # of 16
NEW_TOKENS = 96
VALIDATION, TEST, REVIEWS = 32, 60, 48  # rows
TOY = {"SEEDS": (0,), "PROMPTS": PROMPTS[1:6:4], "RATES": RATES[1:2], "RUNS": ((4, 2),), "LONGER": ((4, 3),),
       "NEW_TOKENS": 4, "TAGGER_RATES": TAGGER_RATES[1:2], "TAGGER_STEPS": 2,
       "VALIDATION": 2, "TEST": 2, "REVIEWS": 2}  # fmt: skip


def slots(row: dict, names: list[str]) -> dict[str, Any]:
    """{slot: its words}, a list where a slot is filled more than once."""
    found: dict[str, list[str]] = {}
    for word, tag in zip(row["tokens"], (names[tag] for tag in row["tags"]), strict=True):
        kind, _, slot = tag.partition("-")
        if kind == "B" or (kind == "I" and slot not in found):
            found.setdefault(slot, []).append(word)
        elif kind == "I":
            found[slot][-1] += f" {word}"
    return {slot: words if len(words) > 1 else words[0] for slot, words in found.items()}


def read(answer: str) -> dict | None:
    """The first JSON object in an answer, whatever stands around it; None without one."""
    try:
        found = json.JSONDecoder().raw_decode(answer, max(answer.find("{"), 0))[0]
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def pairs(found: dict | None) -> set[tuple[str, str]]:
    """{(slot, words), ...}, a pair for every one of a list."""
    listed = {slot: words if isinstance(words, list) else [words] for slot, words in (found or {}).items()}
    return {(slot, str(one)) for slot, words in listed.items() for one in words}


def scores(answers: list[str], wanted: list[dict]) -> dict[str, float]:
    """valid: a JSON object and nothing else; exact: all slots right; f1: of (slot, words), over all answers."""
    found = [read(answer) for answer in answers]
    hits = sum(len(pairs(a) & pairs(b)) for a, b in zip(found, wanted, strict=True))
    both = sum(len(pairs(one)) for one in (*found, *wanted))
    return {
        "valid": np.mean([whole(answer) for answer in answers]).item(),
        "exact": np.mean([a == b for a, b in zip(found, wanted, strict=True)]).item(),
        "f1": 2 * hits / both,
    }


def whole(answer: str) -> bool:
    try:
        return isinstance(json.loads(answer), dict)
    except ValueError:
        return False


class Work:
    def __init__(self) -> None:
        self.data, self.tokenizer = ftlib.load_corpus("atis"), ftlib.load_tokenizer("smollm2")
        self.names = self.data["train"].features["tags"].feature.names
        self.validation = subset(self.data["validation"], VALIDATION, 0)
        self.test = subset(self.data["test"], TEST, 0)
        reviews = subset(ftlib.load_corpus("imdb")["test"], 4 * REVIEWS, 0)
        rows = ftlib.tokenize([{"text": r["text"]} for r in reviews], self.tokenizer, task="causal-lm", max_length=128)
        # cut rows alone: a whole one ends in the end token, which is no text
        self.reviews = [row for row in rows if row["input_ids"][-1] != self.tokenizer.eos_token_id][:REVIEWS]
        self.half = choose_precision(choose_device())[0] == "bf16"
        self.plain = self.model()

    def model(self) -> Any:
        return ftlib.load_model("smollm2", task="causal-lm").to(choose_device())

    def autocast(self) -> Any:
        return torch.autocast(choose_device().type, torch.bfloat16) if self.half else None

    def turns(self, row: dict) -> list[dict]:
        """A question and its answer as a conversation."""
        answer = json.dumps(slots(row, self.names))
        return [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]

    def nearest(self, known: list[dict], rows: list[dict], k: int) -> list[list[dict]]:
        """The k nearest known questions to each, by TF-IDF of words and pairs of words, the nearest last."""
        vectors = TfidfVectorizer(ngram_range=(1, 2)).fit([row["text"] for row in known])
        x, y = (vectors.transform([row["text"] for row in part]) for part in (rows, known))
        return [[known[i] for i in np.argsort(line, kind="stable")[-k:]] for line in (x @ y.T).toarray()]

    def answered(self, model: Any, rows: list[dict], shots: list[list[dict]]) -> dict[str, float]:
        prompts = [
            [SYSTEM, *(turn for shot in own for turn in self.turns(shot)), self.turns(row)[0]]
            for row, own in zip(rows, shots, strict=True)
        ]
        options = dict(max_new_tokens=NEW_TOKENS, batch_size=20, autocast=self.autocast())
        answers = ftlib.generate(model, prompts, tokenizer=self.tokenizer, **options)
        return scores(answers, [slots(row, self.names) for row in rows])

    def prompted(self, rows: list[dict], way: str, k: int, count: int, seed: int) -> dict[str, float]:
        known = list(subset(self.data["train"], count, seed))
        shots = self.nearest(known, rows, k) if way == "nearest" else [known[:k]] * len(rows)
        return self.answered(self.plain, rows, shots)

    def copied(self, count: int, seed: int) -> dict[str, float]:
        near = self.nearest(list(subset(self.data["train"], count, seed)), self.test, 1)
        wanted = [slots(row, self.names) for row in self.test]
        return scores([json.dumps(slots(one, self.names)) for [one] in near], wanted)

    def general(self, model: Any) -> float:
        """Bits a byte of film reviews."""
        found = ftlib.evaluate(model, self.reviews, tokenizer=self.tokenizer, batch_size=16, autocast=self.autocast())
        return found["bits_per_byte"]

    def tuned(self, rows: list[dict], rate: float, count: int, steps: int, seed: int) -> dict[str, float]:
        known = [{"messages": [SYSTEM, *self.turns(row)]} for row in subset(self.data["train"], count, seed)]
        model = ftlib.unpad(self.model())
        ftlib.tune(model, "lora", rank=8, targets="all-linear", seed=seed)
        config = ftlib.TrainConfig(max_steps=steps, batch_size=4, learning_rate=rate, seed=seed, progress=False)
        data = ftlib.tokenize(known, self.tokenizer, task="causal-lm")
        run = ftlib.fit(model, data, tokenizer=self.tokenizer, config=config)
        found = self.answered(model, rows, [[]] * len(rows))
        return found | {"general": self.general(model), "seconds": run.seconds, "loss": run.history[-1]["loss"]}

    def tagged(self, rows: list[dict], rate: float, count: int, seed: int) -> dict[str, float]:
        known = [{"tokens": row["tokens"], "label": row["tags"]} for row in subset(self.data["train"], count, seed)]
        options = dict(task="token-classification", num_labels=len(self.names), seed=seed)
        model, tokenizer = ftlib.load_model("minilm", **options), ftlib.load_tokenizer("minilm")
        config = ftlib.TrainConfig(max_steps=TAGGER_STEPS, batch_size=16, learning_rate=rate, seed=seed, progress=False)
        run = ftlib.fit(ftlib.unpad(model), ftlib.tokenize(known, tokenizer), tokenizer=tokenizer, config=config)
        tags = ftlib.predict(model, [row["tokens"] for row in rows], tokenizer=tokenizer)
        found = [slots({**row, "tags": own}, self.names) for row, own in zip(rows, tags, strict=True)]
        wanted = [slots(row, self.names) for row in rows]
        return scores(list(map(json.dumps, found)), wanted) | {"seconds": run.seconds, "loss": run.history[-1]["loss"]}


def main() -> None:
    table = started(globals(), "SmolLM2-135M, ATIS questions to JSON slots")
    work, most = Work(), RUNS[-1][0]

    def best(part: str, settings: list[dict], measure: Any) -> dict:
        tried = [table.row({"part": part, **one}, lambda one=one: measure(work.validation, **one)) for one in settings]
        return max(tried, key=lambda row: row["f1"])

    tries = [{"way": way, "k": k, "count": most, "seed": 0} for way, k in PROMPTS]
    same, nearest = (best("prompts", [t for t in tries if t["way"] in ways], work.prompted)["k"]
                     for ways in (("none", "same"), ("nearest",)))  # fmt: skip
    start = {"count": most, "steps": RUNS[-1][1], "seed": 0}
    lora_rate = best("rates", [{"rate": rate, **start} for rate in RATES], work.tuned)["rate"]
    table.row({"part": "general", "way": "untrained"}, lambda: {"general": work.general(work.plain)})
    for count, steps in RUNS:
        for seed in SEEDS:
            own = {"count": count, "seed": seed}
            table.row({"part": "lora", "rate": lora_rate, "steps": steps, **own},
                      lambda own=own, steps=steps: work.tuned(work.test, lora_rate, steps=steps, **own))  # fmt: skip
            key = {"way": "nearest", "k": nearest, **own}
            table.row({"part": "nearest", **key}, lambda key=key: work.prompted(work.test, **key))
            table.row({"part": "copy", **own}, lambda own=own: work.copied(**own))
            key = {"way": "same", "k": same, "count": same, "seed": seed}
            table.row({"part": "few-shot", **key}, lambda key=key: work.prompted(work.test, **key))
    start = {"count": most, "seed": 0}
    rate = best("tagger rates", [{"rate": rate, **start} for rate in TAGGER_RATES], work.tagged)["rate"]
    for (count, _), seed in itertools.product(RUNS, SEEDS):
        own = {"rate": rate, "count": count, "seed": seed}
        table.row({"part": "tagger", **own}, lambda own=own: work.tagged(work.test, **own))
    for count, steps in LONGER:
        own = {"rate": lora_rate, "count": count, "steps": steps, "seed": SEEDS[0]}
        table.row({"part": "longer", **own}, lambda own=own: work.tuned(work.test, **own))


if __name__ == "__main__":
    main()
