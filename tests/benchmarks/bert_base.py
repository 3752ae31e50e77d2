"""A BERT-base-sized encoder on a GPU, bf16: training and feature extraction against the stock tools, and the peak.

    python tests/benchmarks/bert_base.py                         # writes results/speed-<gpu>.json; needs a GPU
    python tests/benchmarks/bert_base.py --work "train, batch 32"   # that piece of work alone; the others stay
    python tests/benchmarks/bert_base.py --toy --results /tmp/x  # a tiny model anywhere: does it run?

Needs only torch, transformers and ftlib; accelerate for the Trainer's rows (without it they are left out and a row
says so), sentence-transformers for its own `encode` (without it a loop that does what `encode` does, named so).
Weights are random, token ids are random, lengths are those of rotten-tomatoes (results/lengths.json); speed depends
on none of the rest.  Training: autocast to bf16 over float32 weights for every method, dropout 0.1, AdamW.
Feature extraction: bf16 weights.  Utilisation is against the bf16 matrix-product rate measured in the same rounds.
Without a GPU it says so and leaves the stored rows alone.
"""

import argparse
import dataclasses
import functools
import importlib.util
import random
import tempfile
from pathlib import Path
from typing import Any

import methods
import numpy as np
import torch
from lengths import measured_lengths
from paired import Method, run_rounds, summary, timed
from record import RESULTS, SpeedTable, installed
from roofline import best_rate, encoder_flops, shapes

import ftlib
from ftlib.core.batches import collate

# name: (batch, fixed length or None for the real ones, rows, options of the config)
TRAINING = {
    "train, batch 32": (32, None, 4096, {}),
    "train, batch 256": (256, None, 7424, {}),
    "train, 512 tokens, batch 64": (64, 512, 1024, {}),
    "train, 512 tokens, batch 64, no attention dropout": (64, 512, 1024, {"attention_probs_dropout_prob": 0.0}),
}
FEATURES = "features, batch 32"
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(kind: str, **options: Any) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
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
    seconds = 0.001 if toy else 0.1
    return functools.partial(best_rate, products, device=device(), dtype=torch.bfloat16, seconds=seconds)


def train(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    batch, fixed, count, options = TRAINING[name]
    if args.toy:
        batch, fixed, count, options = 8, fixed and 32, 24, options | TOY
    lengths = [fixed] * count if fixed else measured_lengths()[:count]
    work = methods.Work(
        make_model=lambda: make_model("BertForSequenceClassification", **options),
        rows=token_rows(lengths),
        collator=collate,
        batch=batch,
        precision="bf16",
    )
    rows = []
    compiled = not (args.toy or args.no_compile)
    found: dict[str, Any] = {"best": None}
    if installed(("accelerate",)):
        tried = [change for change in methods.CANDIDATES if compiled or "torch_compile" not in change]
        half = dataclasses.replace(work, rows=work.rows[: count // 2])
        found = methods.search(half, tried[:1] if args.toy else tried, rounds=1 if args.toy else 2)
        rows.append({"method": "Trainer search", **found})
    else:
        rows.append({"method": methods.DEFAULT, "missing": "accelerate is not installed"})
    rivals = methods.stock_methods(work, found["best"]) | methods.our_methods(work, compiled=compiled)
    model = work.make_model()
    results = run_rounds(rivals, args.rounds, rate(model.config, sum(lengths) // work.steps, args.toy))
    rows += summary(
        results, count=count, against=[methods.DEFAULT, methods.BEST],
        flops=encoder_flops(model, lengths, training=True),
    )  # fmt: skip
    return [row | {"steps": work.steps, "tokens": sum(lengths)} for row in rows]


def features(args: argparse.Namespace) -> list[dict[str, Any]]:
    options = TOY if args.toy else {}
    lengths = measured_lengths()[: 64 if args.toy else None]
    tokenizer = word_tokenizer()
    pick = random.Random(0)
    texts = [" ".join(f"w{pick.randrange(20000)}" for _ in range(n - 2)) for n in lengths]
    plain = make_model("BertModel", **options).to(device(), torch.bfloat16).eval()
    unpadded = ftlib.unpad(make_model("BertModel", **options).to(device(), torch.bfloat16).eval())
    encode = "sentence-transformers encode, batch 32 (default)"
    if importlib.util.find_spec("sentence_transformers") and not args.toy:
        rivals = {encode: functools.partial(sentence_transformer(plain, tokenizer).encode, texts)}
    else:
        encode = "a loop like sentence-transformers' encode, batch 32"
        rivals = {encode: functools.partial(encode_loop, plain, tokenizer, texts)}
    for size in (64, 512):
        extract = functools.partial(ftlib.extract_features, texts=texts, tokenizer=tokenizer, batch_size=size)
        rivals[f"ftlib.extract_features, batch {size}"] = functools.partial(extract, plain)
        rivals[f"ftlib.extract_features, unpad, batch {size}"] = functools.partial(extract, unpadded)
    run = {name: functools.partial(timed, work, "vectors") for name, work in rivals.items()}
    tokens = round(64 * sum(lengths) / len(lengths))
    results = run_rounds(run, args.rounds, rate(plain.config, tokens, args.toy))
    flops = encoder_flops(plain, lengths, training=False)
    rows = summary(results, count=len(texts), against=[encode], flops=flops)
    first = np.asarray(rows[0]["vectors"], dtype=np.float32)
    for row in rows:
        row["difference"] = float(np.abs(np.asarray(row.pop("vectors"), dtype=np.float32) - first).max())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=[*TRAINING, FEATURES])
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
    for name in [args.work] if args.work else [*TRAINING, FEATURES]:
        table = SpeedTable(f'python tests/benchmarks/bert_base.py --work "{name}"', args.results)
        rows = features(args) if name == FEATURES else train(args, name)
        table.replace({"part": "BERT-base, bf16", "work": name}, rows)


if __name__ == "__main__":
    main()
