"""Vectors of a million sentences in bounded memory: tokenizing, extract_features, a memory-mapped file.

    python tests/benchmarks/long_features.py [rows]    # adds a row to tests/benchmarks/results/long_features.json

What is measured is everything around the encoder, so the encoder is tiny: a BERT of 1 layer, hidden size 32, with
random weights and MiniLM's tokenizer.  The rows are the sentences of rotten-tomatoes again and again, each time with
the words rotated by one more place, made one by one by a generator: their text is never in memory as a whole.  One
CPU thread.  Peak memory is the process's largest resident size; `before_gb` is its size when Python, the
libraries, the sentences and the model are loaded, and `at_tenth_gb` the peak after a tenth of the rows.  On a busy
machine `seconds` counts the waiting too; `cpu_seconds` does not.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from record import Table

import ftlib


def peak_gb() -> float:
    """Largest resident size of this process so far, in 10^9 bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * (1 if sys.platform == "darwin" else 1024) / 1e9


def sentences(texts: list[str], count: int, seen: dict[str, float]) -> Iterator[str]:
    words = [text.split() for text in texts]
    for i in range(count):
        if i == count // 10:
            seen["at_tenth_gb"] = peak_gb()
        turn, place = divmod(i, len(words))
        cut = turn % len(words[place])
        yield " ".join(words[place][cut:] + words[place][:cut])


def measure(count: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = ftlib.load_tokenizer("minilm")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = ftlib.unpad(transformers.BertModel(config).eval())
    texts = list(ftlib.load_corpus("rotten-tomatoes")["train"]["text"])
    ftlib.extract_features(model, texts[:64], tokenizer=tokenizer, max_length=128)
    seen = {"before_gb": peak_gb()}
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        path = Path(folder) / "vectors.npy"
        rows = sentences(texts, count, seen)
        vectors = ftlib.extract_features(model, rows, tokenizer=tokenizer, max_length=128, out=path, progress=True)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = peak_gb()
        some = np.random.default_rng(0).choice(count, size=64, replace=False)
        again = dict.fromkeys(some.tolist())
        for i, text in enumerate(sentences(texts, count, {})):
            if i in again:
                again[i] = text
        alone = ftlib.extract_features(model, list(again.values()), tokenizer=tokenizer, max_length=128, batch_size=1)
        np.testing.assert_allclose(vectors[list(again)], alone, atol=1e-5)  # the right rows in the right places
        size = path.stat().st_size / 1e9
    sizes = {**seen, "peak_gb": peak, "file_gb": size}
    return {**sizes, "per_second": count / seconds, "seconds": seconds, "cpu_seconds": cpu, "threads": 1}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    about = "extract_features on many short rows, tiny random BERT (1 layer, hidden 32), into a memory-mapped file"
    Table("long_features", "python tests/benchmarks/long_features.py [rows]", about).row(
        {"rows": count}, lambda: measure(count)
    )


if __name__ == "__main__":
    main()
