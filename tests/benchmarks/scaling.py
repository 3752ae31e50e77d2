"""Results of notebook 06: the loss of tiny decoders from nothing, against parameters, tokens and operations.

    python tests/benchmarks/scaling.py    # writes results/scaling.json; resumes; two trainings at a time

Decoders (Llama) of MODELS, (width, layers), read WikiText-2 in 512 pieces, each token once: the loss of the next token
on test rows, for every number of UPDATES of BATCH rows, each a run of its own to the end of its schedule, in float32.
"operations" is 6 · N · D, all parameters times tokens times 6.  The rate is searched for the smallest and for one
other (SEARCHED), on validation rows, until the best is inside of what was tried; those of the rest lie on the power of
the width through both.  A run each; of the smallest one a seed more for each of SEEDS, to say what chance does.

The grid takes 10 to 15 minutes of two cores (0.03 s an update of the smallest, 0.25 s one of the largest).
"""

import functools
import itertools
import math
from typing import Any

import tokenizers
import torch
import transformers
from record import Job, Table, side_by_side, started
from tokenizers import decoders, models, pre_tokenizers, trainers

import ftlib

ABOUT = "Tiny decoders from nothing on WikiText-2: loss against parameters, tokens, operations"
MODELS = ((32, 2), (64, 2), (96, 3), (128, 4), (192, 4))
UPDATES, BATCH, LENGTH, ASKED = (100, 200, 400, 800), 16, 64, 200  # tokens a row; rows of the other splits
SEARCHED, SEARCH_UPDATES, RATES = ((32, 2), (128, 4)), 400, (2e-3, 4e-3, 8e-3)
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
WORKERS = 2
TOY = {
    "MODELS": ((32, 1), (64, 1)), "UPDATES": (1, 2), "BATCH": 2, "ASKED": 2, "SEARCHED": ((32, 1), (64, 1)),
    "SEARCH_UPDATES": 2, "RATES": (1e-3,), "SEEDS": (0, 1), "WORKERS": 0,
}  # fmt: skip


@functools.cache
def corpus() -> Any:
    return ftlib.load_corpus("wikitext-2")


@functools.cache
def pieces() -> Any:
    """A byte-level tokenizer of 512 pieces, as the notebook trains it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = dict(special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(corpus()["train"]["text"][:60], trainers.BpeTrainer(vocab_size=512, **options))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


@functools.cache
def rows_of(split: str) -> list[dict]:
    stream = ftlib.PackedText(corpus()[split], pieces(), LENGTH, task="causal-lm")
    return list(itertools.islice(stream, max(*UPDATES, SEARCH_UPDATES) * BATCH if split == "train" else ASKED))


def trained(width: int, layers: int, updates: int, seed: int, split: str, rate: float) -> dict[str, float]:
    config = transformers.LlamaConfig(
        vocab_size=len(pieces()), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        initializer_range=width**-0.5, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model, tokens = transformers.LlamaForCausalLM(config), updates * BATCH * LENGTH
    how = dict(max_steps=updates, batch_size=BATCH, learning_rate=rate, seed=seed, precision="fp32", progress=False)
    rows = rows_of("train")[: updates * BATCH]
    run = ftlib.fit(model, rows, tokenizer=pieces(), config=ftlib.TrainConfig(**how))
    size, loss = model.num_parameters(), ftlib.evaluate(model, rows_of(split))["loss"]
    return {"loss": loss, "parameters": size, "tokens": tokens, "operations": 6 * size * tokens, "seconds": run.seconds}


def searched(table: Table, width: int, layers: int) -> float:
    key = {"part": "rates", "width": width, "layers": layers, "updates": SEARCH_UPDATES, "seed": SEARCH_SEED}
    measure = functools.partial(trained, width, layers, SEARCH_UPDATES, SEARCH_SEED, "validation")
    return table.best_rate(key, RATES, measure, lambda row: -row["loss"])


def rate_for(table: Table, width: int) -> float:
    """On the power of the width through the two that are searched."""
    (narrow, _), (wide, _) = SEARCHED
    first, last = (searched(table, *own) for own in SEARCHED)
    return float(f"{first * (width / narrow) ** (math.log(last / first) / math.log(wide / narrow)):.3g}")


def tested(table: Table, width: int, layers: int, updates: int, seed: int) -> None:
    rate = rate_for(table, width)
    key = {"part": "loss", "width": width, "layers": layers, "updates": updates, "seed": seed, "rate": rate}
    table.row(key, lambda: trained(width, layers, updates, seed, "test", rate))


def jobs() -> list[Job]:
    """Both rates, then the largest first."""
    found = [Job("one rate", (searched, *SEARCHED[1])), Job("rates", (rate_for, MODELS[0][0]), "one rate")]
    runs = [(*own, updates, SEEDS[0]) for updates in sorted(UPDATES, reverse=True) for own in MODELS[::-1]]
    runs += [(*MODELS[0], max(UPDATES), seed) for seed in SEEDS[1:]]
    return found + [Job(f"{run}", (tested, *run), "rates") for run in runs]


def main() -> None:
    side_by_side(started(globals(), ABOUT), jobs(), workers=WORKERS)


if __name__ == "__main__":
    main()
