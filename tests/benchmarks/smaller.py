"""Results of notebook 12b: MiniLM made smaller, on rotten-tomatoes: accuracy, megabytes, latency, throughput.

    python tests/benchmarks/smaller.py    # writes results/smaller.json; resumes; models are kept in build/smaller

Parts
- rates: the learning rate of each way that trains, by validation accuracy with seed 0.
- accuracy: on the corpus's 533 test sentences, with every seed.  TRAINED: "6 layers", all of MiniLM; 3 of its layers
  (1, 3, 5 from 0) trained on the labels, from the pretrained model and from the fine-tuned one; and distilled from the
  fine-tuned one, by logits, and by hidden states too.  All make the same updates.  PRUNED: a share of the 6 layers'
  heads and neurons taken out, by importance on IMPORTANCE training sentences, then AFTER updates.  CODED: what is made
  of the 6 layers without training; "trained for it": after AFTER updates inside `quantization.rounding`.
- speed: of the models of the first seed, one thread, in paired rounds: latency of single test sentences (median and
  99th percentile), sentences a second in batches of 32, megabytes of all weights, and without the word table.
  PyTorch's models are unpadded, and run as in `ftlib.predict`.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_twin
import torch
from paired import run_rounds, spread, summary
from record import Table, started, subset
from torch import nn

import ftlib
from ftlib import pruning, quantization
from ftlib.core.anatomy import base_of, evaluating
from ftlib.core.batches import collate
from ftlib.methods.speedups import shortcuts

SEEDS = (0, 1, 2, 3, 4)
RATES = (5e-5, 1e-4, 2e-4)
STEPS, AFTER, BATCH = 320, 100, 32  # updates; after pruning, or for few bits; sentences an update
AFTER_RATE = 5e-5
IMPORTANCE = 512  # sentences
ROUNDS, SINGLE, MANY = 7, 100, 320  # rounds; sentences alone, and in batches
TRAIN, TEST = 2000, None  # sentences; of validation and test: all
PRECISION = "bf16"
MODELS = Path(__file__).parents[2] / "build" / "smaller"
TOY = {"SEEDS": (0,), "RATES": RATES[:1], "STEPS": 2, "AFTER": 1, "IMPORTANCE": 4, "ROUNDS": 1, "SINGLE": 3, "MANY": 40,
       "TRAIN": 16, "TEST": 40, "BATCH": 8, "MODELS": None}  # fmt: skip
WHOLE = "6 layers"
TRAINED: dict[str, dict[str, Any] | None] = {  # way: what the teacher does, None for a way without
    WHOLE: None,
    "3 layers": None,
    "3 layers of the fine-tuned": None,
    "3 layers, distilled": {"labels": 0.5, "logits": 0.5},
    "3 layers, distilled, hidden states": {"labels": 0.5, "logits": 0.5, "hidden": 1.0},
}
PRUNED = {"a third of the heads out": (1 / 3, 0.0), "half of the neurons out": (0.0, 0.5), "both out": (1 / 3, 0.5)}
CODED: dict[str, dict[str, Any]] = {  # way: what `quantize` gets
    "int8 weights": {},
    "int8 weights and words": {"words": True},
    "int8 dynamic": {"dynamic": True},
    "4-bit weights": {"bits": 4},
    "4-bit weights, trained for it": {"bits": 4},
}
OTHERS = ("bf16", "torch.ao int8 dynamic", "ONNX Runtime", "ONNX Runtime int8")
WAYS = (*TRAINED, *PRUNED, *CODED, *OTHERS)


class Logits(nn.Module):
    """Ids, mask and token types to logits: what is exported."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        return self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits


class Session:
    """An ONNX Runtime session that takes our batches and gives logits, float32 (batch, 2)."""

    def __init__(self, model: nn.Module, int8: bool):
        graph = onnx_twin.exported(Logits(model), model, int8)
        self.bytes, self.session = len(graph), onnx_twin.running(graph, threads=1)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return self.session.run(None, feed | {"token_type_ids": np.zeros_like(feed["input_ids"])})[0]


def batches(rows: list[dict], size: int) -> list[dict[str, torch.Tensor]]:
    plain = [{"input_ids": row["input_ids"]} for row in rows]
    return [collate(plain[i : i + size]) for i in range(0, len(plain), size)]


class Work:
    """The corpus, and the models by way and seed; what training costs is kept in a folder, so that it goes on."""

    def __init__(self, folder: Path, table: Table):
        self.folder, self.table, self.rates = folder, table, {}
        tokenizer = ftlib.load_tokenizer("minilm")
        tokens = ftlib.tokenize(ftlib.load_corpus("rotten-tomatoes"), tokenizer, max_length=128)
        self.tokens = {split: list(subset(part, TRAIN if split == "train" else TEST)) for split, part in tokens.items()}

    def fit(self, model: nn.Module, rate: float, seed: int, steps: int, **options: Any) -> float:
        sizes = dict(max_steps=steps, batch_size=BATCH, precision=PRECISION)
        config = ftlib.TrainConfig(**sizes, learning_rate=rate, seed=seed, progress=False, **options)
        return ftlib.fit(model, self.tokens["train"], config=config).seconds

    def pretrained(self, seed: int) -> nn.Module:
        return ftlib.load_model("minilm", task="sequence-classification", num_labels=2, seed=seed)

    def train(self, way: str, rate: float, seed: int) -> tuple[nn.Module, float]:
        """One of TRAINED, and the seconds that it took; the teacher's own are not among them."""
        start = self.pretrained(seed)
        if way not in (WHOLE, "3 layers"):
            start = self.model(WHOLE, seed)
        model, options = start if way == WHOLE else ftlib.shrink(start, 3), {}
        if TRAINED[way]:
            options = {"distill": ftlib.Distillation(ftlib.unpad(start), **TRAINED[way])}
        return model, self.fit(ftlib.unpad(model), rate, seed, STEPS, **options)

    def rate(self, way: str) -> float:
        def searched(rate: float) -> dict[str, float]:
            model, seconds = self.train(way, rate, SEEDS[0])
            return {"accuracy": ftlib.evaluate(model, self.tokens["validation"])["accuracy"], "seconds": seconds}

        if way not in self.rates:
            key = {"part": "rates", "way": way, "steps": STEPS}
            self.rates[way] = self.table.best_rate(key, RATES, searched, lambda row: row["accuracy"])
        return self.rates[way]

    def model(self, way: str, seed: int) -> Any:
        """The model of this way, padded, or an ONNX Runtime session; trained ones come from the folder."""
        place = self.folder / f"{way.replace(' ', '-').replace(',', '')}-{seed}"
        if way in (*TRAINED, *PRUNED) or way.endswith("trained for it"):
            if not (place / "config.json").is_file():
                model, seconds = self.made(way, seed)
                ftlib.save(ftlib.repad(model), place)
                (place / "seconds").write_text(str(seconds))
            model = ftlib.load(place)
        else:
            model = self.model(WHOLE, seed)
        if way in CODED:
            return quantization.quantize(model, **CODED[way])
        if way == "bf16":
            return model.to(torch.bfloat16)
        if way.startswith("torch.ao"):
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        return Session(model, way.endswith("int8")) if way.startswith("ONNX") else model

    def made(self, way: str, seed: int) -> tuple[nn.Module, float]:
        if way in TRAINED:
            return self.train(way, self.rate(way), seed)
        model = self.model(WHOLE, seed)
        if way in CODED:
            with quantization.rounding(model, **CODED[way]):
                return model, self.fit(ftlib.unpad(model), AFTER_RATE, seed, AFTER)
        for of, share in zip(("heads", "neurons"), PRUNED[way], strict=True):
            scores = pruning.importance(model, self.tokens["train"][:IMPORTANCE], of)
            if of == "heads":  # of a layer against each other's, as Michel et al. compare them
                scores = [own / own.norm() for own in scores]
            pruning.prune(model, pruning.weakest(scores, share, uniform=of == "neurons"), of)
        before = ftlib.evaluate(model, self.tokens["test"])["accuracy"]
        key = {"part": "before", "way": way, "seed": seed}  # it goes on training
        self.table.row(key, lambda: {"accuracy": before})
        return model, self.fit(ftlib.unpad(model), AFTER_RATE, seed, AFTER)

    def accuracy(self, way: str, seed: int) -> dict[str, Any]:
        model, test = self.model(way, seed), self.tokens["test"]
        seconds = self.folder / f"{way.replace(' ', '-').replace(',', '')}-{seed}" / "seconds"
        found = {"seconds": float(seconds.read_text())} if seconds.is_file() else {}
        if isinstance(model, Session):
            said = np.concatenate([model(**batch).argmax(1) for batch in batches(test, 32)])
            return found | {"accuracy": float(np.mean(said == [row["labels"] for row in test]))}
        return found | {"accuracy": ftlib.evaluate(model, test)["accuracy"]}


def megabytes(model: Any) -> dict[str, float]:
    """Of all weights, and without the word table; of ONNX the file."""
    if isinstance(model, Session):
        return {"mb": model.bytes / 2**20}
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if hasattr(module, "_weight_bias") and not [*module.children()]:  # inside a layer of torch.ao
            own += [t.int_repr() if t.is_quantized else t for t in module._weight_bias()]
        found[module] = sum(t.numel() * t.element_size() for t in own)
    words = found[base_of(model).get_input_embeddings()]
    return {"mb": sum(found.values()) / 2**20, "mb_without_words": (sum(found.values()) - words) / 2**20}


def timed(model: Any, single: list, many: list) -> dict[str, Any]:
    """Every sentence alone, then all batches."""
    times = []
    for batch in single:
        start = time.perf_counter()
        model(**batch)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for batch in many:
        model(**batch)
    seconds = time.perf_counter() - start
    ordered = sorted(times)
    return {"seconds": seconds, "p50": statistics.median(times), "p99": ordered[math.ceil(0.99 * len(ordered)) - 1]}


def measured(model: Any, single: list, many: list) -> dict[str, Any]:
    if isinstance(model, Session):
        return timed(model, single, many)
    with evaluating(model), shortcuts(model):
        return timed(model, single, many)


def speed(work: Work) -> list[dict[str, Any]]:
    """All ways in turn, round by round; ratios are taken within a round."""
    torch.set_num_threads(1)
    rows = work.tokens["test"]
    single, many = batches(rows[:SINGLE], 1), batches(rows[:MANY], 32)
    sizes, methods = {}, {}
    for way in WAYS:
        model = work.model(way, SEEDS[0])
        sizes[way] = megabytes(model)
        model = model if isinstance(model, Session) else ftlib.unpad(model)
        methods[way] = partial(measured, model, single, many)
    results = run_rounds(methods, ROUNDS)
    found = summary(results, count=len(rows[:MANY]), against=[WHOLE])
    for row in found:
        way = row.pop("method")
        own, base = results[way][1:], results[WHOLE][1:]
        for name in ("p50", "p99"):
            row[f"{name}_ms"] = statistics.median(one[name] for one in own) * 1e3
            row[f"{name}_against"] = spread([b[name] / a[name] for a, b in zip(own, base, strict=True)])
            row.pop(name)
        row |= {"way": way, **sizes[way]}
    return found


def main() -> None:
    table = started(globals(), "MiniLM made smaller, on rotten-tomatoes: accuracy, megabytes, latency, throughput")
    work = Work(MODELS or table.path.parent / "models", table)
    for seed in SEEDS:
        for way in WAYS:
            key: dict[str, Any] = {"part": "accuracy", "way": way, "seed": seed}
            measure: Callable[[], dict[str, Any]] = partial(work.accuracy, way, seed)
            table.row(key, measure)
    if {row["way"] for row in table.content["rows"] if row["part"] == "speed"} != {*WAYS}:
        table.replace({"part": "speed", "threads": 1, "batch_size": 32}, speed(work))


if __name__ == "__main__":
    main()
