"""A million sentences in bounded memory: tokenize, and extract_features into a memory-mapped file.

    python tests/benchmarks/long_features.py [rows]    # rows of tests/benchmarks/results/long_features.json

What is measured is everything around the encoder, so the encoder is tiny: a BERT of 1 layer, hidden size 32, with
random weights and MiniLM's tokenizer.  The rows are the sentences of rotten-tomatoes again and again, each time with
the words rotated by one more place, made one by one by a generator: their text is never in memory as a whole.  For
`tokenize` the generator fills a Dataset on disk.  One CPU thread, and a process for each of the two.  Peak memory is
the process's largest resident size, pages of memory-mapped files counted; `before_gb` is its size when Python, the
libraries, the sentences and the model are loaded, and `at_tenth_gb` the peak after a tenth of the rows.  On a busy
machine `seconds` counts the waiting too; `cpu_seconds` does not.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from record import RESULTS, Table

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


def tokenized(count: int) -> dict[str, float]:
    """`tokenize` on a Dataset on disk; 64 of its rows compared with the tokenizer's own."""
    import datasets

    tokenizer = ftlib.load_tokenizer("minilm")
    texts = list(ftlib.load_corpus("rotten-tomatoes")["train"]["text"])
    with tempfile.TemporaryDirectory() as folder:

        def made() -> Iterator[dict[str, Any]]:
            yield from ({"text": text, "label": i % 2} for i, text in enumerate(sentences(texts, count, {})))

        data = datasets.Dataset.from_generator(made, cache_dir=folder)
        ftlib.tokenize(data.select(range(1000)), tokenizer, max_length=128)
        seen = {"before_gb": peak_gb()}
        ftlib.tokenize(data.select(range(count // 10)), tokenizer, max_length=128)
        seen["at_tenth_gb"] = peak_gb()
        start, cpu = time.perf_counter(), time.process_time()
        found = ftlib.tokenize(data, tokenizer, max_length=128)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = peak_gb()
        if len(found) != count:
            raise RuntimeError(f"{len(found)} rows came of {count}")
        for i in np.random.default_rng(0).choice(count, size=64, replace=False).tolist():
            ids = tokenizer(data[i]["text"], max_length=128, truncation=True)["input_ids"]
            if (found[i]["input_ids"], found[i]["labels"]) != (ids, i % 2):
                raise RuntimeError(f"row {i} is not what the tokenizer makes of it")
        size = sum(Path(file["filename"]).stat().st_size for file in found.cache_files) / 1e9
    sizes = {**seen, "peak_gb": peak, "file_gb": size}
    return {**sizes, "per_second": count / seconds, "seconds": seconds, "cpu_seconds": cpu, "threads": 1}


def extracted(count: int) -> dict[str, float]:
    """`extract_features` with a generator; 64 of its vectors compared with those of the texts one by one."""
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


PARTS = {"tokenize": tokenized, "extract_features": extracted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--part", choices=PARTS, help="one of the two, in this process")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    about = "Many short rows: tokenize, and extract_features with a tiny random BERT (1 layer, hidden 32)"
    table = Table("long_features", "python tests/benchmarks/long_features.py [rows]", about, folder=options.results)
    torch.set_num_threads(1)
    if options.part:
        table.row({"part": options.part, "rows": options.rows}, lambda: PARTS[options.part](options.rows))
        return
    for part in PARTS:  # a process each: a peak never goes down
        command = [sys.executable, __file__, str(options.rows), "--part", part, "--results", str(options.results)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
