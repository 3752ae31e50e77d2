"""The CPU against the stock tools: fine-tuning, features, titles, and the matrix-product rate.

    python tests/benchmarks/speed.py                     # writes results/speed-cpu-<n>-cores.json
    python tests/benchmarks/speed.py --part features     # that part alone; the other rows stay

Real weights, real sentences (the first 640 of rotten-tomatoes), on a CPU even where there is a GPU (bert_base.py is
for GPUs), each method in the precision it has as it comes: float32, and bf16 for `fit` and `precision="auto"` where the
CPU multiplies that fast; for the best settings of the others both are tried.  Fine-tuning: one pass in batches of 32,
dropout on; every method sees the same sentences and makes the same number of steps, in its own order; the mean loss of
all steps is stored.  The Trainer's best settings are searched first, and the search is stored.  Features: every method
returns the mean over the tokens of the last layer; the smallest cosine to the first method's vectors is stored.
Titles: flan-t5-small learns titles from abstracts of pubmed-titles, 8 a step, against Seq2SeqTrainer.  Peak memory is
measured in a process of its own for each method.
"""

import argparse
import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch starts

import methods
import numpy as np
import torch
from paired import Method, alone, run_rounds, summary, timed
from record import RESULTS, SpeedTable
from roofline import best_rate, encoder_flops, shapes

import ftlib
from ftlib.core.device import DTYPES

MAX_LENGTH = 128
PARTS = ("fine-tune", "features", "titles")
ENCODE = "sentence-transformers encode, batch 32 (default)"
FEATURE_METHODS = (
    ENCODE,
    "sentence-transformers encode, batch 64",
    "sentence-transformers encode, bf16",
    "ONNX Runtime",
    "ONNX Runtime, dynamic int8",
    "ftlib.extract_features",
    "ftlib.extract_features, unpad",
    "ftlib.extract_features, unpad, precision auto",
)

RIVALS = [name for name in FEATURE_METHODS if not name.startswith("ftlib") and "int8" not in name]  # cosine 0.999


def sentences(count: int) -> Any:
    return ftlib.load_corpus("rotten-tomatoes")["train"].select(range(count))


def fine_tuning(count: int) -> methods.Work:
    from transformers import DataCollatorWithPadding

    tokenizer = ftlib.load_tokenizer("minilm")
    return methods.Work(
        make_model=lambda: ftlib.load_model("minilm", task="sequence-classification", num_labels=2),
        rows=ftlib.tokenize(sentences(count), tokenizer, max_length=MAX_LENGTH),
        collator=DataCollatorWithPadding(tokenizer),
        precision="auto",
    )


def titles(count: int) -> methods.Work:
    from transformers import DataCollatorForSeq2Seq

    tokenizer = ftlib.load_tokenizer("flan-t5-titles")
    load = functools.partial(ftlib.load_model, "flan-t5-titles", task="seq2seq-lm")
    columns = dict(task="seq2seq-lm", text="abstract", label="title")
    data = ftlib.load_corpus("pubmed-titles")["train"].select(range(count))
    return methods.Work(
        make_model=load, rows=ftlib.tokenize(data, tokenizer, **columns, max_length=512),
        collator=DataCollatorForSeq2Seq(tokenizer, load()), batch=8, precision="auto", trainer="Seq2SeqTrainer",
    )  # fmt: skip


WORKS = {"fine-tune": fine_tuning, "titles": titles}
WORDS = {
    "fine-tune": "MiniLM, {} sentences of rotten-tomatoes",
    "titles": "flan-t5-small, {} abstracts of pubmed-titles, 8 a step",
}


def our_methods(part: str, work: methods.Work, compiled: bool) -> dict[str, Method]:
    if part == "fine-tune":
        return methods.our_methods(work, compiled=compiled)
    single = replace(work, precision="fp32")
    return {
        "ftlib.fit": methods.fit(work), "ftlib.fit, unpad, fp32": methods.fit(single, unpad=True),
        "ftlib.fit, unpad": methods.fit(work, unpad=True),
        "ftlib.fit, unpad, max_tokens=1024": methods.fit(work, unpad=True, max_tokens=1024),
    }  # fmt: skip


def feature_method(name: str, texts: list[str]) -> Method | None:
    """The method, loaded; None where what it needs is not installed."""
    if name.startswith("ftlib"):
        model, tokenizer = ftlib.load_model("minilm"), ftlib.load_tokenizer("minilm")
        if "unpad" in name:
            ftlib.unpad(model)
        options = {"precision": "auto" if "auto" in name else None, "max_length": MAX_LENGTH}
        encode = functools.partial(ftlib.extract_features, model, tokenizer=tokenizer, **options)
    elif name.startswith("ONNX Runtime"):
        try:
            import onnx_twin

            encode = functools.partial(onnx_twin.encode, int8="int8" in name)
        except ImportError as error:
            print(f"ONNX Runtime: not measured, {error}", flush=True)
            return None
    else:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        transformer = Transformer(str(ftlib.inputs.assets.path("minilm")), max_seq_length=MAX_LENGTH)
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        model = model.bfloat16() if "bf16" in name else model
        encode = functools.partial(model.encode, batch_size=64 if "64" in name else 32)
    return lambda: timed(lambda: encode(texts), "vectors")


def rate(tokens: int) -> dict[str, Any]:
    """Products of MiniLM's feed-forward block on so many tokens, and a large square one, in the precision of `auto`."""
    dtype = DTYPES[ftlib.choose_precision(torch.device("cpu"))[0]]
    return best_rate(shapes(tokens, 384, 1536, 2048), device="cpu", dtype=dtype)


def run_training(part: str, args: argparse.Namespace, table: SpeedTable, work_name: str) -> None:
    work = WORKS[part](args.count)
    candidates = [methods.HALF] if args.toy else [methods.HALF, *methods.CANDIDATES]
    small = work if args.toy or part == "titles" else WORKS[part](args.count // 2)
    if part == "titles":  # compiling for every length of source and target takes hours; workers only slow six steps
        candidates = [one for one in candidates if not {"torch_compile", "dataloader_num_workers"} & {*one}]
    found = methods.search(small, candidates, rounds=1 if args.toy or args.rounds < 5 else 2)
    search = "Trainer search" + (", titles" if part == "titles" else "")
    table.replace({"part": search}, [{"work": work_name, "sentences": len(small.rows), **found}])
    rivals = methods.stock_methods(work, found["best"]) | our_methods(part, work, not args.toy)
    measured, flops = None, None
    if part == "fine-tune":
        lengths = [len(ids) for ids in work.rows["input_ids"]]
        measured = functools.partial(rate, sum(lengths) // work.steps)
        flops = encoder_flops(work.make_model(), lengths, training=True)
    results = run_rounds(rivals, args.rounds, measured)
    rows = summary(results, count=args.count, against=[methods.DEFAULT, methods.BEST], flops=flops)
    for row in rows:
        settings = found["best"] if row["method"] == methods.BEST else {}
        command = ("--part", part, "--one", row["method"], "--settings", repr(settings), "--count", str(args.count))
        row |= alone(__file__, *command)
        row |= {"settings": settings, "steps": work.steps}
    table.replace({"part": part}, [{"work": work_name, **row} for row in rows])


def run_features(args: argparse.Namespace, table: SpeedTable, work_name: str) -> None:
    texts = list(sentences(args.count)["text"])
    rivals = {name: feature_method(name, texts) for name in FEATURE_METHODS}
    rivals = {name: method for name, method in rivals.items() if method}
    tokenizer = ftlib.load_tokenizer("minilm")
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]]
    tokens = round(64 * sum(lengths) / len(lengths))
    results = run_rounds(rivals, args.rounds, functools.partial(rate, tokens))
    flops = encoder_flops(ftlib.load_model("minilm"), lengths, training=False)
    rows = summary(results, count=args.count, against=RIVALS, flops=flops)
    first, *others = (torch.as_tensor(np.asarray(row.pop("vectors"), dtype=np.float32)) for row in rows)
    for row, vectors in zip(rows, [first, *others], strict=True):
        row["cosine"] = torch.cosine_similarity(first, vectors, dim=-1).min().item()
        row |= alone(__file__, "--part", "features", "--one", row["method"], "--count", str(args.count))
    table.replace({"part": "features"}, [{"work": work_name, **row} for row in rows])


def one(args: argparse.Namespace) -> dict[str, float]:
    """One method once, in this process alone: its peak memory and the memory before it, in MB."""
    if args.part == "features":
        method = feature_method(args.one, list(sentences(args.count)["text"]))
    else:
        work = WORKS[args.part](args.count)
        method = (methods.stock_methods(work, args.settings) | our_methods(args.part, work, True))[args.one]
    with ftlib.measure() as cost:
        method()
    return {"peak_mb": cost.peak_mb}


def main() -> None:
    import ast
    import json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, help="sentences, or abstracts; default: 640, of titles 48")
    parser.add_argument("--toy", action="store_true", help="one round of 64 (or --count): does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--one", help="run this method once and print its peak memory")
    parser.add_argument("--settings", type=ast.literal_eval, default={}, help="of the Trainer, with --one")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args)))
        return
    if args.toy:
        args.count, args.rounds = args.count or 64, 1
        if args.results == RESULTS:
            parser.error("--toy needs --results FOLDER: toy numbers are no results")
    count = args.count
    for part in PARTS if args.part is None else (args.part,):
        args.count = count or (48 if part == "titles" else 640)
        command = f"python tests/benchmarks/speed.py --part {part} --rounds {args.rounds}"
        table = SpeedTable(command, args.results)
        if part == "features":
            run_features(args, table, f"features: MiniLM, {args.count} sentences of rotten-tomatoes")
        else:
            run_training(part, args, table, f"{part}: {WORDS[part].format(args.count)}")


if __name__ == "__main__":
    main()
