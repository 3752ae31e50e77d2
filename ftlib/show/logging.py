"""Functions for `fit(..., on_record=...)` that hand every record on: to TensorBoard, to trackio.  Both are optional.

To copy: this file alone.
"""

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def _numbers(record: Record) -> dict[str, float]:
    """What can be drawn of a record: "train/loss", "eval/accuracy"."""
    numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in numbers.items()}


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
