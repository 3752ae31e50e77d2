"""Token lengths of the training sentences of rotten-tomatoes, for the programs that run without the corpus.

    python tests/benchmarks/lengths.py    # writes tests/benchmarks/results/lengths.json

MiniLM's tokenizer (BERT's uncased WordPiece), special tokens included, cut at 128.
"""

from collections import Counter

import torch
from record import Table

from ftlib.show.tables import stored_results


def measured_lengths(seed: int = 0) -> list[int]:
    """The stored lengths of all sentences, in an order drawn from `seed`."""
    [row] = stored_results("lengths")["rows"]
    lengths = [int(length) for length, count in row["histogram"].items() for _ in range(count)]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    return [lengths[i] for i in order.tolist()]


def main() -> None:
    import ftlib

    rows = ftlib.tokenize(ftlib.load_corpus("rotten-tomatoes")["train"], ftlib.load_tokenizer("minilm"), max_length=128)
    histogram = dict(sorted(Counter(len(ids) for ids in rows["input_ids"]).items()))
    table = Table("lengths", "python tests/benchmarks/lengths.py", "tokens a sentence: number of sentences")
    key = {"corpus": "rotten-tomatoes", "split": "train", "tokenizer": "minilm"}
    table.replace(key, [{"sentences": len(rows), "histogram": {str(k): v for k, v in histogram.items()}}])


if __name__ == "__main__":
    main()
