"""The plain gradient as CUDA graphs: recorded once for each shape of a batch, then started by a single launch.

A small step waits for Python to launch its thousands of kernels.  A recording is one launch, but holds on to shapes and
addresses.  Source: "Whole-network capture" in PyTorch's notes on CUDA.
"""

import torch

from ..core import anatomy
from ..core.batches import IGNORE, refuse
from ..core.loop import Gradient
from ..tasks.task import TASKS
from . import distributed
from .feeding import Feed, Step
from .task_gradients import Losses

MULTIPLE, MOST = 32, 16  # of tokens, that lengths are padded to; shapes that are recorded, others run without


def check(losses: Losses, feed: Feed) -> None:
    """ValueError for what can't be recorded, with the reason and the remedy."""
    config, picks = feed.run.config, not all(TASKS[kind].labelled for kind, _ in feed.tasks.values())
    for wrong, why in (
        (distributed.world_size() > 1 or config.distributed == "fsdp", "is for one process that has the whole model;"),
        (feed.run.precision == "fp16", "has no loss scaling; take precision='bf16' or 'fp32', or"),
        ("" not in feed.tasks or config.task_gradients, "is for the gradient of one task, without task_gradients;"),
        (losses.unseen, "fills batches up with rows that the task's own loss leaves out; drop loss=, or"),
        (picks, "needs fixed shapes, and a language model's loss picks the trained tokens;"),
        (feed.packed, "needs fixed shapes, which no unpadded batch has; take the model without unpad, or"),
        (feed.pad.alike or feed.pad.side == "left", "pads further on the right, which this model reads;"),
        *((getattr(config, name), f"does not go with {name}; drop that, or")
          for name in ("compile", "gradient_checkpointing", "r_drop", "max_tokens")),
        (feed.device.type != "cuda", f"needs a CUDA GPU, and the device is {feed.device.type!r};"),
    ):  # fmt: skip
        refuse((wrong, f"cuda_graphs=True {why} leave cuda_graphs off"))


def padded(batch: dict, feed: Feed, longest: int) -> dict:
    """The batch in one of few shapes: longer rows, and for rows that are lacking others again, without labels."""
    (rows, tokens), numbers = batch["input_ids"].shape, batch["labels"].is_floating_point()  # each is a label
    order = torch.arange(rows if numbers else feed.sizes()[0] or feed.run.config.batch_size, device=feed.device) % rows
    more, out = min(-(-tokens // MULTIPLE) * MULTIPLE, longest) - tokens, {}
    for name, value in batch.items():
        out[name] = value[order]
        if value.shape[1:2] == (tokens,) and not (name == "labels" and numbers):
            fill = {"input_ids": feed.pad.id, "labels": IGNORE}.get(name, 0)
            out[name] = torch.nn.functional.pad(out[name], (*[0, 0] * (value.dim() - 2), 0, more), value=fill)
    out["labels"][rows:] = IGNORE
    return out


def recorded(losses: Losses, feed: Feed, model: torch.nn.Module) -> Gradient:
    """The gradient function of a run: the plain one's numbers but for rounding, and for what dropout draws."""
    check(losses, feed)
    longest = feed.longest or anatomy.max_positions(model.config) or 2**31  # of a stream nobody knows
    share = torch.ones((), device=feed.device)  # 1 / items of the step
    parameters, known, grads = [*model.parameters()], dict[tuple, tuple](), dict[torch.nn.Parameter, torch.Tensor]()

    def run(batch: dict) -> torch.Tensor:
        loss = losses.parts(model, batch, {"": 1}, share)[""]
        loss.backward()
        return loss.detach()

    def record(batch: dict) -> tuple:
        """(what is read, graph, where it leaves the loss), after two passes, of which the second adds to gradients."""
        pool = next((graph.pool() for _, graph, _ in known.values()), None)  # of memory, that all share
        capture = torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool=pool)
        capture.capture_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capture.capture_stream), torch.random.fork_rng():
            begun = torch.get_rng_state()
            model.zero_grad(set_to_none=True)  # those of this step so far are in `grads`, where all recordings add
            run(batch), run(batch)
            drawn = not torch.equal(begun, torch.get_rng_state())
            refuse((drawn, "cuda_graphs=True would repeat what the model draws on the CPU (layerdrop); leave it off"))
            for parameter in (p for p in parameters if p.grad is not None):
                parameter.grad = grads.setdefault(parameter, torch.zeros_like(parameter))
            with capture:  # which first waits for the GPU
                loss = run(batch)
        return batch, graph, loss

    def part(batch: dict) -> torch.Tensor:
        batch = padded(batch, feed, longest)
        shapes = sum(p.requires_grad for p in parameters), *((name, v.dtype, v.shape) for name, v in batch.items())
        if shapes not in known and len(known) == MOST:
            return run(batch)
        if shapes not in known:
            known[shapes] = record(batch)
        kept, graph, loss = known[shapes]
        torch._foreach_copy_([*kept.values()], [*batch.values()])
        graph.replay()
        return loss

    def gradient(model: torch.nn.Module, step: Step) -> torch.Tensor:
        for parameter, grad in grads.items():
            parameter.grad = grad
        grads and torch._foreach_zero_([*grads.values()])
        share.fill_(1 / max(step.items[""], 1))
        try:
            total = sum(map(part, step), torch.zeros_like(share))
        except RuntimeError as error:
            known.clear()  # out of memory, the step comes again in other shapes
            error.add_note("cuda_graphs=True: what asks the GPU for a number can't be recorded; leave cuda_graphs off")
            raise
        step.feed.ahead()
        return total

    return gradient
