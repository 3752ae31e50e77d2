"""Let a language model go on from texts or conversations, or write what a text is to become.

Batches are of about one length, padded in front, for an encoder behind.

To copy: this file, core/anatomy.py, core/batches.py, inputs/agreement.py, methods/speedups.py, tasks/, torch and
transformers (inputs/pretrained.py and what it names, to find a tokenizer by the model's name).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..core import anatomy
from ..core.batches import collate, number, refuse, split_by_size, to_device, whole
from ..inputs.agreement import Padding, agree, inputs_of, token_ids, vocabulary
from ..methods.speedups import shortcuts
from ..tasks.language_modeling import end_ids
from ..tasks.seq2seq import start_ids
from ..tasks.task import TASKS, Task, kind_of


def generate(
    model: nn.Module, prompts: Iterable[Any], *, tokenizer: Any = None, max_new_tokens: int = 64, batch_size: int = 16,
    temperature: float = 0.0, top_p: float = 1.0, top_k: int | None = None, num_beams: int = 1,
    stop: str | Sequence[str] = (), seed: int = 0, autocast: Any = None, progress: bool = False, tokens: bool = False,
) -> list[Any]:  # fmt: skip
    """The answers of a language model, in the order of the prompts: the new text alone, without special tokens.

    Args:
        prompts: texts; conversations, [{"role": ..., "content": ...}, ...], by the tokenizer's template; or token ids.
            Of an encoder-decoder model: the sources, texts with their prefix, or token ids.
        tokenizer: default: found by the model's name.
        max_new_tokens: longest answer; an end token (the tokenizer's, the generation config's) ends it sooner.
        batch_size: prompts at a time, longest first, each of num_beams rows.
        temperature: 0: the likeliest token each time (greedy), or with num_beams the likeliest answer found; above 0
            tokens are drawn: of the `top_k` likeliest, of the likeliest that have `top_p` of the probability together.
        stop: texts that end an answer, and are cut off.
        seed: of the draws, which depend on it and the prompt's place in the list, not on the batch; the global random
            state is neither read nor changed.
        autocast: a context manager for the forward passes, torch.autocast("cpu", torch.bfloat16) say; weights are cast
            once, which takes half as much memory again.
        tokens: the new token ids of each answer, its end token included, in place of text; without `stop`.

    Of the model's generation config the end tokens count, and nothing else: no sampling, lengths or penalties.  Of text
    to text the token an answer starts with, a first or last one that is forced, and words that are barred as well.
    Raises TypeError for what is no list of prompts and for a model that can't go on; ValueError for options that make
    no sense and, naming the prompt, for messages that the template refuses, for tokens that the model has no embedding
    or position for, and for logits that are nan.
    """
    if isinstance(prompts, (str, bytes, Mapping)) or hasattr(prompts, "columns") or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts is a {type(prompts).__name__}; pass a list of prompts, even for one: [prompt]")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    refuse((tokens and stop, f"stop={stop!r}: is of texts; leave it out with tokens=True"))
    record = _check(model, whole("max_new_tokens", max_new_tokens), temperature, top_p, top_k, num_beams, stop)
    if tokenizer is None:
        from ..inputs.pretrained import tokenizer_of

        tokenizer = tokenizer_of(model)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)  # in front of the padding
    ids = _ids(model, prompts, tokenizer, max_new_tokens + virtual, record)
    # any padding will do in front, where the mask hides it, and behind an end token, where it is cut off
    pad, start = Padding(0, "left", "position_ids" not in inputs_of(model) or virtual > 0), {}
    if record.encoder_decoder:
        pad, start = agree(model, tokenizer), start_ids(anatomy.unwrapped(model), tokenizer)
    batches = split_by_size(range(len(ids)), list(map(len, ids)), batch_size=batch_size, alike=pad.alike)
    ends, device = end_ids(tokenizer, anatomy.unwrapped(model).generation_config), next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False, eos_token_id=ends or None,
        pad_token_id=pad.id, **start,
    )  # fmt: skip
    warpers = [TemperatureLogitsWarper(float(temperature))] if temperature else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    answers, kind = [""] * len(ids), torch.float32 if device.type == "mps" else torch.float64
    with _answering(model, config, autocast):
        for places in tqdm(batches, desc="generate", unit="batch", leave=False, disable=not progress):
            rows = [{"input_ids": ids[i]} for i in places]
            batch = collate(rows, pad_token_id=pad.id, padding_side=pad.side)
            width = 1 if record.encoder_decoder else batch["input_ids"].shape[1]  # of what stands before an answer
            each = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in places]
            uniform = [torch.rand(max_new_tokens, 1, generator=one, dtype=kind) for one in each]
            choose = [_choice(places, num_beams, warpers, torch.stack(uniform, 1).to(device))]
            until = [_stopped(tokenizer, stop, width)] if stop else []
            out = model.generate(  # (batch, width + new tokens)
                **to_device(batch, device), generation_config=config, logits_processor=choose, stopping_criteria=until
            )
            for i, new in zip(places, out[:, width:].tolist(), strict=True):
                end = next((k for k, token in enumerate(new) if token in ends), len(new))
                text = "" if tokens else tokenizer.decode(new[:end], skip_special_tokens=True)
                answers[i] = new[: end + 1] if tokens else _cut(text, stop)
    return answers


def answered(model: nn.Module, rows: Iterable[Mapping], tokenizer: Any, options: dict) -> dict[str, float]:
    """The scores of answers to rows against those the rows have."""
    record = TASKS[kind_of(model) or ""]
    prompts, wanted = zip(*map(record.answer, rows), strict=True)
    answers = generate(model, prompts, tokenizer=tokenizer, **options)
    return record.score(answers, [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted], None)


def _check(model: nn.Module, new: int, temperature: float, top_p: float, top_k: Any, num_beams: int, stop: Any) -> Task:
    """The model's record; refuses one that can't go on, and options that make no sense."""
    kind, of = kind_of(model), anatomy.kind_of(model)
    both_ways = "gpt_neox" not in of and getattr(getattr(model, "config", None), "is_decoder", True) is False  # BERT
    if kind is None or TASKS[kind].labeled or (both_ways and not TASKS[kind].encoder_decoder):
        what = f"{type(anatomy.unwrapped(model)).__name__} can't go on from a text"
        raise TypeError(f"{what}; load a decoder with task={next(k for k, t in TASKS.items() if not t.labeled)!r}")
    number("temperature", temperature, 0), number("top_p", top_p, 0, 1), whole("num_beams", num_beams)
    narrows = top_p < 1 or (top_k is not None and whole("top_k", top_k))
    refuse(
        (narrows and not temperature, "top_p and top_k need a temperature above 0"),
        (num_beams > 1 and temperature, "num_beams looks for the likeliest answer; leave temperature at 0"),
        (not all(isinstance(one, str) and one for one in stop), f"stop={stop!r}: need texts, none of them empty"),
    )
    return TASKS[kind]


def _ids(model: nn.Module, prompts: Iterable[Any], tokenizer: Any, more: int, record: Task) -> list[Sequence[int]]:
    """Each prompt's tokens; ValueError where the model has no room for `more` behind them, a decoder none for these."""
    size, limit, out = vocabulary(model), anatomy.max_positions(anatomy.base_of(model).config), []
    for i, prompt in enumerate(prompts):
        given = isinstance(prompt, (list, tuple)) and prompt and not any(isinstance(one, Mapping) for one in prompt)
        out.append(token_ids(prompt if given else record.prompt(tokenizer, prompt, f"prompt {i}"), size, f"prompt {i}"))
        if limit and (max(len(out[i]), more) if record.encoder_decoder else len(out[i]) + more) > limit:
            long = f"prompt {i}: {len(out[i])} tokens and {more} more, but the model has {limit} positions"
            raise ValueError(f"{long}; shorten it, or lower max_new_tokens")
    return out


@contextmanager
def _answering(model: nn.Module, config: GenerationConfig, autocast: Any) -> Iterator[None]:
    """Eval mode, the quickest products, and this config as the model's own, by which Transformers fills gaps."""
    inner = anatomy.unwrapped(model)
    before, weights = inner.generation_config, model.parameters() if autocast else ()
    # autocast keeps the cast of a weight that may have a gradient, but would cast a frozen one for every token
    frozen = [weight for weight in weights if weight.dtype == torch.float32 and not weight.requires_grad]
    try:
        inner.generation_config = config
        for weight in frozen:
            weight.requires_grad = True
        with anatomy.evaluating(model), shortcuts(model), autocast or nullcontext():
            yield
    finally:
        inner.generation_config = before
        for weight in frozen:
            weight.requires_grad = False


def _choice(places: list[int], num_beams: int, warpers: list[Callable], uniform: Tensor) -> Callable:
    """For Transformers: refuses nan; given warpers, draws tokens by `uniform`, (steps, batch, 1) in [0, 1)."""
    numbers = iter(uniform)

    def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(wrong := scores.isnan().any(-1).nonzero()):
            raise ValueError(f"prompt {places[int(wrong[0]) // num_beams]}: logits are nan; compute in float32 or bf16")
        for warp in warpers:
            scores = warp(input_ids, scores)
        if not warpers:
            return scores
        reached = scores.softmax(-1).cumsum(-1, dtype=uniform.dtype)  # (batch, vocabulary)
        token = torch.searchsorted(reached, next(numbers) * reached[:, -1:], right=True)  # the first that exceeds it
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    return choose


def _stopped(tokenizer: Any, stop: tuple[str, ...], width: int) -> Callable:
    """For Transformers: which rows' new text holds one of `stop`; its own check looks into the prompt as well."""

    def check(input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        texts = (tokenizer.decode(row, skip_special_tokens=True) for row in input_ids[:, width:].tolist())
        return torch.tensor([_cut(text, stop) != text for text in texts], device=input_ids.device)

    return check


def _cut(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]
