"""Results of notebook 07b: MiniLM reads answers out of paragraphs of SQuAD 2.0, finds them first; SmolLM2 as chat.

    python tests/benchmarks/answers.py    # writes results/answers.json; resumes

Parts
- retrieval: how often the right one of all test paragraphs is among the first k, by features and by TF-IDF.
- rates: two ways of training, on "answerable" questions and on "all"; seed 0, loss of validation windows.
- reader: the best rate, seeds.  A threshold for "no answer" is chosen on validation questions, F1 is of mixed test
  questions; by_score_*: a threshold on the best answer's probability; curve: F1 when so many of the surest questions
  are answered, from none to all in 24 parts.  always_*: every question is answered; gold_*: the answerable ones alone;
  <way>_k_*: the same, but the k nearest of all test paragraphs are read; chat_*: those that SmolLM2 is asked too.
- prompts, chat: SmolLM2 is asked without training; the prompt is chosen on validation questions.
- longer: the same with more steps, one seed.

The seed changes the order of the questions, dropout and the first weights of the head.
"""

import math
from typing import Any

import numpy as np
import torch
from record import started, subset
from sklearn.feature_extraction.text import TfidfVectorizer

import ftlib
from ftlib.core.device import choose_device, choose_precision

WAYS = ("answerable", "all")
SEEDS = (0, 1, 2, 3, 4)
RATES = (2e-4, 4e-4, 8e-4)  # at first
TRIED, STEPS, LONGER = 96, 192, (768,)  # steps of 16
VALIDATION, TEST, CHAT = 300, 600, 48  # questions; of CHAT so many with an answer and so many without
NEAREST = (("features", 1), ("tf-idf", 1), ("tf-idf", 3))
NEW_TOKENS = 24
PROMPTS = {
    "bare": "{context}\n\nQuestion: {question}",
    "copy": "{context}\n\nQuestion: {question}\nAnswer with a few words copied from the text, and nothing else.",
    "refuse": "{context}\n\nQuestion: {question}\nAnswer with a few words copied from the text, and nothing else. "
              "If the text does not say it, answer: unanswerable.",
}  # fmt: skip
TOY = {"SEEDS": (0,), "RATES": (4e-4,), "TRIED": 1, "STEPS": 2, "LONGER": (3,), "VALIDATION": 6, "TEST": 8, "CHAT": 2,
       "NEW_TOKENS": 2}  # fmt: skip


def answerable(rows: Any) -> Any:
    return rows.select([i for i, own in enumerate(rows["answers"]) if own["text"]])


def margins(found: list[dict]) -> np.ndarray:
    """How much no answer counts above the best stretch, as `predict`'s `no_answer` is compared with."""
    return np.array([math.log(max(one["no_answer_score"], 1e-300) / max(one["score"], 1e-300)) for one in found])


DOUBTS = {"": margins, "by_score_": lambda found: -np.array([one["score"] for one in found])}


def right(found: list[dict], answers: Any) -> tuple[np.ndarray, np.ndarray]:
    """F1 of every question if it is answered, and if it is not."""
    said = [ftlib.metrics.squad([one], [own])["f1"] for one, own in zip(found, answers, strict=True)]
    return np.array(said), np.array([float(not own["text"]) for own in answers])


def by_share(doubts: np.ndarray, said: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """F1 (questions + 1,) when the 0, 1, 2, ... questions of the least doubt are answered and the others are not."""
    order = np.argsort(doubts, kind="stable")
    return np.concatenate([[empty.sum()], empty.sum() + np.cumsum((said - empty)[order])]) / len(order)


def best_threshold(doubts: np.ndarray, said: np.ndarray, empty: np.ndarray) -> float:
    """The doubt up to which to answer, for the largest F1."""
    values, answered = np.sort(doubts), int(by_share(doubts, said, empty).argmax())
    return float([values[0] - 1, *(values[1:] + values[:-1]) / 2, values[-1] + 1][answered])


def holding(found: list[str], rows: list[dict]) -> dict[str, float]:
    """Over answerable questions: the share whose answer holds a right one as a part, and the mean of its words."""
    pairs = [(text.lower(), row["answers"]["text"]) for text, row in zip(found, rows, strict=True)]
    pairs = [(text, wanted) for text, wanted in pairs if wanted]
    holds = [any(own.lower() in text for own in wanted) for text, wanted in pairs]
    return {"holds": float(np.mean(holds)), "words": float(np.mean([len(text.split()) for text, _ in pairs]))}


def recall(similar: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Share of questions whose paragraph is among the first k; similar (questions, paragraphs)."""
    rank = (similar > similar[np.arange(len(right)), right][:, None]).sum(1)  # paragraphs before the right one
    return {f"recall_{k}": float((rank < k).mean()) for k in (1, 3, 5, 10)}


class Work:
    def __init__(self) -> None:
        self.data, self.tokenizer = ftlib.load_corpus("squad-v2"), ftlib.load_tokenizer("minilm")
        self.validation, self.test = subset(self.data["validation"], VALIDATION), subset(self.data["test"], TEST)
        self.paragraphs = sorted(set(self.data["test"]["context"]))
        self.gold = answerable(self.test)
        with_answer, without = answerable(self.test), self.test.filter(lambda row: not row["answers"]["text"])
        self.asked = [*list(with_answer)[:CHAT], *list(without)[:CHAT]]
        self.rows: dict[str, Any] = {}
        self.language_model: Any = None
        self.similar: dict[str, np.ndarray] = {}

    def windows(self, split: str, way: str) -> Any:
        if (split, way) not in self.rows:
            rows = self.data["train"] if split == "train" else self.validation
            rows = answerable(rows) if way == "answerable" else rows
            self.rows[split, way] = ftlib.tokenize(rows, self.tokenizer, task="question-answering")
        return self.rows[split, way]

    def similarity(self, way: str, questions: list[str]) -> np.ndarray:
        """(questions, test paragraphs)"""
        if way == "features":
            x, y = (ftlib.extract_features("minilm", texts) for texts in (questions, self.paragraphs))
            return x @ y.T
        vectors = TfidfVectorizer(ngram_range=(1, 2), stop_words="english", sublinear_tf=True).fit(self.paragraphs)
        return (vectors.transform(questions) @ vectors.transform(self.paragraphs).T).toarray()

    def retrieval(self, way: str) -> dict[str, float]:
        rows = answerable(self.data["test"])
        right = np.array([self.paragraphs.index(text) for text in rows["context"]])
        found = recall(self.similarity(way, list(rows["question"])), right)
        return found | {"questions": len(rows), "paragraphs": len(self.paragraphs)}

    def trained(self, way: str, rate: float, steps: int, seed: int) -> tuple[Any, dict[str, float]]:
        model = ftlib.unpad(ftlib.load_model("minilm", task="question-answering", seed=seed).to(choose_device()))
        sizes = dict(max_steps=steps, batch_size=16, micro_batch_size=8)
        config = ftlib.TrainConfig(**sizes, learning_rate=rate, seed=seed, progress=False)
        run = ftlib.fit(model, self.windows("train", way), tokenizer=self.tokenizer, config=config)
        loss = float(np.mean([record["loss"] for record in run.history[-16:]]))
        return model, {"training_loss": loss, "seconds": run.seconds, "precision": run.precision}

    def tried(self, way: str, rate: float, steps: int) -> dict[str, float]:
        model, about = self.trained(way, rate, steps, seed=0)
        found = ftlib.evaluate(model, self.windows("validation", way), tokenizer=self.tokenizer)
        return about | {name: found[name] for name in ("loss", "span_f1")}

    def asking(self, model: Any, rows: Any) -> list[dict]:
        table = [{"question": row["question"], "context": row["context"]} for row in rows]
        return ftlib.predict(model, table, tokenizer=self.tokenizer, no_answer=math.inf)

    def read(self, way: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
        model, row = self.trained(way, rate, steps, seed)
        wanted, known = list(self.test["answers"]), list(self.validation["answers"])
        found, found_known = self.asking(model, self.test), self.asking(model, self.validation)
        for name, doubts in DOUBTS.items():
            threshold, own = best_threshold(doubts(found_known), *right(found_known, known)), doubts(found)
            answers = [one["answer"] if doubt <= threshold else "" for one, doubt in zip(found, own, strict=True)]
            row |= {name + score: value for score, value in ftlib.metrics.squad(answers, wanted).items()}
            row |= {f"{name}threshold": threshold, f"{name}answered": len(answers) - answers.count("")}
            places = np.linspace(0, len(found), 25).round().astype(int)
            row[f"{name}curve"] = by_share(own, *right(found, wanted))[places].round(4).tolist()
        row |= self._scored("always", found, wanted)
        gold = [i for i, own in enumerate(wanted) if own["text"]]
        row |= self._scored("gold", [found[i] for i in gold], self.gold["answers"])
        asked = [found[i] for i in gold[:CHAT]]
        row |= self._scored("chat", asked, self.gold["answers"][:CHAT])
        row |= {f"chat_{n}": v for n, v in holding([o["answer"] for o in asked], list(self.gold)[:CHAT]).items()}
        for by, k in NEAREST if way == "answerable" else ():
            row |= self._scored(f"{by}_{k}", self.asking(model, self._found(by, k)), self.gold["answers"])
        return row

    def _scored(self, name: str, found: list, wanted: Any) -> dict[str, float]:
        scores = ftlib.metrics.squad(found, list(wanted))
        return {f"{name}_{score}": scores[score] for score in ("exact_match", "f1")}

    def _found(self, by: str, k: int) -> list[dict]:
        """The answerable test questions, each with the k nearest of all test paragraphs as its context."""
        if by not in self.similar:
            self.similar[by] = self.similarity(by, list(self.gold["question"]))
        nearest = np.argsort(-self.similar[by], axis=1, kind="stable")[:, :k]
        joined = ["\n\n".join(self.paragraphs[i] for i in own) for own in nearest]
        return [{**row, "context": context} for row, context in zip(self.gold, joined, strict=True)]

    def chat(self, rows: list[dict], prompt: str) -> dict[str, float]:
        if self.language_model is None:
            self.language_model = ftlib.load_model("smollm2", task="causal-lm").to(choose_device())
        device = choose_device()
        half = torch.autocast(device.type, torch.bfloat16) if choose_precision(device)[0] == "bf16" else None
        talks = [[{"role": "user", "content": PROMPTS[prompt].format(**row)}] for row in rows]
        options = dict(tokenizer=ftlib.load_tokenizer("smollm2"), max_new_tokens=NEW_TOKENS, autocast=half)
        found = ftlib.generate(self.language_model, talks, **options, batch_size=12)
        found = ["" if "unanswerable" in text.lower() else text for text in found]
        scores = ftlib.metrics.squad(found, [row["answers"] for row in rows])
        return scores | holding(found, rows) | {"empty": found.count("")}


def main() -> None:
    table = started(globals(), "MiniLM and SmolLM2-135M, questions of SQuAD 2.0's development set, split by article")
    work = Work()
    for way in ("features", "tf-idf"):
        table.row({"part": "retrieval", "way": way}, lambda way=way: work.retrieval(way))
    rates = {
        way: table.best_rate({"part": "rates", "way": way, "steps": TRIED}, RATES,
                             lambda rate, way=way: work.tried(way, rate, TRIED), lambda row: -row["loss"])
        for way in WAYS
    }  # fmt: skip

    def read(part: str, way: str, steps: int, seed: int) -> None:
        key = {"way": way, "rate": rates[way], "steps": steps, "seed": seed}
        table.row({"part": part, **key}, lambda: work.read(**key))

    for way in WAYS:
        read("reader", way, STEPS, SEEDS[0])
    known = list(answerable(work.validation))[: CHAT // 2]
    tried = [table.row({"part": "prompts", "prompt": p}, lambda p=p: work.chat(known, p)) for p in PROMPTS]
    best = max(tried, key=lambda row: row["f1"])["prompt"]
    for prompt in dict.fromkeys((best, "refuse")):
        table.row({"part": "chat", "prompt": prompt}, lambda prompt=prompt: work.chat(work.asked, prompt))
    work.language_model = None
    for seed in SEEDS[1:]:
        for way in WAYS:
            read("reader", way, STEPS, seed)
    for steps in LONGER:
        for way in WAYS:
            read("longer", way, steps, SEEDS[0])


if __name__ == "__main__":
    main()
