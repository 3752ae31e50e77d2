"""The encoder as a fixed function from text to a vector: pooling, and vectors of millions of texts.

To copy: this file, methods/speedups.py, inputs/{agreement,files,rows,sentence_folders,tokenizing}.py,
core/{anatomy,batches,device}.py, tasks/, torch and transformers (inputs/pretrained.py and what it names, for names).
"""

import copy
import errno
import inspect
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..core import anatomy
from ..core.batches import collate, one_of, refuse, split_by_size, to_device
from ..core.device import DTYPES, choose_precision, computing
from ..inputs.agreement import Padding, agree, token_ids, vocabulary
from ..inputs.rows import checked_texts, text_iterator, token_limit
from ..inputs.sentence_folders import Recipe, recipe_of
from ..inputs.tokenizing import encode_texts
from ..tasks.embedding import POOLINGS, pool
from ..tasks.task import vectors_of
from .speedups import shortcuts

CHUNK = 16_384  # texts read, sorted and written at a time: what bounds the memory
SLICE, CHARACTERS = 2_048, 2**22  # most texts, and about as many characters, tokenized at a time
AHEAD = 2  # slices tokenized before they are needed


def extract_features(
    model: nn.Module | str | os.PathLike, texts: Iterable[Any], *, tokenizer: Any = None, pooling: str | None = None,
    layer: int | Sequence[int] = -1, batch_size: int | None = None, max_tokens: int | None = None,
    max_length: int | None = None, truncation: bool = True, normalize: bool | None = None, precision: str | None = None,
    out: str | os.PathLike | None = None, progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """Vectors of texts: float32 (texts, hidden), in the order given; (texts, layers, hidden) for a list of layers.

    Args:
        model: a Transformers model (its encoder is used, without a task head or decoder), or a name for `load_model`.
            The name of a sentence-transformers folder gives the vectors that its `encode` gives: with its pooling,
            Dense and Normalize, its max_seq_length and its default prompt; minilm is one.
        texts: strings, (text, text_pair) tuples, or lists of words: any iterable, read 16,384 texts at a time, the
            longest of them computed first, and never held as a whole.
        tokenizer: default: found by the model's name.
        pooling: one of POOLINGS over real tokens; see `pool`.  Default: what the folder named says, else "mean".
        layer: which layer's output, counted like hidden_states: 0 the embeddings, 1 the first layer, -1 the last.
            A list of layers costs one pass.  With a pooling or layer of your own a folder's Dense and Normalize,
            which were made for its own, are left out.
        batch_size, max_tokens: most texts (default: any number), and most tokens with padding, a batch (default: 4,096
            on a CPU, 32,768 on a GPU); a longer text is a batch of its own.
        max_length: cut longer texts, in tokens; default: what the folder says, else what the model takes.
        truncation: False refuses longer texts instead of cutting them.
        normalize: divide each vector by its length, so that a dot product is a cosine.  Default: as the folder says.
        precision: compute with a copy of the weights in "fp32", "bf16" or "fp16", or what `choose_precision` says
            for "auto".  bf16 on a CPU is products alone: a cosine of 0.9999 to fp32.  Default: the weights as they are.
        out: the path of a new .npy file, written aside, renamed when complete, and returned memory-mapped, read-only.

    Dropout is off here; the model's train or eval mode is as before afterwards.
    Raises ValueError or TypeError naming the row for empty texts, None, and vectors that are not finite (fp16
    overflows); for a layer that does not exist; for an `out` that does not fit; for what a folder asks and is not done
    here; for a model with prompts, which are not in its encoder; FileExistsError and other OSErrors naming the file.
    """
    one_of("pooling", POOLINGS[0] if pooling is None else pooling, POOLINGS)
    iterator = text_iterator(texts)
    split_by_size([], [], batch_size=batch_size, max_tokens=max_tokens)
    base, tokenizer, recipe = _opened(model, tokenizer, pooling)
    count = base.config.num_hidden_layers
    layers = list(layer) if isinstance(layer, (list, tuple, range)) else [layer]
    if wrong := [one for one in layers or [layer] if type(one) is not int or not -count - 1 <= one <= count]:
        raise ValueError(f"layer={wrong[0]!r}: choose 0 (embeddings) to {count}, or from the end, -1 to {-count - 1}")
    device = next(base.parameters()).device
    own = pooling is None and layer == -1
    dense, unit = nn.Sequential(*recipe.dense if own else ()).to(device), own and recipe.normalize
    unit = unit if normalize is None else normalize
    wide = getattr(base.config, "word_embed_proj_dim", base.config.hidden_size)  # OPT's may be narrower
    width = dense(torch.zeros(1, wide, device=device)).shape[-1]
    size = len(texts) if hasattr(texts, "__len__") else None
    shape = (width,) if layers == [layer] else (len(layers), width)
    if out is not None:
        _check_out(out, size or 0, shape)
    work = partial(
        _batches, tokenizer=tokenizer, padding=agree(base, tokenizer), known=vocabulary(base), batch_size=batch_size,
        max_tokens=max_tokens or (4_096 if device.type == "cpu" else 32_768), truncation=truncation,
        max_length=token_limit(recipe.max_length if max_length is None else max_length, tokenizer, base.config),
    )  # fmt: skip
    autocast = nullcontext
    if precision is not None:
        one_of("precision", precision, ("auto", "fp32", "bf16", "fp16", None))  # None: as the weights are
        chosen, _ = choose_precision(device, precision)
        dtype, mixed = DTYPES[chosen], chosen == "bf16" and device.type == "cpu"
        if {p.dtype for p in base.parameters() if p.is_floating_point()} != {dtype}:
            linear = {id(p) for m in base.modules() if type(m) is nn.Linear for p in m.parameters()}
            own = {id(p): p for p in base.parameters()}  # what is not converted is shared, not copied
            for key in linear if mixed else own:
                own[key] = nn.Parameter(own[key].detach().to(dtype), requires_grad=False)
            base = copy.deepcopy(base, own)
            base = base if mixed else base.to(dtype)  # its buffers
            autocast = computing(device, chosen) if mixed else nullcontext
    with anatomy.evaluating(base), shortcuts(base), autocast(), closing(_ahead(iterator, recipe, work)) as batches:
        chunks = _vectors(base, batches, layers, shape, pooling or recipe.pooling, dense, unit, size, progress)
        if out is not None:
            return _written(chunks, os.fspath(out), shape)
        memory = bytearray()  # which grows
        for chunk in chunks:
            memory += chunk.data
        return np.frombuffer(memory, np.float32).reshape(-1, *shape)


def _opened(model: Any, tokenizer: Any, pooling: str | None) -> tuple[nn.Module, Any, Recipe]:
    """The encoder, its tokenizer, and how vectors are made of what it computes."""
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    if name is not None or tokenizer is None:
        from ..inputs.pretrained import _locate, load_model, load_tokenizer, tokenizer_of
    own = vectors_of(model) if isinstance(model, nn.Module) else {}  # a model of vectors knows how they are made
    recipe = recipe_of(_locate(name, {})) if name is not None else Recipe(**own)
    if name is not None:
        model = load_model(name := recipe.place or name)
    base = anatomy.base_of(model)
    both = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    base = base.get_encoder() if both else base
    if not all(hasattr(getattr(base, "config", None), key) for key in ("num_hidden_layers", "hidden_size")):
        raise TypeError(f"model is a {type(model).__name__}; pass a Transformers model, or its name")
    known = name or base.config._name_or_path
    refuse(
        (both and recipe.folder and "t5" not in anatomy.kind_of(model), f"{recipe.folder}: sentence-transformers takes "
         "this model's decoder, which is not done here; pass the model for its encoder's vectors"),
        (getattr(model, "prompt_encoder", None) is not None, "the prompts live around the encoder, whose features "
         "would be those without; take the hidden states of model(..., output_hidden_states=True)"),
    )  # fmt: skip
    looked = name is None and pooling is None and not own and os.path.isdir(known)
    said = recipe_of(known) if looked else Recipe()
    for odd, what in (
        (said.pooling != "mean" or said.dense, f"{known}/modules.json says pooling {said.pooling}, Dense "
         f"{len(said.dense)} times; a model passed as an object gives the mean: pass the folder, or pooling="),
        (pooling == "cls" and any(getattr(module, "is_causal", False) for module in base.modules()), "a decoder's "
         "first token sees no other; pooling='lasttoken' has seen the text"),
    ):  # fmt: skip
        if odd:
            warnings.warn(what, stacklevel=3)
    if tokenizer is None:
        tokenizer = load_tokenizer(name) if name else tokenizer_of(base)
    return base, tokenizer, recipe


def _check_out(out: Any, size: int, shape: tuple[int, ...]) -> None:
    """Refuse, before any work, an `out` that can't take float32 (size, *shape); size: 0 where it is not known yet."""
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out is a {type(out).__name__}; pass the path of a new .npy file")
    path = os.fspath(out)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "out exists already; delete it or choose another name", path)
    need, free = 4 * int(np.prod(shape)) * size, shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    if need > free:
        said = f"{size} vectors need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        raise OSError(errno.ENOSPC, said, path)


def _batches(
    part: tuple, *, tokenizer: Any, padding: Padding, known: int | None, batch_size: int | None, max_tokens: int,
    **options: Any,
) -> list[tuple[int, dict[str, torch.Tensor]]]:  # fmt: skip
    """(texts in the chunk, batch with `places`, int64 (batch,), in it); part: these texts, places, numbers, texts."""
    count, places, indices, texts = part
    rows = encode_texts(texts, tokenizer, indices=indices, **options)
    for row, i, place in zip(rows, indices, places, strict=True):
        token_ids(row["input_ids"], known, f"row {i}")
        row["places"] = place
    sizes = [min(len(row["input_ids"]), max_tokens) for row in rows]  # what is longer is alone in its batch
    cuts = split_by_size(range(len(rows)), sizes, batch_size=batch_size, max_tokens=max_tokens, alike=padding.alike)
    how = dict(pad_token_id=padding.id, padding_side=padding.side)
    return [(count, collate([rows[i] for i in own], **how)) for own in cuts]


def _ahead(texts: Iterator[Any], recipe: Recipe, work: Callable) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Batches, tokenized in a background thread before they are asked for, of texts that are read in this one.

    So a database's cursor can be read, a text that does not come be interrupted.  Closing this ends thread and texts.
    """
    start, pool, ready = 0, ThreadPoolExecutor(1, "ftlib-features"), deque()
    try:
        while chunk := list(islice(texts, CHUNK)):
            checked_texts(chunk, range(start, start + len(chunk)))
            lengths = [min(len(str(text)), CHARACTERS) for text in chunk]  # what is longer is a slice of its own
            for part in split_by_size(range(len(chunk)), lengths, batch_size=SLICE, max_tokens=CHARACTERS):
                own = len(chunk), part, [start + i for i in part], [recipe.text(chunk[i]) for i in part]
                ready.append(pool.submit(work, own))
                if len(ready) > AHEAD:
                    yield from ready.popleft().result()
            start += len(chunk)
        while ready:
            yield from ready.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        if inspect.isgenerator(texts):
            texts.close()


def _vectors(
    base: nn.Module, batches: Iterator, layers: list[int], shape: tuple[int, ...], pooling: str,
    dense: nn.Module, unit: bool, size: int | None, progress: bool,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Chunks of vectors in the order of the texts: float32 (texts in the chunk, *shape); one copy from the GPU each."""
    last, device = (-1, base.config.num_hidden_layers), next(base.parameters()).device
    typed = "token_type_ids" in inspect.signature(type(base).forward).parameters
    start = done = 0
    with tqdm(desc="features", unit="text", total=size, leave=False, disable=not progress) as bar:
        for rows, batch in batches:
            if done == 0:
                chunk = torch.empty(rows, *shape, device=device)
            batch = to_device({key: value for key, value in batch.items() if typed or key != "token_type_ids"}, device)
            places = batch.pop("places")
            output = base(**batch, output_hidden_states=any(i not in last for i in layers))
            states = [output.last_hidden_state if i in last else output.hidden_states[i] for i in layers]
            mask = batch["attention_mask"]  # the last layer's output may be on another device
            if any(hidden.shape[:2] != mask.shape for hidden in states):
                raise ValueError(f"{anatomy.kind_of(base)}: this layer has fewer places than tokens; take layer=-1")
            pooled = dense(torch.stack([pool(hidden.float().to(device), mask, pooling) for hidden in states], dim=1))
            pooled = nn.functional.normalize(pooled, dim=-1) if unit else pooled  # (batch, layers, width)
            chunk[places] = pooled.view(len(places), *shape)
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


def _written(chunks: Iterator[np.ndarray], path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The chunks one after the other in a .npy file, which is then memory-mapped.

    Plain writes, as a full disk kills a process that writes into a memory map; the header has room for the number.
    """
    aside, count = Path(f"{path}.part"), 0
    about = {"descr": "<f4", "fortran_order": False}
    file = open(aside, "xb")
    try:
        with file:
            np.lib.format.write_array_header_1_0(file, about | {"shape": (0, *shape)})
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
