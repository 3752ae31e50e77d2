"""Preferences and rewards for language models, as gradient functions of the loop (`core.loop.steps`): DPO and GRPO.

    options, seed = dict(tokenizer=tokenizer, temperature=1.0, tokens=True), itertools.count()  # other draws each time
    answer = lambda model, prompts: ftlib.generate(model, prompts, seed=next(seed), **options)
    batches = (rollouts(model, random.sample(prompts, 4), reward, generate=answer, tokenizer=tokenizer) for _ in ...)
    for record in steps(model, batches, optimizer, total=100, gradient=(gradient := grpo())):
        print(record["loss"], gradient.last)

A step's loss is the mean over its pairs, or answers, however they are cut into micro-batches.

To copy: this file, methods/{adapters,token_losses}.py, tasks/{classification,language_modeling,tagging}.py, core/ and
torch.
Source: Rafailov et al. 2023 (DPO, arXiv:2305.18290); Shao et al. 2024 (GRPO, arXiv:2402.03300).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import anatomy
from ..core.batches import IGNORE, collate, number, one_of, refuse, split_by_size, to_device, whole
from ..core.loop import Batch, Gradient, Step
from ..tasks.language_modeling import encode, prompt_ids
from .adapters import adapters_of
from .token_losses import label_log_probs

Pair = dict[str, dict[str, Any]]  # rows "chosen" and "rejected", answers to one prompt
Reference = nn.Module | Callable[[nn.Module], AbstractContextManager] | None
_BESIDE = ("reference", "old", "advantages", "rewards")  # in a batch, but no inputs of the model


def preference_rows(data: Iterable[Mapping], tokenizer: Any, max_length: int | None = None) -> list[Pair]:
    """Pairs of rows, answers labeled, of `prompt`, `chosen`, `rejected`, texts or messages; errors name the row."""
    pairs: list[Pair] = []
    for i, row in enumerate(data):
        lacking = [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]
        refuse((lacking, f"row {i}: no {lacking}; a pair has a prompt, a chosen and a rejected answer"))
        asked = {name: {"prompt": row["prompt"], "completion": row[name]} for name in ("chosen", "rejected")}
        pairs.append({name: encode(tokenizer, one, f"row {i}, {name}", max_length) for name, one in asked.items()})
    return pairs


def preference_batch(pairs: Sequence[Pair], device: Any = "cpu", pad_token_id: int = 0) -> Batch:
    """A batch of (2 * pairs, tokens): the chosen rows, then the rejected ones in the same order."""
    rows = [pair[name] for name in ("chosen", "rejected") for pair in pairs]
    return to_device(collate(rows, pad_token_id=pad_token_id), torch.device(device))


def reference_log_probs(
    model: nn.Module, pairs: list[Pair], *, batch_size: int = 16, autocast: Callable = nullcontext
) -> list[Pair]:
    """The pairs, each row with the log-probability `reference` that the model, as it is now, gives to its answer."""
    rows, device = [row for pair in pairs for row in pair.values()], next(model.parameters()).device
    lengths = [len(row["input_ids"]) for row in rows]
    for places in split_by_size(range(len(rows)), lengths, batch_size=batch_size):
        batch = to_device(collate([rows[i] | {"reference": 0.0} for i in places]), device)
        for i, value in zip(places, _of(model, batch, autocast).sum(1).tolist(), strict=True):
            rows[i]["reference"] = value
    return pairs


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without its adapters; ValueError for none, and where other weights train too."""
    inner = getattr(model, "module", model)  # in DDP
    peft = inner if hasattr(inner, "disable_adapter") else getattr(getattr(inner, "tuning", None), "peft", None)
    own = adapters_of(inner)
    inside = {id(p) for adapter in own.values() for p in adapter.own().values()}
    others = [name for name, p in inner.named_parameters() if p.requires_grad and id(p) not in inside]
    remedy = "keep its log-probabilities beforehand (reference_log_probs), or pass a copy of the model"
    refuse(
        (not own and peft is None, f"the model has no adapters to switch off for the reference; {remedy}"),
        (own and others, f"{others[:1]} trains beside the adapters, so without them it is not the reference; {remedy}"),
    )
    bare = anatomy.forwards(dict.fromkeys(own.values(), lambda adapter, x: adapter.base_layer(x)))
    with peft.disable_adapter() if peft else bare:
        yield


def dpo(
    beta: float = 0.1, *, reference: Reference = None, autocast: Callable = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> Gradient:  # fmt: skip
    """Direct preference optimization: the gradient of -log σ(beta (g_chosen - g_rejected)), mean over a step's pairs.

    g is how much log-probability an answer gained against the reference: its own kept in the batch, that of a frozen
    model, or of this model inside a context (`without_adapters`).  Batches are those of `preference_batch`.
    `last` of the function has the last step's means over pairs: margin, beta (g_chosen - g_rejected); accuracy, the
    share of margins above 0; the log-probabilities chosen and rejected.
    """
    number("beta", beta, 1e-6)

    def part(model: nn.Module, batch: Batch, step: Step) -> list[Tensor]:
        pairs = sum(len(one["input_ids"]) for one in step) / 2
        theirs = _reference(model, batch, reference, autocast)
        theirs = theirs if theirs.dim() == 1 else theirs.sum(1)  # (2 * pairs,)
        with autocast():
            own = label_log_probs(model, _inputs(batch)).sum(1)  # (2 * pairs,)
        margin = torch.sub(*(own - theirs).chunk(2))  # (pairs,)
        values = (-F.logsigmoid(beta * margin), beta * margin, margin > 0, *own.chunk(2))
        return [value.sum() / pairs for value in values]

    return _gradient(part, ("margin", "accuracy", "chosen", "rejected"), scaler)


def advantages(rewards: Tensor, group_size: int) -> Tensor:
    """(reward - mean of its group) / (standard deviation of the group + 1e-4); groups of answers stand together.

    rewards: float (prompts * group_size,), and so is what is returned.

    >>> advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2)
    tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    groups = rewards.view(-1, whole("group_size", group_size, 2))
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def rollouts(
    model: nn.Module, prompts: Sequence[Any], reward: Callable[[Any, str], float], *, generate: Callable,
    tokenizer: Any, group_size: int = 8, batch_size: int | None = None,
) -> Step:  # fmt: skip
    """A step for `grpo`: `group_size` answers to each prompt with their rewards, in micro-batches of `batch_size`.

    prompts: texts or lists of messages.  reward: (prompt, answer) -> number.  generate: (model, prompts) -> the token
    ids of an answer to each, with its end token where the model wrote one.
    """
    asked = [prompt for prompt in prompts for _ in range(group_size)]
    answers = [[int(token) for token in answer] for answer in generate(model, asked)]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    rewards = [float(reward(prompt, text)) for prompt, text in zip(asked, texts, strict=True)]
    gains, rows = advantages(torch.tensor(rewards), group_size).tolist(), []
    for i, answer in enumerate(answers):
        before = prompt_ids(tokenizer, asked[i], f"prompt {i // group_size}")
        rows.append({"input_ids": before + answer, "labels": [IGNORE] * len(before) + answer})
        rows[i] |= {"advantages": gains[i], "rewards": rewards[i]}
    device, lengths = next(model.parameters()).device, [len(row["input_ids"]) for row in rows]
    cuts = split_by_size(range(len(rows)), lengths, batch_size=batch_size)
    return [to_device(collate([rows[i] for i in places]), device) for places in cuts]


def keep_log_probs(model: nn.Module, step: Step, temperature: float = 1.0, autocast: Callable = nullcontext) -> Step:
    """The step with the model's log-probabilities as `old`: before several optimizer steps on the same answers."""
    for batch in step:
        batch["old"] = _of(model, batch, autocast, temperature)
    return step


def grpo(
    *, beta: float = 0.0, epsilon: float = 0.2, loss: str = "dapo", reference: Reference = None,
    temperature: float = 1.0, autocast: Callable = nullcontext, scaler: torch.amp.GradScaler | None = None,
) -> Gradient:  # fmt: skip
    """Group relative policy optimization: the gradient of -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) + beta KL.

    r: a token's probability against that in `old` (without it 1, with the gradient of its logarithm); A: its answer's
    advantage; KL: r (exp(d) - d - 1), d the reference's log-probability less its own (the r as in TRL, after
    DeepSeek-V3.2, arXiv:2512.02556).
    loss: "dapo", the mean over the step's tokens (Yu et al. 2025, arXiv:2503.14476); "grpo", over its answers, of the
    mean over an answer's tokens.
    Batches are those of `rollouts`; reference: a frozen model or `without_adapters`; temperature: that of the draws.
    `last` of the function has the last step's mean reward, and means over tokens: KL, and the share that was clipped.
    """
    one_of("loss", loss, ("dapo", "grpo"))
    refuse((beta and reference is None, f"beta={beta} needs a reference: without_adapters, or a copy of the model"))

    def part(model: nn.Module, batch: Batch, step: Step) -> list[Tensor]:
        mask, *others = [F.pad(one["labels"][:, 1:] != IGNORE, (1, 0)) for one in (batch, *step)]  # (rows, tokens)
        rows, tokens = sum(map(len, others)), sum(one.sum() for one in others).clamp(min=1)
        theirs = _reference(model, batch, reference, autocast, temperature) if beta else None
        with autocast():
            own = label_log_probs(model, _inputs(batch), temperature)  # (rows, tokens)
        gain, ratio = batch["advantages"][:, None], (own - batch.get("old", own.detach())).exp()
        apart = theirs - own if beta else torch.zeros_like(own)
        kl = ratio * (apart.exp() - apart - 1)
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * gain
        each = mask * (beta * kl - torch.minimum(ratio * gain, clipped))
        each = each / (tokens if loss == "dapo" else rows * mask.sum(1, keepdim=True).clamp(min=1))
        cut = (mask & (clipped < ratio * gain)).sum() / tokens
        return [each.sum(), batch["rewards"].sum() / rows, (mask * kl).sum() / tokens, cut]

    return _gradient(part, ("reward", "kl", "clipped"), scaler)


def _gradient(part: Callable, names: Sequence[str], scaler: torch.amp.GradScaler | None) -> Gradient:
    """Of a loss that is the sum of part(model, batch, step)[0]; `last` of it: the sums of the other values, by name."""

    def gradient(model: nn.Module, step: Step) -> Tensor:
        sums = 0.0
        for batch in step:
            loss, *others = part(model, batch, step)
            (scaler.scale(loss) if scaler else loss).backward()
            sums = sums + torch.stack([loss, *others]).detach()
        gradient.last = dict(zip(names, sums[1:].tolist(), strict=True))
        return sums[0]

    return gradient


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in _BESIDE}


def _of(model: nn.Module, batch: Batch, autocast: Callable = nullcontext, temperature: float = 1.0) -> Tensor:
    """The log-probability of every label, (rows, tokens), without dropout and gradients."""
    with anatomy.evaluating(model), autocast():
        return label_log_probs(model, _inputs(batch), temperature)


def _reference(model: nn.Module, batch: Batch, reference: Reference, autocast: Callable, *heat: float) -> Tensor:
    if reference is None:
        what = "the batch has no 'reference': call reference_log_probs before training, or pass one"
        refuse(("reference" not in batch, what))
        return batch["reference"]
    frozen = isinstance(reference, nn.Module)
    with nullcontext() if frozen else reference(model):
        return _of(reference if frozen else model, batch, autocast, *heat)
