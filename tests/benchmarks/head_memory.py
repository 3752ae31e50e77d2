"""What head and loss of a language model hold in memory: all logits at once, or a chunk of them after the other.

    python tests/benchmarks/head_memory.py    # writes results/head_memory.json

Random hidden states of 4,096 tokens, 576 wide (SmolLM2-135M's), go through a linear head and its summed cross-entropy,
forward and backward, for vocabularies of 32,000 (Llama 2), 50,257 (GPT-2) and 151,936 words (Qwen2).  The head trains,
or is frozen, as with LoRA; bf16 is autocast's.  Memory is the largest resident memory during one step, less what the
process held before it (weights and hidden states), each in a process of its own.  Beside them, where torch has it,
F.linear_cross_entropy in chunks, which serves a plain linear head.
"""

import argparse
import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import alone
from record import RESULTS, Table
from torch import nn

import ftlib
from ftlib.methods.token_losses import chunked_cross_entropy

WORDS = (32_000, 50_257, 151_936)
TORCHS = "F.linear_cross_entropy"
METHODS = ("all logits at once", "in chunks", *([TORCHS] if hasattr(F, "linear_cross_entropy") else []))


def loss_of(method: str, head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if method == "in chunks":
        return chunked_cross_entropy(head, hidden, targets)
    if method == TORCHS:
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def one(method: str, words: int, precision: str, trains: bool, tokens: int) -> dict[str, Any]:
    def step(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> float:
        hidden.grad = head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = loss_of(method, head, hidden, targets)
        loss.backward()
        return loss.item()

    def made(words: int, tokens: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
        head = nn.Linear(576, words, bias=False).requires_grad_(trains)
        return head, torch.randn(tokens, 576, requires_grad=True), torch.randint(words, (tokens,))

    torch.manual_seed(0)
    step(*made(100, 10))  # what is loaded at a first use is no memory of the loss
    work = made(words, tokens)
    with ftlib.measure() as before:
        pass
    with ftlib.measure() as cost:
        loss = step(*work)
    return {"mb": cost.peak_mb - before.peak_mb, "loss": loss / tokens, "how": cost.how}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="measure this row, JSON, in this process")
    parser.add_argument("--toy", action="store_true", help="few words and tokens: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(**json.loads(args.one))))
        return
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    about = "Memory of the head and the loss of a language model, beyond weights and hidden states"
    table = Table("head_memory", "python tests/benchmarks/head_memory.py", about, folder=args.results)
    cases = itertools.product(WORDS, ("fp32", "bf16"), (True, False))
    for words, precision, trains in [(500, "fp32", True)] if args.toy else cases:
        key = {"words": words, "precision": precision, "trains": trains, "tokens": 100 if args.toy else 4096}
        methods = [method for method in METHODS if precision == "fp32" or method != TORCHS]
        rows = [{"method": name} | alone(__file__, "--one", json.dumps({"method": name} | key)) for name in methods]
        table.replace(key, [row | {"threads": torch.get_num_threads()} for row in rows])


if __name__ == "__main__":
    main()
