"""The encoder as a fixed function from text to a vector: pooling, and vectors of millions of texts.

To copy: this file, methods/speedups.py, inputs/rows.py, inputs/tokenizing.py, core/anatomy.py, core/batches.py,
core/device.py, tasks/, torch and transformers (inputs/pretrained.py and what it names to load by name).
"""

import copy
import errno
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core import anatomy
from ..core.batches import collate, one_of, split_by_size, to_device
from ..core.device import DTYPES, choose_precision
from ..inputs.rows import checked_texts, text_iterator, token_limit
from ..inputs.tokenizing import encode_texts
from .speedups import shortcuts

POOLINGS = ("mean", "cls", "max")
CHUNK = 16_384  # texts read, sorted and written at a time: what bounds the memory
SLICE = 2_048  # texts tokenized at a time
AHEAD = 8  # batches made ready before they are needed


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: str = "mean") -> torch.Tensor:
    """One vector per text from (batch, tokens, hidden) and a 0/1 mask (batch, tokens): returns (batch, hidden).

    "mean" averages the real tokens, "max" takes the largest value of each dimension over them, "cls" takes the first
    real token.  The mask matters: without it padding is averaged in, and a text's vector depends on its neighbours.
    Source: Reimers & Gurevych 2019 (Sentence-BERT, arXiv:1908.10084), section 3.

    >>> hidden = torch.tensor([[[2.0], [4.0], [99.0]]])
    >>> [pool(hidden, torch.tensor([[1, 1, 0]]), p).item() for p in ("mean", "cls", "max")]
    [3.0, 2.0, 4.0]
    """
    one_of("pooling", pooling, POOLINGS)
    mask = attention_mask.bool().unsqueeze(-1)  # (batch, tokens, 1)
    if pooling == "cls":
        first = attention_mask.to(torch.int64).argmax(dim=1)  # (batch,), not 0 where padding is on the left
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    if pooling == "max":
        return hidden.masked_fill(~mask, torch.finfo(hidden.dtype).min).amax(dim=1)
    return hidden.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def extract_features(
    model: nn.Module | str | os.PathLike, texts: Iterable[Any], *, tokenizer: Any = None, pooling: str = "mean",
    layer: int | Sequence[int] = -1, batch_size: int | None = None, max_tokens: int | None = None,
    max_length: int | None = None, truncation: bool = True, normalize: bool = False, precision: str | None = None,
    out: str | os.PathLike | np.ndarray | None = None, progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """Vectors of texts: float32 (texts, hidden), in the order given; (texts, layers, hidden) for a list of layers.

    Args:
        model: a Transformers model (its encoder is used, without a task head), or a name for `load_model`.
        texts: strings, (text, text_pair) tuples, or lists of words: any iterable, a generator or a column of a
            Dataset too.  It is read in a background thread, 16,384 texts at a time, and never held as a whole.
        tokenizer: default: found by the model's name.
        pooling: "mean", "cls" or "max" over real tokens; see `pool`.
        layer: which layer's output, counted like hidden_states: 0 the embeddings, 1 the first layer, -1 the last.
            A list of layers costs one pass.
        batch_size: most texts a batch; default: no limit but `max_tokens`.
        max_tokens: most tokens a batch, padding counted; a text longer than that is a batch of its own.  Default:
            4,096 on a CPU, where more was no faster, and 32,768 on a GPU.
        max_length: cut longer texts, in tokens; default: what the model takes.
        truncation: False refuses longer texts instead of cutting them.
        normalize: divide each vector by its length, so that a dot product is a cosine.
        precision: compute with a copy of the weights in "fp32", "bf16" or "fp16"; "auto" is bf16 on a GPU that has
            it, fp16 on an older one, else fp32.  Default: no copy, the weights as they are.
        out: where the vectors go if not into new memory: a float32 array of the right shape, or the path of a new
            .npy file, which is written aside, renamed when complete, and returned memory-mapped, read-only.

    Of 16,384 texts the longest come first, so that padding is low and memory trouble shows early.  Dropout is off here;
    the model's train or eval mode is as before afterwards.
    Raises ValueError or TypeError naming the row for empty texts, None, and vectors that are not finite (fp16
    overflows); for a layer that does not exist; for an `out` that does not fit; FileExistsError and other OSErrors
    naming the file.
    """
    one_of("pooling", pooling, POOLINGS)
    iterator = text_iterator(texts)
    split_by_size([], [], batch_size=batch_size, max_tokens=max_tokens)
    name = model if isinstance(model, (str, os.PathLike)) else None
    if name is not None or tokenizer is None:
        from ..inputs.pretrained import load_model, load_tokenizer
    base = anatomy.base_of(model if name is None else load_model(name))
    if not hasattr(base, "config"):
        raise TypeError(f"model is a {type(model).__name__}; pass a Transformers model, or its name")
    if tokenizer is None:
        if not (name := name or base.config._name_or_path):
            raise ValueError("the model was not loaded by name, so its tokenizer is unknown; pass tokenizer=...")
        tokenizer = load_tokenizer(name)
    count = base.config.num_hidden_layers
    layers = list(layer) if isinstance(layer, (list, tuple, range)) else [layer]
    if wrong := [one for one in layers or [layer] if type(one) is not int or not -count - 1 <= one <= count]:
        raise ValueError(f"layer={wrong[0]!r}: choose 0 (embeddings) to {count}, or from the end, -1 to {-count - 1}")
    size = len(texts) if hasattr(texts, "__len__") else None
    shape = (base.config.hidden_size,) if layers == [layer] else (len(layers), base.config.hidden_size)
    _check_out(out, size, shape)
    device = next(base.parameters()).device
    base = _in_precision(base, precision, device)
    max_tokens = max_tokens or (4_096 if device.type == "cpu" else 32_768)
    limit = token_limit(max_length, tokenizer, base.config)
    work = _batches(iterator, tokenizer, batch_size, max_tokens, base, max_length=limit, truncation=truncation)
    with anatomy.evaluating(base), shortcuts(base), closing(_ahead(work)) as batches:
        chunks = _vectors(base, batches, layers, shape, pooling, normalize, size, progress)
        if isinstance(out, (str, os.PathLike)):
            return _written(chunks, os.fspath(out), shape)
        return _filled(chunks, out, size, shape)


def _check_out(out: Any, size: int | None, shape: tuple[int, ...]) -> None:
    """Refuse, before any work, an `out` that can't take float32 (size, *shape); size None: not known yet."""
    if out is None:
        return
    if isinstance(out, np.ndarray):
        rows = len(out) if size is None and out.ndim else size
        if out.dtype != np.float32 or out.shape != (rows, *shape) or not out.flags.writeable:
            got = f"{out.dtype} {out.shape}{'' if out.flags.writeable else ', read-only'}"
            raise ValueError(f"out is {got}; need a writeable float32 array of shape {(rows, *shape)}")
        return
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out is a {type(out).__name__}; pass the path of a new .npy file, or a float32 array")
    path = os.fspath(out)
    folder, aside, error = os.path.dirname(os.path.abspath(path)), f"{path}.part", None
    if os.path.lexists(path):
        error = errno.EEXIST, "out exists already; delete it or choose another name", path
    elif os.path.lexists(aside):
        error = errno.EEXIST, "a run writes this file, or was killed and left it; delete it", aside
    elif not os.path.isdir(folder):
        error = errno.ENOENT, "out is to lie in a folder that does not exist; make it first", folder
    elif (need := 4 * int(np.prod(shape)) * (size or 0)) > (free := shutil.disk_usage(folder).free):
        error = errno.ENOSPC, f"{size} vectors need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free", path
    if error:
        raise OSError(*error)  # FileExistsError and FileNotFoundError, by the number


def _in_precision(base: nn.Module, precision: str | None, device: torch.device) -> nn.Module:
    """The model itself, or a copy with its weights in another precision."""
    if precision is None:
        return base
    one_of("precision", precision, ("auto", "fp32", "bf16", "fp16", None))  # None: as the weights are
    dtype = DTYPES[choose_precision(device, precision)[0]]
    has_it = {p.dtype for p in base.parameters() if p.is_floating_point()} == {dtype}
    return base if has_it else copy.deepcopy(base).to(dtype)


def _batches(
    texts: Iterator[Any], tokenizer: Any, batch_size: int | None, max_tokens: int, base: nn.Module, **options: Any
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(texts in this chunk, batch) with `places`, int64 (batch,): where in the chunk each of the batch's texts is.

    A chunk is checked as a whole, then tokenized in slices, the longest texts (in characters) first, so that
    computing begins after the first slice.
    """
    start, pad = 0, anatomy.pad_id(tokenizer, base.config)
    while chunk := list(islice(texts, CHUNK)):
        checked_texts(chunk, range(start, start + len(chunk)))
        order = sorted(range(len(chunk)), key=lambda i: -len(str(chunk[i])))
        for first in range(0, len(order), SLICE):
            part = order[first : first + SLICE]
            rows = encode_texts([chunk[i] for i in part], tokenizer, indices=[start + i for i in part], **options)
            sizes = [min(len(row["input_ids"]), max_tokens) for row in rows]  # what is longer is alone in its batch
            for indices in split_by_size(range(len(rows)), sizes, batch_size=batch_size, max_tokens=max_tokens):
                batch = collate([rows[i] for i in indices], pad_token_id=pad)
                batch["places"] = torch.tensor([part[i] for i in indices])
                yield len(chunk), batch
        start += len(chunk)


def _ahead(work: Iterator[Any]) -> Iterator[Any]:
    """What `work` yields, made in a background thread before it is asked for; its errors are raised here.

    Closing this iterator ends the thread, after the item it is at.
    """
    end = object()
    pool = ThreadPoolExecutor(1, "ftlib-features")
    try:
        ready = deque(pool.submit(next, work, end) for _ in range(AHEAD))
        while (item := ready.popleft().result()) is not end:
            ready.append(pool.submit(next, work, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        work.close()


def _vectors(
    base: nn.Module, batches: Iterator, layers: list[int], shape: tuple[int, ...], pooling: str, normalize: bool,
    size: int | None, progress: bool,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Chunks of vectors in the order of the texts: float32 (texts in the chunk, *shape); one copy from the GPU each."""
    from tqdm.auto import tqdm

    count = base.config.num_hidden_layers
    device = next(base.parameters()).device
    start = done = 0
    with tqdm(desc="features", unit="text", total=size, leave=False, disable=not progress) as bar:
        for rows, batch in batches:
            if done == 0:
                chunk = torch.empty(rows, *shape, device=device)
            batch = to_device(batch, device)
            places = batch.pop("places")
            output = base(**batch, output_hidden_states=any(i not in (-1, count) for i in layers))
            states = [output.last_hidden_state if i in (-1, count) else output.hidden_states[i] for i in layers]
            pooled = [pool(hidden.float(), batch["attention_mask"], pooling) for hidden in states]  # (batch, hidden)
            vectors = torch.stack(pooled, dim=1)  # (batch, layers, hidden)
            if normalize:
                vectors = nn.functional.normalize(vectors, dim=-1)
            chunk[places] = vectors.view(-1, *shape)
            done += len(places)
            bar.update(len(places))
            if done == rows:
                found = chunk.cpu().numpy()
                finite = np.isfinite(found).reshape(rows, -1).all(axis=1)  # (rows,)
                if not finite.all():
                    text = "is not finite; look for NaN in the weights, and in fp16 use bf16 or fp32"
                    raise ValueError(f"row {start + int(finite.argmin())}: the vector {text}")
                yield found
                start, done = start + rows, 0


def _filled(
    chunks: Iterator[np.ndarray], out: np.ndarray | None, size: int | None, shape: tuple[int, ...]
) -> np.ndarray:
    """The chunks one after the other in `out`, or in a new array, which grows where the number is not known."""
    vectors = np.empty((size or 0, *shape), dtype=np.float32) if out is None else out
    stop = 0
    for chunk in chunks:
        start, stop = stop, stop + len(chunk)
        if stop > len(vectors):
            if out is not None:
                raise ValueError(f"out has {len(out)} rows, but there are more texts; it holds the first {start}")
            vectors.resize((stop, *shape), refcheck=False)
        vectors[start:stop] = chunk
    if stop < len(vectors):
        raise ValueError(f"only {stop} texts came for {len(vectors)} rows")
    return vectors


def _written(chunks: Iterator[np.ndarray], path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The chunks one after the other in a .npy file, which is then memory-mapped.

    Appended with plain writes: a full disk is then an error that can be told (into a memory map it kills the process),
    and pages written do not count as this process's memory.  NumPy's header leaves room for the number of texts.
    """
    aside, count = Path(f"{path}.part"), 0
    about = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
    file = open(aside, "xb")
    try:
        with file:
            np.lib.format.write_array_header_1_0(file, about)
            for chunk in chunks:
                file.write(chunk.astype("<f4", copy=False).data)
                file.flush()
                count += len(chunk)
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, about | {"shape": (count, *shape)})
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(error.errno, f"{error.strerror} (after {count} vectors)", path) from error
        raise
    return np.load(path, mmap_mode="r")
