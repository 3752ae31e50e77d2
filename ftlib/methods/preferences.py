"""Preferences and rewards for language models, as gradient functions of the loop (`core.loop.steps`): DPO and GRPO.

    pairs = reference_log_probs(model, preference_rows(data, tokenizer))
    batches = ([preference_batch(random.sample(pairs, 8))] for _ in range(100))
    for record in steps(model, batches, optimizer, total=100, gradient=(gradient := dpo())):
        print(record["loss"], gradient.last)

    answer = partial(ftlib.generate, tokenizer=tokenizer, temperature=1.0, tokens=True)
    batches = (rollouts(model, random.sample(prompts, 4), reward, generate=answer, tokenizer=tokenizer) for _ in ...)

A step's loss is the mean over its pairs, or answers, however they are cut into micro-batches.

To copy: this file, methods/{adapters,token_losses}.py, tasks/language_modeling.py and what it names, core/ and torch.
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
    """Pairs of rows from `prompt`, `chosen` and `rejected`, all texts or all lists of messages.

    Answers alone are labelled.  Raises ValueError or TypeError naming row and column.
    """
    names = ("chosen", "rejected")
    if lacking := next(((i, n) for i, row in enumerate(data) for n in ("prompt", *names) if row.get(n) is None), None):
        raise ValueError("row {}: no {!r}; a pair has prompt, chosen and rejected".format(*lacking))
    return [
        {
            name: encode(tokenizer, {"prompt": row["prompt"], "completion": row[name]}, f"row {i}, {name}", max_length)
            for name in names
        }
        for i, row in enumerate(data)
    ]


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
    """Inside, the model computes without its adapters, ftlib's or PEFT's: as the base they were put on.

    Raises ValueError where there are none, and where other weights train too, so that the base is not what it was.
    """
    inner = getattr(model, "module", model)  # in DDP
    peft = inner if hasattr(inner, "disable_adapter") else getattr(getattr(inner, "tuning", None), "peft", None)
    own = adapters_of(inner)
    inside = {id(p) for adapter in own.values() for p in adapter.own().values()}
    others = [name for name, p in inner.named_parameters() if p.requires_grad and id(p) not in inside]
    remedy = "keep the reference beforehand: reference_log_probs(model, pairs), or pass a copy of the model"
    refuse(
        (not own and peft is None, f"the model has no adapters; {remedy}"),
        (own and others, f"{others[:1]} trains and is no adapter's; {remedy}"),
    )
    with peft.disable_adapter() if peft else anatomy.forwards(dict.fromkeys(own.values(), lambda m, x: m.base_layer(x))):
        yield


def dpo(
    beta: float = 0.1, *, reference: Reference = None, loss: str = "sigmoid", label_smoothing: float = 0.0,
    autocast: Callable = nullcontext, scaler: torch.amp.GradScaler | None = None,
) -> Gradient:  # fmt: skip
    """Direct preference optimization: the gradient of -log σ(beta (g_chosen - g_rejected)), mean over a step's pairs.

    g is how much log-probability an answer gained against the reference: kept in the batch, a frozen model, or the
    model itself inside a context (`without_adapters`).  Batches are those of `preference_batch`.
    loss: "ipo" is (g_chosen - g_rejected - 1 / (2 beta))², g a token (Azar et al. 2023, arXiv:2310.12036, as in TRL).
    label_smoothing: the share of pairs taken to be the wrong way round, for "sigmoid".
    `last` of the function holds the last step's margin beta (g_chosen - g_rejected), accuracy (the share of pairs above
    0) and the log-probabilities of chosen and rejected answers, means over its pairs.
    """
    one_of("loss", loss, ("sigmoid", "ipo"))
    number("beta", beta, 1e-6)

    def gradient(model: nn.Module, step: Step) -> Tensor:
        pairs, total, seen = sum(len(batch["input_ids"]) for batch in step) / 2, torch.zeros(()), torch.zeros(4)
        for batch in step:
            with autocast():
                own = label_log_probs(model, _inputs(batch)).sum(1)  # (2 * pairs,)
            theirs = _reference(model, batch, reference, autocast)
            gained = own - (theirs if theirs.dim() == 1 else theirs.sum(1))
            margin = torch.sub(*gained.chunk(2))  # (pairs,)
            if loss == "ipo":
                tokens = (batch["labels"][:, 1:] != IGNORE).sum(1)
                each = (torch.sub(*(gained / tokens).chunk(2)) - 1 / (2 * beta)).square()
            else:
                right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
                each = -(1 - label_smoothing) * right - label_smoothing * wrong
            part = each.sum() / pairs
            (scaler.scale(part) if scaler else part).backward()
            total = total.to(part.device) + part.detach()
            found = [beta * margin, (margin > 0).float(), *own.chunk(2)]
            seen = seen.to(part.device) + torch.stack([value.detach().sum() for value in found]) / pairs
        gradient.last = dict(zip(("margin", "accuracy", "chosen", "rejected"), seen.tolist(), strict=True))
        return total

    return gradient


def advantages(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """(reward - mean of its group) / (standard deviation of the group + 1e-4); groups of answers stand together.

    rewards: float (prompts * group_size,), and so is what is returned.  scale=False does not divide (Liu et al. 2025,
    arXiv:2503.20783).

    >>> advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2)
    tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    groups = rewards.view(-1, whole("group_size", group_size, 2))
    apart = groups - groups.mean(1, keepdim=True)
    return (apart / (groups.std(1, keepdim=True) + 1e-4) if scale else apart).flatten()


def rollouts(
    model: nn.Module, prompts: Sequence[Any], reward: Callable[[Any, str], float], *, generate: Callable, tokenizer: Any,
    group_size: int = 8, batch_size: int | None = None, scale: bool = True, old: bool = False, temperature: float = 1.0,
) -> Step:  # fmt: skip
    """A step for `grpo`: `group_size` answers to each prompt with their rewards, in micro-batches of `batch_size`.

    prompts: texts or lists of messages.  reward: (prompt, answer) -> number.  generate: (model, prompts) -> the token
    ids of an answer to each, its end token included where the model wrote one.  old: with the log-probabilities of the
    answers now, for more than one optimizer step on them; temperature: that of the draws.
    """
    asked = [prompt for prompt in prompts for _ in range(group_size)]
    answers = [list(map(int, answer)) for answer in generate(model, asked)]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    rewards = torch.tensor([float(reward(prompt, text)) for prompt, text in zip(asked, texts, strict=True)])
    rows = []
    for i, values in enumerate(zip(asked, answers, advantages(rewards, group_size, scale).tolist(), strict=True)):
        prompt, answer, gain = values
        before = prompt_ids(tokenizer, prompt, f"prompt {i // group_size}")
        rows.append({"input_ids": before + answer, "labels": [IGNORE] * len(before) + answer, "advantages": gain})
        rows[-1]["rewards"] = float(rewards[i])
    device = next(model.parameters()).device
    cuts = split_by_size(range(len(rows)), [len(row["input_ids"]) for row in rows], batch_size=batch_size)
    step = [to_device(collate([rows[i] for i in places]), device) for places in cuts]
    for batch in step if old else ():
        batch["old"] = _of(model, batch, temperature=temperature)
    return step
