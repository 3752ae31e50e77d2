"""For `fit(on_record=)`: lines of a log, TensorBoard, trackio (both optional).  To copy: this file alone."""

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def _numbers(record: Record) -> dict[str, float]:
    """What can be drawn of a record: "train/loss", "eval/accuracy"."""
    numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in numbers.items()}


def lines(every: int = 50) -> Callable[[Record], None]:
    """Print a line an evaluation, and one every so many steps, for the first, and for a step that was skipped.

    For a log file: whole lines, flushed, in place of a bar.

    >>> lines()({"step": 50, "epoch": 0.5, "loss": 0.693147, "learning_rate": 5e-05, "seconds": 12.34})
    step 50  epoch 0.50  loss 0.6931  learning_rate 5e-05  seconds 12.3
    >>> lines()({"step": 100, "epoch": 1.0, "eval_loss": 0.5, "eval_accuracy": 0.875})
    step 100  epoch 1.00  eval_loss 0.5  eval_accuracy 0.875
    """
    forms = {"step": "d", "epoch": ".2f", "seconds": ".1f"}

    def write(record: Record) -> None:
        evaluated = [name for name in record if name.startswith("eval_")]
        if evaluated or "skipped" in record or record["step"] == 1 or record["step"] % every == 0:
            names = ["step", "epoch", *(evaluated or ["loss", "learning_rate", "seconds"])]
            shown = [f"{name} {record[name]:{forms.get(name, '.4g')}}" for name in names if name in record]
            print(*shown, *(["skipped"] if "skipped" in record else []), sep="  ", flush=True)

    return write


def tensorboard(folder: str) -> Callable[[Record], None]:
    """Write the records as TensorBoard's event files: `tensorboard --logdir folder` shows them.  Needs tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def write(record: Record) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return write


def trackio(project: str, **options: Any) -> Callable[[Record], None]:
    """Log the records to a trackio project, on this machine: `trackio show` opens them.  options: of trackio.init."""
    import trackio as board

    board.init(project=project, **options)
    return lambda record: board.log(_numbers(record), step=record["step"])
