"""The loss of language models in chunks: head and cross-entropy never hold (tokens, vocabulary) at once.

The logits of 4,096 tokens and 152,000 words are 2.5 GB in float32, and a plain loss holds them two or three times.
Here a chunk of tokens goes through the head, leaves its gradient behind and is forgotten.  Of masked tokens too, whose
labels stand at their own place; a model that also tells pairs of sentences adds that loss, see tasks/masked.py.

To copy: this file, core/anatomy.py and torch.
Source: Hsu et al. 2024 (Liger Kernel, arXiv:2410.10989): gradients on the way forward.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..core import anatomy

IGNORE = -100
_PAIRS = {"next_sentence_label": "seq_relationship_logits", "sentence_order_label": "sop_logits"}  # label: logits
_COMPARED: WeakSet = WeakSet()  # models whose own loss is the one here
Head = Callable[[Tensor], Tensor]  # (rows, hidden) -> logits (rows, vocabulary), every row by itself


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, rows, smoothing, hidden, targets, *parameters):
        wanted, ctx.scale = any(ctx.needs_input_grad), 1.0
        loss, d_hidden, sums = 0.0, torch.empty_like(hidden), {}
        for x, y, d_x in zip(hidden.split(rows), targets[:, None].split(rows), d_hidden.split(rows), strict=True):
            with torch.set_grad_enabled(wanted):
                logits = head(x := x.detach().requires_grad_(wanted))  # (rows, vocabulary)
            z = logits.detach().float()
            total, right = z.logsumexp(-1, keepdim=True), z.gather(1, y)
            evenly = z.mean(-1, keepdim=True) if smoothing else 0.0
            loss = loss + (total - (1 - smoothing) * right - smoothing * evenly).sum()
            if wanted:  # z becomes the gradient of the logits, softmax - (smoothed) target
                z = (z - total).exp_().scatter_add_(1, y, torch.full_like(right, smoothing - 1))
                z = z.sub_(smoothing / z.shape[1]) if smoothing else z
                if logits.dtype == torch.float16:  # where a probability of 1e-5 has few digits left
                    ctx.scale, z = 256.0, z.mul_(256.0)
                z = z.to(logits.dtype)
                d, *parts = torch.autograd.grad(logits, [x, *parameters], z)
                d_x.copy_(d)
                for i, part in enumerate(parts):  # summed up in float32; autograd rounds it to what the weights are
                    sums[i] = sums[i].add_(part) if i in sums else part.float()
        ctx.found = [d_hidden, *sums.values()]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        found, ctx.found = ctx.found, None
        if found is None:
            raise RuntimeError("backward a second time: a loss in chunks hands its gradients over; compute it again")
        d_hidden, *others = [part.mul_(gradient / ctx.scale) for part in found]
        return None, None, None, d_hidden, None, *others


def _rows(sample: Tensor) -> int:
    """Rows a chunk: 64 MB of logits, as each costs a pass over the weights' gradient; 16 MB fit a CPU's caches."""
    small = sample.device.type == "cpu" and not sample.requires_grad
    return max(64, 2 ** (24 if small else 26) // (4 * sample.shape[-1]))


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The trainable parameters that a tensor was computed from."""
    nodes = [tensor.grad_fn] if tensor.requires_grad else []
    for node in nodes:  # which grows
        nodes += [before for before, _ in node.next_functions if before is not None and before not in nodes]
    return [node.variable for node in nodes if hasattr(node, "variable")]


def chunked_cross_entropy(
    head: Head, hidden: Tensor, targets: Tensor, parameters: Sequence[Tensor] | None = None, *,
    label_smoothing: float = 0.0, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of head(hidden) against targets, in nats, summed: a scalar, float32.

    hidden: float (n, hidden); targets: int64 (n,), all in 0 … vocabulary - 1; parameters: of the head, default: those
    that train; chunk: rows at a time, default: 64 or 16 MB of float32 logits, but no less than 64 rows.
    Gradients reach `hidden` and the parameters, in one backward pass a loss; a second raises RuntimeError.

    >>> head, hidden, targets = nn.Linear(4, 9), torch.ones(5, 4), torch.arange(5)
    >>> whole = F.cross_entropy(head(hidden), targets, reduction="sum")
    >>> torch.allclose(chunked_cross_entropy(head, hidden, targets, chunk=2), whole)
    True
    """
    sample = head(hidden[:1].detach()) if parameters is None or chunk is None else None
    parameters = _leaves(sample) if parameters is None else parameters
    if not torch.is_grad_enabled():
        hidden, parameters = hidden.detach(), ()
    return _SummedLoss.apply(head, chunk or _rows(sample), label_smoothing, hidden, targets, *parameters)


def token_log_probs(
    head: Head, hidden: Tensor, targets: Tensor, *, chunk: int | None = None, temperature: float = 1.0
) -> Tensor:
    """log softmax(head(hidden) / temperature)[target] of every row: float32 (n,).  Arguments as above.

    What comes from above differs by row, so for the backward pass a chunk's logits are computed again.
    """

    def part(x: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(head(x).float() / temperature, y, reduction="none")

    chunk = chunk or _rows(head(hidden[:1].detach()))
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(part, x, y, use_reentrant=False) for x, y in parts])


class _Answered:
    """A module as its own forward sees it, where `answer(body, ...)` answers the calls of the bodies below its head."""

    def __init__(self, module: nn.Module, bodies: Sequence[str], answer: Callable):
        self.module, self.bodies, self.answer = module, bodies, answer

    def __getattr__(self, name: str) -> Any:
        value, body = getattr(self.module, name), name in self.bodies
        # OPT calls not its body but the decoder in it
        return _Answered(value, ("decoder",), self.answer) if body and isinstance(value, nn.Module) else value

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self.answer(self.module, *args, **inputs)


def _forward(before: Callable, reduce: Callable, lm: nn.Module, *args: Any, labels: Any = None, **inputs: Any) -> Any:
    """The model's forward, but that its loss is reduce(lm, output, head, hidden, targets, places).

    What stands between body and logits, soft-capping say, is its own code, run for every chunk.  T5 has two bodies.
    """
    if labels is None:
        return before(*args, **inputs)
    if hasattr(lm.config, "use_cache"):  # of keys and values, for generation
        inputs.setdefault("use_cache", False)
    pair = {name: inputs.pop(name, None) for name in (*_PAIRS, "pair_weight")}
    found: dict[nn.Module, Any] = {}  # each body's output
    both = _both(lm)
    if both:
        inputs["decoder_input_ids"] = decoder_ids(lm, labels)
    bodies = (lm.base_model_prefix,) if hasattr(lm, lm.base_model_prefix) else ("encoder", "decoder")

    def above(rows: Tensor | None = None) -> Any:
        def answer(body: nn.Module, *args: Any, **inputs: Any) -> Any:
            if body not in found:
                found[body] = body(*args, **inputs)
            if len(bodies) > 1 and body is not lm.decoder:
                return found[body]
            hidden = found[body].last_hidden_state[:1, :1].detach() if rows is None else rows[None]
            return type(found[body])(**{**found[body], "last_hidden_state": hidden})

        return type(lm).forward(_Answered(lm, bodies, answer), *args, **inputs)

    output = above()  # its logits are a sample of one row
    # (batch * tokens,): without a decoder's own row the token before predicts, and nothing a row's first
    skipped = _shift(lm)
    targets = F.pad(labels[:, skipped:], (skipped, 0), value=IGNORE).flatten()
    count = int((getattr(labels, "host", labels)[:, skipped:] != IGNORE).sum())
    places = (targets != IGNORE).nonzero_static(size=count)[:, 0]  # (labeled,)
    *_, last = found.values()
    if (shape := last.last_hidden_state.shape[:2]) != labels.shape:
        why = f"labels {tuple(labels.shape)} for {tuple(shape)} places; with a tuned prompt before the text use LoRA"
        raise ValueError(f"{anatomy.kind_of(lm)}: {why}")
    hidden = last.last_hidden_state.flatten(0, 1).index_select(0, places - skipped)
    output.logits = _logits(output)
    output.loss = reduce(lm, output, lambda rows: _logits(above(rows)).squeeze(0), hidden, targets, places)
    for name in _PAIRS:
        if pair[name] is not None:
            output.loss = _with_pairs(output.loss, output[_PAIRS[name]], pair[name], pair["pair_weight"], count)
    output.logits = None
    return output


def _logits(output: Any) -> Tensor:
    return output.prediction_logits if "prediction_logits" in output else output.logits


def _with_pairs(loss: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None, count: int) -> Tensor:
    """A summed loss and that of pairs, each times its weight: by default so that both are means after a division.

    Counted, (loss, right), it becomes (loss, right, loss of pairs, pairs that are right).
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")  # (batch,)
    if loss.ndim:
        return torch.cat((loss, torch.stack((each.sum(), (logits.argmax(-1) == labels).sum()))))
    return loss + (each * (count / len(labels) if weight is None else weight)).sum()


def _shift(lm: nn.Module) -> int:
    """How many places a label is behind the prediction of it: 1, the next token; 0, the token itself, masked."""
    return 0 if _both(lm) or type(lm).__name__.endswith(("ForMaskedLM", "ForPreTraining")) else 1


def _both(lm: nn.Module) -> bool:
    """Whether a decoder writes beside an encoder that reads."""
    return bool(getattr(lm.config, "is_encoder_decoder", False))


def decoder_ids(lm: nn.Module, labels: Tensor) -> Tensor:
    """What a decoder beside an encoder reads, (batch, tokens): the labels one later; ValueError without a start."""
    config, own = lm.config, getattr(lm, "prepare_decoder_input_ids_from_labels", None)
    try:
        if own is not None:
            return own(labels)
        ids = torch.cat((labels.new_full((len(labels), 1), config.decoder_start_token_id), labels[:, :-1]), 1)
        return ids.masked_fill_(ids == IGNORE, config.pad_token_id)
    except (TypeError, ValueError) as error:
        known = {name: getattr(config, name) for name in ("decoder_start_token_id", "pad_token_id")}
        remedy = "set both, as they were when the model was trained; most start with pad or eos"
        raise ValueError(f"{anatomy.kind_of(lm)}: model.config has {known}; {remedy}") from error


def _sum(lm, output, head, hidden, targets, places, smoothing=0.0) -> Tensor:
    parameters, weights = _leaves(output.logits), lm.get_output_embeddings().parameters()
    frozen = [p for p in weights if not p.requires_grad and torch.is_autocast_enabled(p.device.type)]
    try:
        for p in frozen:  # autocast keeps casts only of weights that require gradients, or makes one for each chunk
            p.requires_grad_(True)
        own = {"label_smoothing": smoothing, "chunk": _rows(output.logits)}
        loss = chunked_cross_entropy(head, hidden, targets[places], parameters, **own)
    finally:
        for p in frozen:
            p.requires_grad_(False)
    router = getattr(output, "aux_loss", None)  # of a mixture of experts, where asked for: added to a mean
    return loss if router is None else loss + lm.router_aux_loss_coef * router * len(places)


def _counted(lm, output, head, hidden, targets, places) -> Tensor:
    """The summed loss, and how many of the likeliest tokens are right: float32 (2,)."""
    found, chunk = hidden.new_zeros(2, dtype=torch.float32), _rows(output.logits)
    for x, y in zip(hidden.split(chunk), targets[places].split(chunk), strict=True):
        logits = head(x).float()
        found += torch.stack((F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(-1) == y).sum()))
    return found


def _answering(model: nn.Module, reduce: Callable) -> AbstractContextManager:
    """`_forward` on the language model inside; ValueError where its loss is not that of the next token, unseen."""
    lm = anatomy.unwrapped(getattr(model, "module", model))  # in DDP, in PEFT
    peft = getattr(getattr(lm, "tuning", None), "peft", None)
    if peft is not None and peft.active_peft_config.is_prompt_learning:
        lm = anatomy.unwrapped(peft)  # that the prompt which `tune` put before it goes into
    if lm not in _COMPARED and getattr(anatomy.taken_by(lm), "func", None) is not _forward:  # inside another: it was
        ids = torch.arange(1, 9, device=lm.get_input_embeddings().weight.device)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        both, shift, asked = _both(lm), _shift(lm), {"input_ids": ids}
        inputs |= {n: ids[0, :1] for n in _PAIRS if n in inspect.signature(type(lm).forward).parameters}
        asked |= {"decoder_input_ids": decoder_ids(lm, ids)} if both else {}
        with anatomy.evaluating(lm):
            own = float(lm(**inputs).loss)
            with anatomy.forwards({lm: partial(_forward, lm.forward, _sum)}):
                ours = float(lm(**inputs).loss) / (8 - shift)
            before = [_logits(lm(**asked | {[*asked][-1]: ids[:, :n]}))[0, 0].float() for n in (4, 8)]
        if (both or shift) and not torch.allclose(*before, atol=1e-4 if lm.dtype == torch.float32 else 0.1, rtol=1e-2):
            remedy = "load a decoder, or the model with is_decoder=True"
            raise ValueError(f"{anatomy.kind_of(lm)}: a token sees those after it, the answer among them; {remedy}")
        if not abs(own - ours) < (1e-4 if lm.dtype == torch.float32 else 1e-2) * abs(own):
            of = "as next tokens" if both or shift else "of masked tokens"
            what = f"its own loss of 8 tokens is {own:.5g}, and their mean cross-entropy {of} {ours:.5g}"
            raise ValueError(f"{anatomy.kind_of(lm)}: {what}, so it can't be computed in chunks")
        _COMPARED.add(lm)
    return anatomy.forwards({lm: partial(_forward, lm.forward, reduce)})


def in_chunks(model: nn.Module, label_smoothing: float = 0.0, counted: bool = False) -> AbstractContextManager:
    """Inside, model(**inputs, labels=labels) has a `loss` summed over labeled tokens, in chunks, and no logits.

    labels: int64 (batch, tokens), -100 for none; a token's label is for the prediction before it, as in Transformers;
    of an encoder with a decoder every label is predicted, from the labels before it and what the encoder has read; of
    masked tokens each at its own place.  counted: in place of the loss, without gradients, `_counted`.
    Without labels the model answers as always.  Works inside PEFT, DDP, FSDP2 and autocast.
    Raises ValueError, by the model's type, where its own loss, compared on 8 tokens, is another.
    """
    return _answering(model, _counted if counted else partial(_sum, smoothing=label_smoothing))


def best_tokens(model: nn.Module, batch: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens where a batch has labels, whatever they are: probabilities, float32, and ids, (n, count)."""

    def reduce(lm, output, head, hidden, targets, places):
        parts = [head(x).float().softmax(-1).topk(count) for x in hidden.split(_rows(output.logits))]
        return torch.stack([torch.cat([getattr(p, name).double() for p in parts]) for name in ("values", "indices")])

    with _answering(model, reduce):
        values, ids = model(**batch).loss
    return values.float(), ids.long()


def label_log_probs(model: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """The log-probability of every label, 0 where there is none: float32 (batch, tokens); errors as `in_chunks`."""

    def reduce(lm, output, head, hidden, targets, places):
        if getattr(output, "aux_loss", None) is not None:
            raise ValueError("output_router_logits: the router's loss is no log-probability; set it to False")
        own = {"chunk": _rows(output.logits), "temperature": temperature}
        values = token_log_probs(head, hidden, targets[places], **own)
        return values.new_zeros(len(targets)).index_add(0, places, values)

    with _answering(model, reduce):
        values = model(**batch).loss.unflatten(0, (len(batch["labels"]), -1))
    return values[:, -batch["labels"].shape[1] :]  # without those of PEFT's virtual tokens


def sequence_log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The log-probability of each row's labeled tokens together: float32 (batch,)."""
    return label_log_probs(model, batch).sum(1)
