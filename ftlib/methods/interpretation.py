"""Which tokens a prediction hangs on, by six methods; and how far to believe them, by deletion and insertion curves.

A hook on the model's own embedding table puts other vectors in the place of a row's: any encoder or decoder, unpadded
or not, with LoRA, with several heads.

To copy: this file, inputs/{agreement,rows}.py, core/{anatomy,batches,loop}.py, tasks/ and torch.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import anatomy
from ..core.batches import collate, one_of, refuse, to_device, whole
from ..core.loop import logits_of
from ..inputs.rows import Door, checked
from ..tasks.tagging import text_words
from ..tasks.task import TASKS, tasks_of


class Explained:
    """A row as a function f of its tokens' vectors: a logit, or probability, that is to be explained.

    x, empty: float32 (tokens, hidden), the row's vectors and those that stand for their absence; units: bool
    (units, tokens), which tokens come and go together.  All variants of a row have its length, so nothing is padded.
    """

    def __init__(
        self, model: nn.Module, row: dict, units: list, target: Any = None, of: Callable = torch.positive,
        task: str = "", baseline: int | None = None, size: int = 32,
    ):  # fmt: skip
        self.model, self.named, self.size = model, {"task": task} if task else {}, size
        self.batch = to_device(collate([row]), next(model.parameters()).device)
        ids, self.table = self.batch["input_ids"], anatomy.base_of(model).get_input_embeddings()
        names = {name: number for number, name in enumerate(dict.fromkeys(n for n in units if n is not None))}
        places = torch.tensor([names.get(name, -1) for name in units], device=ids.device)  # -1: stays
        self.units = places == torch.arange(len(names), device=ids.device)[:, None]
        with torch.no_grad():
            self.x = self.table(ids)[0].float()
            absent = torch.zeros_like(self.x) if baseline is None else self.table(ids * 0 + baseline)[0].float()
            self.empty = torch.where((places < 0)[:, None], self.x, absent)
            target = (self.logits(self.x[None])[0].argmax(),) if target is None else target
        self.choose = target if callable(target) else lambda logits: of(logits)[(slice(None), *target)]  # (variants,)

    def logits(self, vectors: Tensor, changes: dict[nn.Module, Callable] | None = None) -> Tensor:
        """Of variants (variants, tokens, hidden); changes: {module: function of its output, which takes its place}."""
        batch = {name: value.repeat_interleave(len(vectors), 0) for name, value in self.batch.items()}
        with ExitStack() as hooks:
            for module, change in {self.table: lambda _: vectors, **(changes or {})}.items():
                hooks.enter_context(module.register_forward_hook(_changed(*vectors.shape[:2], change)))
            output = self.model(**batch, **self.named)
        return output if self.named else logits_of(output, batch)

    def f(self, kept: Tensor) -> Tensor:
        """(variants,) where the tokens of `kept`, bool (variants, tokens), are there and the others are not."""
        variants = (torch.where(part[..., None], self.x, self.empty) for part in kept.split(self.size))
        return torch.cat([self.choose(self.logits(part)).float() for part in variants])

    def gradients(self, points: Tensor, layer: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """f (points,), its gradient, and where that is taken, both (points, tokens, hidden): a layer's output, or x."""
        found = []
        for part in points.split(self.size):
            part, held = part.detach().requires_grad_(), []
            with torch.enable_grad():
                hold = {} if layer is None else {layer: lambda hidden, held=held: held.append(hidden) or hidden}
                values = self.choose(self.logits(part, hold))
                place = held[0] if held else part
                found.append((values.detach(), *torch.autograd.grad(values.sum(), place), place.detach()))
        return tuple(torch.cat(parts).float() for parts in zip(*found, strict=True))

    def spread(self, scores: Tensor) -> Tensor:
        """Scores of units as scores of tokens, shared evenly: (units,) -> (tokens,)."""
        return (scores / self.units.sum(1)) @ self.units.float()


def _changed(variants: int, tokens: int, change: Callable) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output  # (1, variants * tokens, hidden): unpadded
        if hidden.shape[:-1] not in ((variants, tokens), (1, variants * tokens)):
            said = f"{type(module).__name__} gives {tuple(hidden.shape)} for {variants} rows of {tokens} tokens"
            raise ValueError(f"{said}: a model that lays rows out otherwise, or a mask with holes, is not for this")
        new = change(hidden.reshape(variants, tokens, -1)).to(hidden.dtype).reshape(hidden.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _gradient_x_input(row: Explained, **_: Any) -> Tensor:
    return (row.gradients(row.x[None])[1][0] * (row.x - row.empty)).sum(-1)


def _smoothgrad(row: Explained, samples: int, noise: float, seed: int, **_: Any) -> Tensor:
    drawn = torch.randn(samples, *row.x.shape, generator=torch.Generator().manual_seed(seed)).to(row.x.device)
    gradients = row.gradients(row.x + noise * (row.x.max() - row.x.min()) * drawn)[1]
    return (gradients.mean(0) * (row.x - row.empty)).sum(-1)


def _integrated_gradients(row: Explained, steps: int, **_: Any) -> Tensor:
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # of an integral from -1 to 1
    both = [0, *(nodes + 1) / 2, 1], [0, *weights / 2, 0]  # the ends count for `_complete` alone
    shares, weights = (torch.tensor(one, dtype=torch.float32, device=row.x.device) for one in both)
    values, gradients, _ = row.gradients(row.empty + shares[:, None, None] * (row.x - row.empty))
    return _complete((torch.tensordot(weights, gradients, 1) * (row.x - row.empty)).sum(-1), values, steps)


def _layer_conductance(row: Explained, steps: int, layer: int, **_: Any) -> Tensor:
    stack = anatomy.layers(row.model)
    one_of("layer", layer, [*range(1, len(stack) + 1), *range(-1, -len(stack) - 1, -1)])
    shares = torch.linspace(0, 1, steps + 1, device=row.x.device)[:, None, None]
    points = row.empty + shares * (row.x - row.empty)
    values, gradients, hidden = row.gradients(points, stack[layer - (layer > 0)])
    return _complete(((gradients[1:] + gradients[:-1]) / 2 * hidden.diff(dim=0)).sum((0, -1)), values, steps)


def _complete(scores: Tensor, values: Tensor, steps: int) -> Tensor:
    total, moved = float(scores.sum()), float(values[-1] - values[0])
    if abs(total - moved) > 0.01 * max(abs(moved), 0.1):
        warnings.warn(f"scores add up to {total:.4g}, f moves by {moved:.4g}: raise steps={steps}", stacklevel=5)
    return scores


def _occlusion(row: Explained, **_: Any) -> Tensor:
    values = row.f(torch.cat((torch.ones_like(row.units[:1]), ~row.units)))
    return row.spread(values[0] - values[1:])


def _shapley(row: Explained, samples: int, seed: int, **_: Any) -> Tensor:
    generator, units = torch.Generator().manual_seed(seed), row.units
    orders = torch.stack([torch.randperm(len(units), generator=generator) for _ in range(samples)]).to(units.device)
    there = units[orders].cumsum(1).bool()  # (samples, units, tokens), one unit after the other
    values = row.f(torch.cat((torch.zeros_like(units[:1]), there.flatten(0, 1))))
    gains = torch.cat((values[:1].expand(samples, 1), values[1:].view(samples, -1)), 1).diff()
    return row.spread(torch.zeros_like(gains).scatter_(1, orders, gains).mean(0))


_EVERY = (_gradient_x_input, _smoothgrad, _integrated_gradients, _layer_conductance, _occlusion, _shapley)
METHODS: dict[str, Callable] = {function.__name__[1:].replace("_", "-"): function for function in _EVERY}


def attribute(
    model: nn.Module, rows: Any, method: str = "integrated-gradients", *, target: Any = None, task: str | None = None,
    baseline: int | None = None, whole_words: bool = False, layer: int = -1, steps: int = 50, samples: int = 25,
    noise: float = 0.1, batch_size: int = 32, seed: int = 0,
) -> list[np.ndarray]:  # fmt: skip
    """How much each token counts for f, a logit of the row: float32 (tokens,) for every row, padding left out.

    Args:
        rows: what the tokenizer gives for texts, or a tokenized dataset, whose labels are not read.
        method: with x the row's vectors and x₀ those of an empty row,
            "gradient-x-input": ∇f(x) · (x - x₀);
            "smoothgrad": so with the mean of `samples` gradients at x + Gaussian noise, of a standard deviation that is
            `noise` times the range of x (Smilkov et al. 2017, arXiv:1706.03825);
            "integrated-gradients": with the mean gradient on the straight way from x₀ to x, at `steps` Gauss-Legendre
            points (Sundararajan et al. 2017, arXiv:1703.01365);
            "layer-conductance": what of that goes through each place of `layer`, 1 the first, -1 the last, by the
            trapezoidal rule (Dhamdhere et al. 2018, arXiv:1805.12233);
            "occlusion": f(x) less f without the token (Zeiler and Fergus 2014, arXiv:1311.2901);
            "shapley": what f gains as the token comes, mean of `samples` random orders (Castro et al. 2009).
            The scores of the third, fourth and last add up to f(x) - f(x₀); a warning tells when `steps` are too few.
        target: which logit: a class; of tags, answers and language models (position, class or token); or a function of
            the logits, (variants, …) -> (variants,).  One for all rows, or a list.  Default: the class predicted.
        task: of a MultiTaskModel.  batch_size: variants of a row that are computed at once.
        baseline: id of the token, the mask say, whose vectors x₀ has; default: zeros, which do not do where vectors are
            divided by their length at once, as in ModernBERT: on the way from zeros nothing moves.
        whole_words: pieces of a word come and go together and share its score; special tokens stay, with the score 0.
            For it rows must come from the tokenizer, which knows the words.

    Raises ValueError naming the row for a target that is none, and for a model with both an encoder and a decoder.
    """
    one_of("method", method, METHODS)
    how = dict(layer=layer, steps=whole("steps", steps), samples=whole("samples", samples), noise=noise, seed=seed)
    with anatomy.evaluating(model):
        every = explained(model, rows, whole_words, target, task, baseline, batch_size)
        return [METHODS[method](row, **how).cpu().numpy() for row in every]


def explained(
    model: nn.Module, rows: Any, whole_words: bool, target: Any, task: Any, baseline: Any, size: int, probable=False
) -> Iterator[Explained]:
    """The rows, all checked, one after the other; probable: f is a probability, where the task has one."""
    tasks, encoding = tasks_of(model), rows if hasattr(rows, "word_ids") else None
    task = next(iter(tasks)) if task is None and len(tasks) == 1 else task
    both = getattr(anatomy.base_of(model).config, "is_encoder_decoder", False)
    refuse(
        (both, f"{anatomy.kind_of(model)} embeds two rows, an encoder's and a decoder's, and can't be explained here"),
        (task not in tasks, f"task={task!r}: say which, one of {', '.join(tasks) or 'None, as there is one'}"),
        (whole_words and encoding is None, "whole_words=True: rows don't know their words; pass tokenizer(texts)"),
    )
    if encoding is not None:
        rows = [dict(zip(encoding, values, strict=True)) for values in zip(*encoding.values(), strict=True)]
    rows = checked(rows, Door.of(model, "rows", labels_needed=False))
    known, of = range(rows.door.vocab_size or 2**31), probable and TASKS[tasks[task][0]].probabilities
    units = [text_words(encoding, i) if whole_words else [*range(n)] for i, n in enumerate(rows.lengths)]
    refuse(
        (baseline is not None and baseline not in known, f"baseline={baseline!r}: None or a token's id, in {known}"),
        *((own.count(None) == len(own), f"row {i} has no words; drop it") for i, own in enumerate(units)),
    )
    how = of or torch.positive, task, baseline, whole("batch_size", size)
    every = zip(rows, units, _targets(target, rows, *tasks[task]), strict=True)
    return (Explained(model, *one, *how) for one in every)


def _targets(target: Any, rows: Any, kind: str, classes: int) -> list:
    """For every row a function, None, or where its logit stands: (class,), (position, class)."""
    each, a_token = target.tolist() if hasattr(target, "tolist") else target, TASKS[kind].a_token or TASKS[kind].windows
    each = each if isinstance(each, list) else [each] * len(rows)
    refuse((len(each) != len(rows), f"target has {len(each)} entries for {len(rows)} rows; one for all, or one a row"))
    for i, (one, n) in enumerate(zip(each, rows.lengths, strict=True)):
        ranges, place = [range(-n, n)] * a_token + [range(classes)], one if isinstance(one, tuple) else (one,)
        fits = len(place) == len(ranges) and all(map(range.__contains__, ranges, place))
        need = f"(position, class) of {n} tokens and" if a_token else "one of"
        wrong = not fits and not callable(one) and (one is not None or a_token)
        refuse((wrong, f"row {i}: target={one!r}; {kind} needs {need} {classes} classes, counted from 0"))
    return [one if one is None or callable(one) or isinstance(one, tuple) else (one,) for one in each]


def faithfulness(
    model: nn.Module, rows: Any, scores: Sequence, *, target: Any = None, task: str | None = None,
    baseline: int | None = None, whole_words: bool = False, points: int = 21, batch_size: int = 32,
) -> dict[str, np.ndarray]:  # fmt: skip
    """How a prediction goes as tokens are taken away, the highest scores first, and how it comes as they are put in.

    scores: of `attribute`, or any numbers a token: random ones to compare with.  Other arguments are as there, but f is
    the target's probability where the task has one.  Returns `deletion`, `insertion`, float32 (rows, points): f at even
    shares of the tokens, from none to all; `deletion_area`, `insertion_area` (rows,), below these: of a faithful
    explanation one is small, the other large.  Source: Petsiuk et al. 2018 (RISE, arXiv:1806.07421), section 4.
    """
    shares, found = np.linspace(0, 1, whole("points", points, 2)), {"deletion": [], "insertion": []}
    with anatomy.evaluating(model):
        every = explained(model, rows, whole_words, target, task, baseline, batch_size, probable=True)
        for i, (row, own) in enumerate(zip(every, scores, strict=True)):
            refuse((len(own) != len(row.x), f"row {i}: {len(own)} scores for {len(row.x)} tokens; give one a token"))
            order = (row.units.float() @ torch.as_tensor(own).to(row.x)).argsort(descending=True, stable=True)
            there = torch.cat((torch.zeros_like(row.units[:1]), row.units[order].cumsum(0).bool()))
            values = row.f(torch.cat((~there, there))).view(2, -1).cpu().numpy()  # (2, units + 1)
            for name, curve in zip(found, values, strict=True):
                found[name].append(np.interp(shares, np.linspace(0, 1, len(curve)), curve))
    curves = {name: np.array(own, np.float32) for name, own in found.items()}
    return curves | {f"{name}_area": (own[:, 1:] + own[:, :-1]).mean(1) / 2 for name, own in curves.items()}
