"""A Llama of 1.2 billion parameters on a GPU, fine-tuned by TRL, a plain loop and ftlib: tokens a second, memory, MFU.

    python tests/benchmarks/llama_1b.py                         # part 6 of the GPU day, without its limit of time
    python tests/benchmarks/llama_1b.py --toy --results /tmp/x  # a tiny model anywhere: does it run?

Needs only torch, transformers and ftlib; trl and `datasets` for TRL's rows, peft for LoRA in the plain loop (what is
not there has a row that says so).  Random weights in float32 under autocast to bf16, random tokens, all of them
trained; a step has 18 rows of 16 to 1,024 tokens, some 8,000, with the lengths of rotten-tomatoes stretched.  The ways
run one after the other, each with 1 + 5 steps, of which the first is left out.

MFU: the FLOPs of `decoders.decoder_flops` on real tokens over the seconds of a step, against the dense bf16 rate of the
GPU's data sheet (PEAKS); utilisation: against the rate of large products measured before each way.
"""

import argparse
import dataclasses
import functools
import gc
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import decoders
import torch
from bert_base import device, rate, why, word_tokenizer
from memory import stretched
from paired import spread
from record import RESULTS, GpuTable

PART = "Llama of 1.2 billion, bf16"
PEAKS = {"H100": 989e12, "H200": 989e12, "H20": 148e12, "A100": 312e12, "L4": 121e12, "B200": 2250e12}  # FLOPs a second
SIZES = dict(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip
TOY = dict(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048)  # fmt: skip
DEFAULT, BEST = "TRL, as it comes", "TRL, no checkpointing, padding_free"
WAYS: dict[str, Any] = {
    "ftlib.fit, unpad": functools.partial(decoders.fit, precision="bf16"),
    DEFAULT: functools.partial(decoders.trl, max_length=None),
    BEST: functools.partial(decoders.trl, max_length=None, padding_free=True, gradient_checkpointing=False),
    "plain loop, bf16": functools.partial(decoders.plain, bf16=True),
    "ftlib.fit, unpad, compile": functools.partial(decoders.fit, precision="bf16", compile=True),
}


def make_model(sizes: dict[str, Any]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with device():
        return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=2, eos_token_id=3))


def work(moves: str, toy: bool, steps: int) -> decoders.Work:
    sizes, batch, longest = (TOY, 4, 64) if toy else (SIZES, 18, 1024)
    pick = random.Random(0)
    ids = [[pick.randrange(5, sizes["vocab_size"]) for _ in range(n)] for n in stretched(batch * steps, longest)]
    rows = [{"input_ids": row, "labels": list(row)} for row in ids]
    make = functools.partial(make_model, sizes)
    return decoders.Work(make, rows, word_tokenizer(100), steps, batch, decoders.RATES[moves], moves)


def peak() -> float | None:
    """The data sheet's rate of dense bf16 products; None where it isn't known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for word, value in PEAKS.items() if word in name.replace("-", " ").split()), None)


def one(way: Any, part: decoders.Work, toy: bool) -> dict[str, Any]:
    """1 + so many steps of one way, and what a step costs."""
    model = part.make_model()
    products = rate(model.config, sum(decoders.sizes(rows)[0] for rows in part.batches) // part.steps, toy)()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run = way(dataclasses.replace(part, make_model=lambda: model))
    gate = decoders.Gate()
    run(gate)
    steps = gate.steps[1:]
    lengths = [[len(row["input_ids"]) for row in rows] for rows in part.batches[1:]]
    flops = [decoders.decoder_flops(model, own, lora=part.moves == "lora") for own in lengths]
    per_second = [number / step["seconds"] for number, step in zip(flops, steps, strict=True)]
    return {
        "per_second": statistics.median(step["tokens"] / step["seconds"] for step in steps),
        "seconds_a_step": statistics.median(step["seconds"] for step in steps),
        "utilisation": spread([own / products["rate"] for own in per_second]),
        "mfu": spread([own / peak() for own in per_second]) if peak() else None,
        "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "losses": [step["loss"] for step in gate.steps],
        "tokens": sum(sum(own) for own in lengths) // len(lengths),
        "gflops_peak": products["rate"] / 1e9, "first_seconds": gate.steps[0]["seconds"],
    }  # fmt: skip


def measure(table: GpuTable, toy: bool = False, until: float = math.inf, compiled: bool = True) -> None:
    """All ways with LoRA and in full; each is stored at once, also one that can't be had."""
    rows: list[dict[str, Any]] = []
    for name, way in WAYS.items():
        for moves in ("lora", "full"):
            part = work(moves, toy, 2 if toy else 6)
            words = "LoRA" if moves == "lora" else "full fine-tuning"
            row = {"work": f"{words}, {part.batch} rows a step", "moves": moves, "method": name}
            if "compile" in name and (toy or not compiled):
                continue
            if time.monotonic() > until:
                row["missing"] = "no time was left"
            else:
                try:
                    row |= one(way, part, toy)
                except Exception as error:  # a package that is not there, out of memory
                    row["missing"] = why(error)
            gc.collect()
            torch.cuda.empty_cache()
            rows.append(row)
            for own in rows:
                bases = [r for r in rows if r["method"] in (DEFAULT, BEST) and r["moves"] == own["moves"]]
                pairs = [(r["method"], r["per_second"]) for r in bases if "per_second" in r and "per_second" in own]
                own["against"] = {base: own["per_second"] / value for base, value in pairs}
            table.replace({"part": PART}, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-compile", action="store_true", help="where there is no compiler for torch.compile")
    parser.add_argument("--toy", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    if device().type != "cuda" and not args.toy:
        print("no GPU: the GPU rows stay as they were last measured, with their date")
        return
    measure(GpuTable(6, "python tests/benchmarks/llama_1b.py", args.results), args.toy, compiled=not args.no_compile)


if __name__ == "__main__":
    main()
