"""Results of notebook 07: entities, parts of speech and relations with MiniLM, against baselines, with seeds.

    python tests/benchmarks/tagging.py    # writes results/tagging.json; resumes

Parts
- dictionary: every run of words that was an entity in training is one, the longest first.
- tagger rates, tagger: tags of BC5CDR from so many abstracts, ways of training: "first" (labels on the first piece of
  each word), "all" (on all its pieces), "crf" (a CRF on the first pieces).  Each has its own rate, from validation
  abstracts with seed 0; all make the same updates.  A row holds the F1 of plain tags, of constrained ones, and by type.
- whole: "first", from all training abstracts.
- counts: same sentence, and six counts with logistic regression, for chemical-induced diseases.
- relation rates, relations: MiniLM on the sentences of a pair with entity markers, ways as in `RELATIONS`, one more at
  a time.  "both": its probability and the six counts, joined by logistic regression on the validation abstracts.
- words, pos rates, pos: parts of speech of oanc-pos: each word's most frequent tag, and MiniLM.

The seed changes which abstracts or sentences are taken, their order, and what is new in the model.
"""

import itertools
import re
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
from record import started, subset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ftlib
from ftlib.core.batches import IGNORE
from ftlib.engine.entities import entities
from ftlib.methods.losses import class_weights
from ftlib.methods.sequences import CRF

SEEDS = (0, 1, 2, 3, 4)
WAYS = ("first", "all", "crf")
RATES = (1.5e-4, 3e-4, 6e-4)
ABSTRACTS, EPOCHS = 128, 3  # of the tagger
WHOLE, WHOLE_EPOCHS = 400, 2  # all of them
VALIDATION, TEST = 50, 150  # abstracts of the tagger
RELATIONS = {  # way: (pairs in one sentence alone, class weights, epochs)
    "one sentence": (True, False, 1), "weighted": (True, True, 1), "longer": (True, True, 3),
    "all pairs": (False, True, 3),
}  # fmt: skip
PAIR_RATES = (2e-4, 4e-4, 8e-4)
SENTENCES = 1500  # of oanc-pos, one epoch
POS_RATES = (5e-4, 1e-3, 2e-3)
DOCUMENTS = None  # of every split, for relations: all
POS_TEST = None  # sentences: all
TOY = {"SEEDS": (0,), "RATES": RATES[:1], "ABSTRACTS": 4, "EPOCHS": 1, "WHOLE": 6, "WHOLE_EPOCHS": 1,
       "VALIDATION": 4, "TEST": 4, "PAIR_RATES": PAIR_RATES[:1],
       "SENTENCES": 8, "POS_RATES": POS_RATES[:1], "DOCUMENTS": 8, "POS_TEST": 8}  # fmt: skip
TYPES = ("Chemical", "Disease")


def f1(found: list[set], wanted: list[set]) -> dict[str, float]:
    """Of sets of (start, end, label), or of pairs, a set a document."""
    hits = sum(len(a & b) for a, b in zip(found, wanted, strict=True))
    said, due = sum(map(len, found)), sum(map(len, wanted))
    return {"precision": hits / max(said, 1), "recall": hits / max(due, 1), "f1": 2 * hits / max(said + due, 1)}


def spans(entities: list[dict]) -> set[tuple]:
    return {(one["start"], one["end"], one["label"]) for one in entities}


def by_type(found: list[set], wanted: list[set]) -> dict[str, float]:
    """F1 of all entities, and of each type alone."""
    alone = {kind: [[{s for s in own if s[2] == kind} for own in side] for side in (found, wanted)] for kind in TYPES}
    return f1(found, wanted) | {kind: f1(*sides)["f1"] for kind, sides in alone.items()}


def looked_up(known: Any, rows: Any) -> list[set]:
    """Entities by a dictionary: lower-case words of each mention in `known`, with its most frequent type."""
    said: dict[tuple, Counter] = defaultdict(Counter)
    for row in known:
        for one in row["entities"]:
            inside = [
                w.lower() for w, s in zip(row["tokens"], row["starts"], strict=True) if one["start"] <= s < one["end"]
            ]
            said[tuple(inside)][one["label"]] += 1
    longest, found = max(map(len, said)), []
    for row in rows:
        words, starts, i = [word.lower() for word in row["tokens"]], row["starts"], 0
        found.append(set())
        while i < len(words):
            sizes = [n for n in range(min(longest, len(words) - i), 0, -1) if tuple(words[i : i + n]) in said]
            n = sizes[0] if sizes else 1
            if sizes:
                kind = said[tuple(words[i : i + n])].most_common(1)[0][0]
                found[-1].add((starts[i], starts[i + n - 1] + len(words[i + n - 1]), kind))
            i += n
    return found


def sentences(text: str) -> list[tuple[int, int]]:
    """Where each begins and ends: behind . ? or ! with white space and a capital letter or a bracket after it."""
    cuts = [0, *(found.end() for found in re.finditer(r"[.?!]\s+(?=[A-Z(])", text)), len(text)]
    return list(itertools.pairwise(cuts))


def pairs_of(row: dict) -> list[dict]:
    """Every chemical with every disease of an abstract: the text of their nearest mentions, six counts, the answer."""
    held, where = sentences(row["text"]), defaultdict(list)  # {(type, identifier): [(sentence, start, end), ...]}
    for one in row["entities"]:
        place = next(i for i, (_, end) in enumerate(held) if one["start"] < end)
        for identifier in set(one["identifier"].split("|")) - {"-1"}:
            where[one["label"], identifier].append((place, one["start"], one["end"]))
    chemicals, diseases = ([key for key in where if key[0] == kind] for kind in TYPES)
    true = {(one["chemical"], one["disease"]) for one in row["relations"]}
    pairs = []
    for chemical, disease in itertools.product(chemicals, diseases):
        both = list(itertools.product(where[chemical], where[disease]))
        a, b = min(both, key=lambda two: (abs(two[0][0] - two[1][0]), abs(two[0][1] - two[1][1])))
        together = len({x[0] for x, y in both if x[0] == y[0]})
        title = [any(place == 0 for place, *_ in where[key]) for key in (chemical, disease)]
        counts = [len(where[chemical]), len(where[disease]), together, abs(a[0] - b[0]), *map(int, title)]
        (first, *_), (last, *_) = sorted((a, b))
        begin, end = held[first]
        text, shift = row["text"][begin:end], {first: begin}
        if last != first:
            text, shift[last] = text + row["text"][slice(*held[last])], held[last][0] - len(text)
        marks = [[x[1] - shift[x[0]], x[2] - shift[x[0]]] for x in (a, b)]
        pairs.append({"text": text, "spans": marks, "label": int((chemical[1], disease[1]) in true), "counts": counts,
                      "one": first == last})  # fmt: skip
    return pairs


def best_threshold(chances: np.ndarray, labels: np.ndarray) -> float:
    """Above which a pair is said to be a relation, so that F1 on these pairs is the highest."""
    order = np.sort(chances)[::-1]
    values = [pair_f1(chances >= cut, labels)["f1"] for cut in order]
    return float(order[int(np.argmax(values))])


def pair_f1(said: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return f1([set(np.flatnonzero(said))], [set(np.flatnonzero(labels))])


class Work:
    def __init__(self) -> None:
        self.tokenizer = ftlib.load_tokenizer("minilm")
        self.data, self.pos = ftlib.load_corpus("bc5cdr"), ftlib.load_corpus("oanc-pos")
        self.names = self.data["train"].features["tags"].feature.names
        self.validation, self.test = subset(self.data["validation"], VALIDATION, 0), subset(self.data["test"], TEST, 0)
        documents = {split: subset(rows, DOCUMENTS, 0) for split, rows in self.data.items()}
        self.pairs = {split: [one for row in rows for one in pairs_of(row)] for split, rows in documents.items()}

    def fit(self, model: Any, rows: Any, **options: Any) -> dict[str, float]:
        loss = options.pop("loss", None)
        config = ftlib.TrainConfig(progress=False, **options)
        run = ftlib.fit(model, rows, tokenizer=self.tokenizer, config=config, loss=loss)
        losses = [record["loss"] for record in run.history]
        return {"steps": run.steps, "loss": float(np.mean(losses[-8:])), "seconds": run.seconds}

    def rows(self, abstracts: Any, way: str) -> Any:
        """Tokens and labels; "all": a word's further pieces go on with its entity."""
        known = [{"tokens": row["tokens"], "label": row["tags"]} for row in abstracts]
        rows = ftlib.tokenize(known, self.tokenizer, task="token-classification")
        return [row | self.spread(row) for row in rows] if way == "all" else rows

    def spread(self, row: dict) -> dict:
        inner = {i: self.names.index(name.replace("B-", "I-")) for i, name in enumerate(self.names)}
        labels, last = row["labels"], IGNORE
        for place in range(1, len(labels) - 1):  # between [CLS] and [SEP]
            last = inner[last] if labels[place] == IGNORE else labels[place]
            labels[place] = last
        return {"labels": labels}

    def tagger(self, test: Any, way: str, rate: float, abstracts: int, epochs: int, seed: int) -> dict[str, float]:
        known = subset(self.data["train"], abstracts, seed)
        model = ftlib.load_model("minilm", task="token-classification", label_names=self.names, seed=seed)
        options, crf = dict(epochs=epochs, batch_size=2, learning_rate=rate, seed=seed), None
        if way == "crf":
            model.crf = CRF(len(self.names))
            ftlib.tune(model, "full")
            model.tuning.scales |= {f"crf.{name}": 100.0 for name, _ in model.crf.named_parameters()}
            options["loss"] = model.crf.forward
        spent = self.fit(ftlib.unpad(model), self.rows(known, way), **options)
        if way == "crf":
            crf = model.crf.transitions
            del model.crf
        wanted = [spans(row["entities"]) for row in test]

        def read(**how: Any) -> dict[str, float]:
            found = entities(model, test["text"], tokenizer=self.tokenizer, batch_size=16, **how)
            return by_type([spans(own) for own in found], wanted)

        plain, constrained = read(transitions=crf), read(transitions=crf, constrained=True)
        return spent | plain | {"constrained": constrained["f1"]}

    def dictionary(self, abstracts: int, seed: int) -> dict[str, float]:
        found = looked_up(subset(self.data["train"], abstracts, seed), self.test)
        return by_type(found, [spans(row["entities"]) for row in self.test])

    def counted(self) -> dict[str, dict]:
        """F1 of pairs in one sentence, and of logistic regression on six counts with a threshold from validation."""
        x, y, one = ({split: np.array([pair[key] for pair in pairs]) for split, pairs in self.pairs.items()}
                     for key in ("counts", "label", "one"))  # fmt: skip
        model = make_pipeline(StandardScaler(), LogisticRegression()).fit(x["train"], y["train"])
        chances = {split: model.predict_proba(x[split])[:, 1] for split in x}
        cut = best_threshold(chances["validation"], y["validation"])
        counts = pair_f1(chances["test"] >= cut, y["test"]) | {
            "argmax": pair_f1(chances["test"] > 0.5, y["test"])["f1"]
        }
        return {"one sentence": pair_f1(one["test"], y["test"]), "six counts": counts,
                "all pairs": pair_f1(one["test"] >= 0, y["test"])}  # fmt: skip

    def relations(self, way: str, rate: float, seed: int, search: bool = False) -> dict[str, float]:
        one, weighted, epochs = RELATIONS[way]
        known = [pair for pair in self.pairs["train"] if pair["one"] or not one]
        task = "relation-classification"
        model = ftlib.load_model("minilm", task=task, num_labels=2, seed=seed)
        weight = class_weights([pair["label"] for pair in known], 2).tolist() if weighted else [1.0, 1.0]

        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(logits, labels, torch.tensor(weight), reduction="sum")

        def rows(pairs: list[dict]) -> Any:
            columns = [{key: pair[key] for key in ("text", "spans", "label")} for pair in pairs]
            return ftlib.tokenize(columns, self.tokenizer, task=task)

        options = dict(epochs=epochs, batch_size=32, learning_rate=rate, seed=seed, loss=loss)
        spent, chances = self.fit(ftlib.unpad(model), rows(known), **options), {}
        for split in ("validation",) if search else ("validation", "test"):
            asked = np.array([pair["one"] or not one for pair in self.pairs[split]])
            own = [pair for pair, ask in zip(self.pairs[split], asked, strict=True) if ask]
            found = ftlib.predict(model, rows(own), tokenizer=self.tokenizer, output="probabilities")[:, 1]
            chances[split] = np.full(len(asked), 0.0)  # what is not asked is none
            chances[split][asked] = found
        return spent | self.judged(chances, search)

    def judged(self, chances: dict, search: bool) -> dict[str, float]:
        labels = {split: np.array([pair["label"] for pair in self.pairs[split]]) for split in chances}
        cut = best_threshold(chances["validation"], labels["validation"])
        if search:
            return pair_f1(chances["validation"] >= cut, labels["validation"])
        x = {split: np.column_stack([np.log(np.clip(own, 1e-3, 1) / np.clip(1 - own, 1e-3, 1)),
                                     [pair["counts"] for pair in self.pairs[split]]])
             for split, own in chances.items()}  # fmt: skip
        joint = make_pipeline(StandardScaler(), LogisticRegression()).fit(x["validation"], labels["validation"])
        joint = {split: joint.predict_proba(own)[:, 1] for split, own in x.items()}
        both = pair_f1(joint["test"] >= best_threshold(joint["validation"], labels["validation"]), labels["test"])
        return pair_f1(chances["test"] >= cut, labels["test"]) | {
            "threshold": cut, "argmax": pair_f1(chances["test"] > 0.5, labels["test"])["f1"], "both": both["f1"]
        }  # fmt: skip

    def each_word(self, count: int, seed: int) -> dict[str, float]:
        """The most frequent tag of each word, NNP for one that training lacks: the share of right test words."""
        said: dict[str, Counter] = defaultdict(Counter)
        for row in subset(self.pos["train"], count, seed):
            for word, tag in zip(row["tokens"], row["tags"], strict=True):
                said[word][tag] += 1
        unknown = self.pos["train"].features["tags"].feature.names.index("NNP")
        best = {word: tags.most_common(1)[0][0] for word, tags in said.items()}
        right = [best.get(word, unknown) == tag for row in self.pos["test"]
                 for word, tag in zip(row["tokens"], row["tags"], strict=True)]  # fmt: skip
        return {"accuracy": float(np.mean(right))}

    def speech(self, split: str, rate: float, count: int, seed: int) -> dict[str, float]:
        names = self.pos["train"].features["tags"].feature.names
        known, test = subset(self.pos["train"], count, seed), subset(self.pos[split], POS_TEST, 0)
        known, test = ([{"tokens": row["tokens"], "label": row["tags"]} for row in rows] for rows in (known, test))
        model = ftlib.load_model("minilm", task="token-classification", label_names=names, seed=seed)
        rows = ftlib.tokenize(known, self.tokenizer, task="token-classification")
        spent = self.fit(ftlib.unpad(model), rows, epochs=1, batch_size=16, learning_rate=rate, seed=seed)
        found = ftlib.predict(model, [row["tokens"] for row in test], tokenizer=self.tokenizer)
        right = [a == b for own, row in zip(found, test, strict=True) for a, b in zip(own, row["label"], strict=True)]
        return spent | {"accuracy": float(np.mean(right))}


def main() -> None:
    table = started(globals(), "MiniLM tags entities and parts of speech, and finds relations, against baselines")
    work = Work()

    def rate_of(part: str, tried: tuple, score: str, measure: Any, **key: Any) -> float:
        return table.best_rate({"part": part, **key}, tried, measure, lambda row: row[score])

    rates: dict[str, float] = {}
    for count, seed in [*itertools.product((ABSTRACTS,), SEEDS), (WHOLE, SEEDS[0])]:
        own = {"abstracts": count, "seed": seed}
        table.row({"part": "dictionary", **own}, lambda own=own: work.dictionary(**own))
    for way, found in work.counted().items():
        table.row({"part": "counts", "way": way}, lambda found=found: found)
    start = {"abstracts": ABSTRACTS, "epochs": EPOCHS}
    for way in WAYS:

        def searched(rate: float, way: str = way) -> dict[str, float]:
            return work.tagger(work.validation, way, rate, seed=0, **start)

        rates[way] = rate_of("tagger rates", RATES, "f1", searched, way=way, **start)
        for seed in SEEDS:
            own = {"way": way, "rate": rates[way], "seed": seed, **start}
            table.row({"part": "tagger", **own}, lambda own=own: work.tagger(work.test, **own))

    def relations(way: str) -> None:
        def searched(rate: float) -> dict[str, float]:
            return work.relations(way, rate, 0, search=True)

        alone = way == "all pairs"  # one run, at the rate of "longer"
        rates[way] = rates["longer"] if alone else rate_of("relation rates", PAIR_RATES, "f1", searched, way=way)
        for seed in SEEDS[:1] if alone else SEEDS:
            own = {"way": way, "rate": rates[way], "seed": seed}
            table.row({"part": "relations", **own}, lambda own=own: work.relations(**own))

    relations("one sentence")
    relations("longer")
    for seed in SEEDS:
        own = {"count": SENTENCES, "seed": seed}
        table.row({"part": "words", **own}, lambda own=own: work.each_word(**own))
    first = {"count": SENTENCES}
    rate = rate_of(
        "pos rates", POS_RATES, "accuracy", lambda rate: work.speech("validation", rate, seed=0, **first), **first
    )
    for seed in SEEDS:
        own = {"rate": rate, "seed": seed, **first}
        table.row({"part": "pos", **own}, lambda own=own: work.speech("test", **own))
    for seed in SEEDS:
        own = {"rate": rates["first"], "seed": seed, "abstracts": WHOLE, "epochs": WHOLE_EPOCHS}
        table.row({"part": "whole", **own}, lambda own=own: work.tagger(work.test, "first", **own))
    relations("weighted")
    relations("all pairs")


if __name__ == "__main__":
    main()
