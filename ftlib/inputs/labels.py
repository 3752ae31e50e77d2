"""Labels of own data as `tokenize` reads them for a task: hidden ones left out, numbers of classes as their names.

To copy: this file, core/batches.py, core/anatomy.py and tasks/ (datasets).
"""

from collections.abc import Callable, Iterable
from typing import Any

from ..core.batches import IGNORE, short
from ..tasks.task import TASKS


def labelled(
    parts: dict[str, Any], column: str | list[str], task: str, say: Callable[[str], Any] = print
) -> dict[str, Any]:
    """The splits of a corpus with a column "label", which `tokenize` numbers and names for the task.

    column: classes as a ClassLabel, words or whole numbers, lists of them for tags or several labels a text; lists of 0
    and 1, or a list of columns of those; for regression numbers, or lists of them.  Rows outside "train" whose label is
    hidden (none, or -1 where train has no such class) are left out, as is a split with no others; that is said.
    Raises ValueError for labels of another kind, with the remedy.
    """
    from datasets import List, Value

    record, columns = TASKS[task], [column] if isinstance(column, str) else column
    values = {split: _read(part, columns, column) for split, part in parts.items()}
    inner = parts["train"].features[columns[0]]
    inner = getattr(inner, "feature", inner)
    names = getattr(inner, "names", None) if isinstance(column, str) else None
    ready = _checked(values, column, task, names)
    kind, make = (inner, int) if names else (Value("float32"), float) if ready else (Value("string"), str)
    hidden = (IGNORE,) if -1 in _items(values["train"]) and not names else (-1, IGNORE)
    done, seen = {}, {*map(str, _items(values["train"]))}
    for split, own in values.items():
        kept = [i for i, value in enumerate(own) if split == "train" or not _none(value, hidden, record.a_token)]
        if kept and split != "train" and record.probabilities is None:  # -1 may be a number like others
            kept = [i for i, value in enumerate(own) if not _none(value)]
        if len(kept) < len(own) or not own:
            some = f"{split}: {len(own) - len(kept)} rows without a label are left out"
            say(some if kept else f"{split} is left out: no row of it has a label")
        if kept:
            own = [_made(own[i], make) for i in kept]
            if new := sorted({*_items(own)} - seen - {None}) if make is str else []:
                say(f"{split} has classes that train has not: {', '.join(new)}")
            lists = any(isinstance(value, list) for value in own)
            part = parts[split].select(kept) if len(kept) < len(parts[split]) else parts[split]
            part = part.remove_columns(sorted({"label", *columns} & {*part.column_names}))
            done[split] = part.add_column("label", own, feature=List(kind) if lists else kind)  # in memory
    return done


def _read(part: Any, columns: list[str], column: Any) -> list:
    """A value a row, of several columns a list; None where the split lacks the column."""
    if not set(columns) <= set(part.column_names):
        return [None] * len(part)
    read = [part.with_format(None)[name][:] for name in columns]
    return read[0] if isinstance(column, str) else list(map(list, zip(*read, strict=True)))


def _items(values: Iterable[Any]) -> list:
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _made(value: Any, make: Callable) -> Any:
    """None stays, for `tokenize` to name its row."""
    if isinstance(value, list):
        return [_made(item, make) for item in value]
    return None if _none(value) else make(value)


def _none(value: Any, hidden: tuple = (), tags: bool = False) -> bool:
    """Whether a label is withheld, as in many a test split; no tags for words are, no classes at all are a label."""
    if isinstance(value, list):
        return (tags or bool(value)) and all(_none(item, hidden, tags) for item in value)
    return value is None or value == "" or value != value or value in hidden


def _checked(values: dict[str, list], column: Any, task: str, names: Any) -> bool:
    """Whether the labels are numbers that stay numbers; ValueError where they are not of the task's kind."""
    record, several = TASKS[task], isinstance(column, list)
    items = [item for item in _items(_items(values.values())) if not _none(item, (-1, IGNORE))]
    lengths = {len(value) if isinstance(value, list) else 0 for value in values["train"] if value is not None}
    lists, numbers = bool(lengths - {0}), record.probabilities is None
    yes_no = record.multi_hot and len(lengths) == 1 and not names and all(item in (0, 1) for item in items)
    odd = several or any(isinstance(item, (float, dict, list)) for item in items)
    shown = short(min(items, key=lambda item: (item in (0, 1), str(item)), default=None))
    each = ', or name columns of 0 and 1: label = ["a", "b"]' if record.multi_hot else ""
    words = {isinstance(item, str) for item in items}
    for wrong, why in (
        (len(words) > 1, f"words and numbers, {shown} among them; make them alike in all splits"),
        (items and not numbers and lists != (record.a_token or record.multi_hot),
         "lists, not one label a row" if lists else f"one label a row, no lists (JSON Lines){each}"),
        (numbers and (names or any(isinstance(item, str) for item in items)),
         f"{f'{len(names)} classes' if names else shown}; write plain numbers, 2.5, without quotes or decimal commas"),
        (IGNORE in _items(values["train"]) and not (numbers or yes_no or names),
         f"{IGNORE}, which is no class; give the column a datasets.ClassLabel, beside which {IGNORE} is ignored"),
        (odd and not (numbers or yes_no),
         f"{shown}; write whole numbers or words for classes, 0 or 1 in several columns, or set task = 'regression'"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(f"task {task!r} does not fit the corpus: its {column!r} holds {why}")
    return numbers or yes_no
