"""A BERT-base-sized encoder on a GPU: training and feature extraction against the stock tools, and the peak.

    python tests/benchmarks/bert_base.py                         # part 2 of the GPU day, without its limit of time
    python tests/benchmarks/bert_base.py --work "train, batch 32"   # that piece of work alone; the others stay
    python tests/benchmarks/bert_base.py --toy --results /tmp/x  # a tiny model anywhere: does it run?

Needs only torch, transformers and ftlib; accelerate for the Trainer's rows (without it they are left out and a row
says so), sentence-transformers for its own `encode` (without it a loop that does what `encode` does, named so).
Weights are random, token ids are random, lengths are those of rotten-tomatoes (results/lengths.json); speed depends
on none of the rest.  Training: AdamW, dropout 0.1; autocast to bf16 over float32 weights, except for the Trainer as it
comes, which computes in float32.  Feature extraction: bf16 weights.  Utilisation is against the bf16 matrix-product
rate measured in the same rounds.  Without a GPU it says so and leaves the stored rows alone.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import methods
import numpy as np
import torch
from lengths import measured_lengths
from paired import Method, run_rounds, spread, summary, timed
from record import RESULTS, GpuTable, installed
from roofline import best_rate, encoder_flops, shapes

import ftlib
from ftlib.core.batches import collate

PART = "BERT-base, bf16"
# name: (batch, fixed length or None for the real ones, rows, options of the config)
TRAINING = {
    "train, batch 32": (32, None, 2048, {}),
    "train, batch 256": (256, None, 3840, {}),
    "train, 512 tokens, batch 64": (64, 512, 640, {}),
    "train, 512 tokens, batch 64, no attention dropout": (64, 512, 640, {"attention_probs_dropout_prob": 0.0}),
}
FEATURES = "features, batch 32"
COMPILED = "train, batch 32, the Trainer compiled"  # takes the Trainer a minute or two before the first step
WORKS = {  # in the order of their worth: the share of the time that is left when it is their turn
    "train, batch 32": 0.35, "train, batch 256": 0.35, "train, 512 tokens, batch 64, no attention dropout": 0.3,
    FEATURES: 0.4, "train, 512 tokens, batch 64": 0.4, COMPILED: 1.0,
}  # fmt: skip
HALF = "Trainer, bf16=True"
# The Trainer's settings tried, each on top of what was kept; a fused AdamW and SDPA attention are its defaults.
CANDIDATES = (
    {"train_sampling_strategy": "group_by_length"},
    {"logging_nan_inf_filter": False},  # saves a wait for the GPU every step
    *([{"attn_implementation": "flash_attention_2"}] if importlib.util.find_spec("flash_attn") else []),
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
)
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
Put = Callable[[list[dict[str, Any]]], None]  # stores what was measured so far, in place of what was there


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(kind: str, **options: Any) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    with device():  # a hundred million random numbers: at once on a GPU, seconds on a CPU
        return getattr(transformers, kind)(transformers.BertConfig(**options))


def token_rows(lengths: list[int], vocabulary: int = 30522) -> list[dict[str, Any]]:
    pick = random.Random(0)
    return [
        {"input_ids": [pick.randrange(1000, vocabulary) for _ in range(n)], "labels": pick.randrange(2)}
        for n in lengths
    ]


def word_tokenizer(words: int = 20000) -> Any:
    """A fast tokenizer whose every word is one token; with [CLS] and [SEP], like BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(words))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, model_input_names=inputs, **names)


@torch.inference_mode()
def encode_loop(model: torch.nn.Module, tokenizer: Any, texts: list[str], batch_size: int = 32) -> np.ndarray:
    """What sentence-transformers' `encode` does: longest text first; tokenize, pad and average batch by batch."""
    model.eval()
    order = np.argsort([-len(text) for text in texts])
    vectors = []
    for start in range(0, len(texts), batch_size):
        batch = [texts[i] for i in order[start : start + batch_size]]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(model.device)
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        vectors.extend(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.stack([vectors[i] for i in np.argsort(order)]).float().numpy()


def sentence_transformer(model: torch.nn.Module, tokenizer: Any) -> Any:
    """sentence-transformers' own model from the same weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=min(512, model.config.max_position_embeddings))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling], device=str(device())).to(model.dtype)


def rate(config: Any, tokens: int, toy: bool) -> Method:
    products = shapes(tokens, config.hidden_size, config.intermediate_size, 64 if toy else 8192)
    seconds = 0.001 if toy else 0.03
    return functools.partial(best_rate, products, device=device(), dtype=torch.bfloat16, seconds=seconds)


def why(error: Exception) -> str:
    """An error as a cell of a table: its type and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def rounds_until(
    rivals: dict[str, Method], rounds: int, rate: Method, until: float, put: Callable[[dict, dict], None]
) -> None:
    """As `run_rounds`, as many rounds as there is time for until then (monotonic seconds), at least one.

    put(results, missing) is called after every round; a method that fails, or whose turn to warm up comes too late, is
    {its name: why} in `missing`.
    """
    results: dict[str, list] = {name: [] for name in rivals}
    missing: dict[str, str] = {}
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > until:
            break
        for name in [*results]:
            if not number and time.monotonic() > until:
                missing[name] = "no time was left"
            else:
                try:
                    results[name] += run_rounds({name: rivals[name]}, 0, rate)[name]
                except Exception as error:
                    missing[name] = why(error)
            if name in missing:
                del results[name]
                gc.collect()
                torch.cuda.empty_cache()
        if number and results:
            put(results, missing)
    if not results:
        put(results, missing)


def search(work: methods.Work, steps: int, until: float, candidates: Any = CANDIDATES) -> dict[str, Any]:
    """The Trainer's best settings found in a few steps: {"best": settings, "tried": gains, "left_out": why}.

    Each change is measured twice beside what was kept so far, after a warm-up, and kept if it is faster by 1 %.
    """
    small = dataclasses.replace(work, rows=work.rows[: steps * work.batch])
    found: dict[str, Any] = {"best": {}, "tried": [], "left_out": [], "steps": steps}
    kept = methods.trainer(small)
    kept()
    for change in candidates:
        if time.monotonic() > until:
            found["left_out"].append({"change": change, "why": "no time was left"})
            continue
        changed = methods.trainer(small, **found["best"], **change)
        try:
            changed()
            gain = spread([kept()["seconds"] / changed()["seconds"] for _ in range(2)])
        except Exception as error:
            found["left_out"].append({"change": change, "why": why(error)})
            continue
        better = gain["median"] >= 1.01
        found["tried"].append({"change": change, "faster": gain, "kept": better})
        if better:
            found["best"] |= change
            kept = changed
    return found


def work_of(name: str, toy: bool) -> tuple[methods.Work, list[int]]:
    batch, fixed, count, options = TRAINING[name]
    if toy:
        batch, fixed, count, options = 8, fixed and 32, 24, options | TOY
    lengths = [fixed] * count if fixed else measured_lengths()[:count]
    make = functools.partial(make_model, "BertForSequenceClassification", **options)
    return methods.Work(make, token_rows(lengths), collate, batch, "bf16"), lengths


def compare(
    work: methods.Work, lengths: list[int], rivals: dict[str, Method], before: list[dict], args: Any, until: float,
    put: Put,
) -> None:  # fmt: skip
    """Rounds of training; the rows `before` stay at the top."""
    model = work.make_model()
    flops, stock = encoder_flops(model, lengths, training=True), [name for name in rivals if name.startswith("Trainer")]

    def store(results: dict, missing: dict) -> None:
        rows = summary(results, count=len(lengths), against=stock, flops=flops)
        rows += [{"method": name, "missing": reason} for name, reason in missing.items()]
        put([*before, *(row | {"steps": work.steps, "tokens": sum(lengths)} for row in rows)])

    rounds_until(rivals, args.rounds, rate(model.config, sum(lengths) // work.steps, args.toy), until, store)


def train(args: Any, name: str, until: float, put: Put) -> None:
    work, lengths = work_of(name, args.toy)
    rows, rivals = [], {}
    if not installed(("accelerate",)):
        rows = [{"method": methods.DEFAULT, "missing": "accelerate is not installed"}]
    else:
        found: dict[str, Any] = {"best": {}}
        if "512" not in name:  # rows of one length, many at once: nothing to group, nothing to wait for
            half = time.monotonic() + (until - time.monotonic()) / 3 if until < math.inf else until
            candidates = CANDIDATES[:1] if args.toy else CANDIDATES
            found = search(work, 2 if args.toy else 24 if work.batch == 32 else 6, half, candidates)
            rows = [{"method": "Trainer search", **found}]
            put(rows)
            plain = dataclasses.replace(work, precision="fp32")
            rivals = {methods.DEFAULT: methods.trainer(plain), HALF: methods.trainer(work)}
        rivals[methods.BEST] = methods.trainer(work, **found["best"])
    if work.batch == 32 and device().type == "cuda":  # where a step waits for Python
        rivals["ftlib.fit, CUDA graphs"] = methods.fit(work, cuda_graphs=True)
    rivals |= methods.our_methods(work, compiled=not (args.toy or args.no_compile))
    compare(work, lengths, rivals, rows, args, until, put)


def train_compiled(args: Any, best: dict[str, Any], until: float, put: Put) -> None:
    """The Trainer with torch.compile on top of its best settings, and `fit` beside it."""
    work, lengths = work_of("train, batch 32", args.toy)
    work, lengths = dataclasses.replace(work, rows=work.rows[:1024]), lengths[:1024]
    ours = methods.our_methods(work, compiled=not args.toy)
    rivals = {methods.BEST: methods.trainer(work, **best)}
    if not args.toy:
        rivals[f"{methods.BEST}, torch_compile"] = methods.trainer(work, **best, torch_compile=True)
    compare(work, lengths, rivals | {n: m for n, m in ours.items() if "unpad" in n}, [], args, until, put)


def features(args: Any, until: float, put: Put) -> None:
    options = TOY if args.toy else {}
    lengths = measured_lengths()[: 64 if args.toy else 4096]
    tokenizer = word_tokenizer()
    pick = random.Random(0)
    texts = [" ".join(f"w{pick.randrange(20000)}" for _ in range(n - 2)) for n in lengths]
    plain = make_model("BertModel", **options).to(device(), torch.bfloat16).eval()
    unpadded = ftlib.unpad(make_model("BertModel", **options).to(device(), torch.bfloat16).eval())
    encode = "sentence-transformers encode, batch 32 (default)"
    if importlib.util.find_spec("sentence_transformers") and not args.toy:
        stock = sentence_transformer(plain, tokenizer)
        rivals = {encode: functools.partial(stock.encode, texts)}
        for size in (128, 512):
            rivals[encode[:36] + f"{size}"] = functools.partial(stock.encode, texts, batch_size=size)
    else:
        encode = "a loop like sentence-transformers' encode, batch 32"
        rivals = {encode: functools.partial(encode_loop, plain, tokenizer, texts)}
    against = [*rivals]
    for size in (64, 512):
        extract = functools.partial(ftlib.extract_features, texts=texts, tokenizer=tokenizer, batch_size=size)
        rivals[f"ftlib.extract_features, batch {size}"] = functools.partial(extract, plain)
        rivals[f"ftlib.extract_features, unpad, batch {size}"] = functools.partial(extract, unpadded)
    run = {name: functools.partial(timed, work, "vectors") for name, work in rivals.items()}
    tokens = round(64 * sum(lengths) / len(lengths))
    flops = encoder_flops(plain, lengths, training=False)

    def store(results: dict, missing: dict) -> None:
        rows = summary(results, count=len(texts), against=against, flops=flops)
        vectors = [np.asarray(row.pop("vectors"), dtype=np.float32) for row in rows]
        for row, own in zip(rows, vectors, strict=True):
            row["difference"] = float(np.abs(own - vectors[0]).max())
        put([*rows, *({"method": name, "missing": reason} for name, reason in missing.items())])

    rounds_until(run, args.rounds, rate(plain.config, tokens, args.toy), until, store)


def measure(name: str, args: Any, table: GpuTable, until: float = math.inf) -> None:
    """One piece of work, stored as it goes; what fails is stored as a row that says so."""
    put = functools.partial(table.replace, {"part": PART, "work": name})
    try:
        if name == FEATURES:
            features(args, until, put)
        elif name == COMPILED:
            rows = [r for r in table.content["rows"] if r.get("work") == "train, batch 32" and "best" in r]
            if rows:
                train_compiled(args, rows[0]["best"], until, put)
        else:
            train(args, name, until, put)
    except Exception as error:
        table.replace({"part": PART, "work": name, "method": "all of it"}, [{"missing": why(error)}])
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="where there is no compiler for torch.compile")
    parser.add_argument("--toy", action="store_true", help="a tiny model and few rows, on any device")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.toy:
        args.rounds = 1
        if args.results == RESULTS:
            parser.error("--toy needs --results FOLDER: toy numbers are no results")
    elif device().type != "cuda":
        print("no GPU: the GPU rows stay as they were last measured, with their date")
        return
    for name in [args.work] if args.work else WORKS:
        measure(name, args, GpuTable(2, f'python tests/benchmarks/bert_base.py --work "{name}"', args.results))


if __name__ == "__main__":
    main()
