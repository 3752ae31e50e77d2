"""What keeps a run whole: interrupts held back, memory that runs out, steps that are not finite, random state.

To copy: this file, engine/distributed.py, core/anatomy.py, core/loop.py and torch.
"""

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.loop import Gradient
from . import distributed


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """What dropout will draw from, as of now."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class RandomState:
    """The random state after the last step, of this process; in a checkpoint that of all processes."""

    def __init__(self, device: torch.device):
        self.device, self.now = device, random_state(device)

    def take(self) -> None:
        self.now = random_state(self.device)

    def state_dict(self) -> dict[str, torch.Tensor]:
        parts = {kind: distributed.gather(state) for kind, state in self.now.items()}
        return {f"{kind}.{rank}": state for kind, states in parts.items() for rank, state in enumerate(states)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        own = distributed.rank()  # a process that was not there keeps the state it has
        found = {kind: state.get(f"{kind}.{own}", now) for kind, now in random_state(self.device).items()}
        set_random_state(found, self.device)
        self.take()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interrupt (Ctrl-C) back until the block, a short one, is done as a whole."""
    before, held = signal.getsignal(signal.SIGINT), []
    here = threading.current_thread() is threading.main_thread()  # which alone is ever interrupted
    if not here or before is not signal.default_int_handler:  # also inside another such block
        yield
        return
    signal.signal(signal.SIGINT, lambda *what: held.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


class Together:
    """A context for what must go together, as `steps` wants one; `whole` is False while, and after, it went wrong."""

    whole = True

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with uninterrupted():
            self.whole = False
            yield
            self.whole = True


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU a type of its own, on a CPU only words."""
    words = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return words or isinstance(error, torch.OutOfMemoryError)


def halving(gradient: Gradient, device: torch.device) -> Gradient:
    """The gradient function, that does a step again, halved by its `halve()` and `cut()`, when memory runs out."""

    def careful(model: nn.Module, step: Any) -> torch.Tensor:
        begun = random_state(device)
        while True:
            try:
                return gradient(model, step)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                step.halve()
            step.clear()
            model.zero_grad(set_to_none=True)
            gc.collect()  # after the `except` block, whose error holds on to the memory of the pass
            if device.type == "cuda":
                torch.cuda.empty_cache()
            set_random_state(begun, device)
            step.cut()

    return careful


BAD = "step {step}: loss {loss}, gradient norm {grad_norm} on the rows {skipped} of train_dataset"


def hopeless(history: list[dict], config: Any, total: int) -> str | None:
    """Why a run must end that has skipped its last `max_bad_steps` steps, or all `total`; None where it has not."""
    taken = [one for one in reversed(history) if "loss" in one]
    in_a_row = next((place for place, one in enumerate(taken) if "skipped" not in one), len(taken))
    if in_a_row < min(config.max_bad_steps, total):
        return None
    return (
        f"{BAD.format(**taken[0])}, not finite in {in_a_row} steps in a row; the weights are those of the last good "
        "step. Look for bad labels, or for numbers in the weights that are not finite; or begin anew, in another "
        f"checkpoint_dir, with a lower learning_rate ({config.learning_rate:g}) and with max_grad_norm"
    )
