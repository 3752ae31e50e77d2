"""What a run.toml may say, checked before anything is loaded; and labels of own data, made ready for `tokenize`."""

import inspect
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_map

from ..core.batches import IGNORE, refuse
from ..inputs.assets import did_you_mean
from ..methods.tuning import OPTIONS, tune
from ..tasks.task import KINDS, TASKS
from .settings import TrainConfig

LENGTH, EVERY = 128, 50  # tokens of a text, steps between lines, where nothing is said
_KEYS = {  # key: (types, default, meaning)
    "model": ((str,), "needed", "a short name, a folder or a hub id"),
    "task": ((str,), "needed", "what is learned: "),
    "corpus": ((str,), "needed", "a short name, a folder, a file (csv, tsv, json, jsonl, parquet) or a hub id"),
    "output": ((str,), "needed", "a folder: the model ends in output/model, its numbers in output/metrics.json"),
    "text": ((str,), "text, or tokens", "column of the texts; for tags, of lists of words"),
    "text_pair": ((str,), "text_pair, if there", "column of the second texts"),
    "label": ((str, list), "label, or tags", "column of the labels; several labels: lists, or a list of columns"),
    "validation": ((str, float), "validation", "split to evaluate on, or the share of train held out for it"),
    "max_length": ((int,), f"{LENGTH}; of windows on contexts 384", "tokens of a row; what is longer is cut"),
    "stride": ((int,), "128, at most a third of max_length", "tokens that windows on a long context share"),
    "max_target_length": ((int,), "what the tokenizer takes", "tokens of a text that is to be written"),
    "prefix": ((str,), "", "what stands before every text of which another is made"),
    "mask_probability": ((float,), "0.15", "share of tokens that are masked and predicted"),
    "whole_words": ((bool,), "false", "mask all tokens of a word together"),
    "limit": ((int,), "all", "train on so many rows, drawn by the seed"),
    "tune": ((str, dict), "full", "a strategy, or a table [tune]: strategy, and its options"),
    "resume": ((str,), "auto", "auto: go on from the newest checkpoint in output; never: refuse to"),
    "log_every": ((int,), str(EVERY), "steps between lines, where the output is no terminal"),
    "train": ((dict,), "", "a table [train]: fields of ftlib.TrainConfig"),
}  # fmt: skip


def read_run(path: str | Path) -> dict[str, Any]:
    """The checked contents of a run.toml; ValueError naming file and key for what is missing, unknown or mistyped."""
    path = Path(path)
    try:
        run = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except OSError as error:
        why = "no file" if isinstance(error, FileNotFoundError) else "can't read"
        raise ValueError(f"{why} {path} ({error.strerror}); what goes into one: python -m ftlib train --help") from None
    except (ValueError, RecursionError) as error:  # tomllib's own errors, and what it lets through
        raise ValueError(f"{path}: not TOML in UTF-8 ({error})") from None
    _refuse_unknown(path, run, _KEYS)
    for key, value in run.items():
        kinds = _KEYS[key][0]
        fits = isinstance(value, kinds) and isinstance(value, bool) <= (bool in kinds)
        columns = isinstance(value, list) and not (value and all(isinstance(name, str) for name in value))
        refuse(
            (not fits, f"a {' or a '.join(kind.__name__ for kind in kinds)}"),
            (columns, "a str or a list of names of columns"),
            (type(value) is int and value < 1, "at least 1"),
            (isinstance(value, float) and not 0 < value < 1, "a share between 0 and 1, or the name of a split"),
            what=f"{path}: {key} = {value!r} must be ",
        )
    if missing := [key for key, (_, default, _) in _KEYS.items() if default == "needed" and not run.get(key)]:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    return run


def strategy_of(run: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What `tune` gets: tune = "lora", or a table [tune] with strategy = "lora" and its options."""
    asked = run.get("tune", "full")
    options = {"strategy": asked} if isinstance(asked, str) else {"strategy": "", **asked}
    return options.pop("strategy"), options


def checked(path: str | Path, run: dict[str, Any], output: Path) -> Any:
    """The run's TrainConfig; errors come before anything is loaded and name the file; those of options are `tune`'s."""
    strategy, options = strategy_of(run)
    for key, value, choices in (("task", run["task"], KINDS), ("tune", strategy, tuple(OPTIONS))):
        if value not in choices:
            hint = f"{did_you_mean(value, choices, 0.6)}choose one of {', '.join(choices)}"
            raise ValueError(f"{path}: unknown {key} {value!r}; {hint}")
    settings, takes = run.get("train", {}), OPTIONS[strategy] or ("no options",)
    _refuse_unknown(path, options, takes, " in [tune]", f"{strategy!r} takes")
    _refuse_unknown(path, settings, sorted(_fields()), " in [train]")
    settings = {"checkpoint_dir": str(output / "checkpoints"), "resume": run.get("resume", "auto")} | settings
    settings["resume"] = None if settings["resume"] in ("never", "no", "") else settings["resume"]
    try:
        return TrainConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse_unknown(path: Any, given: Any, known: Any, where: str = "", what: str = "known are") -> None:
    """Say to a key that is not known where it belongs, or what may have been meant."""
    options = {"strategy", *(option for own in OPTIONS.values() for option in own)}
    places = {"above the tables": _KEYS, "under [train]": _fields(), "under [tune]": options}
    for key in given:
        if key not in known:
            hints = [f"it belongs {place}; " for place, its in places.items() if key in its]
            hint = [*hints, did_you_mean(key, known, 0.6)][0]
            raise ValueError(f"{path}: unknown key {key!r}{where}; {hint}{what} {', '.join(known)}")


def _fields() -> dict[str, tuple[str, ...]]:
    """{field of TrainConfig: (type, default, meaning)}, as its source has them."""
    source = re.findall(r"^    (\w+): (.+?) = (.+?)(?:  # (.*))?$", inspect.getsource(TrainConfig), re.MULTILINE)
    return {name: tuple(rest) for name, *rest in source}


def keys() -> str:
    """What a run.toml may say: every key, with type, default and meaning."""
    lines = ["keys of a run.toml (type; default): meaning"]
    for key, (kinds, default, meaning) in _KEYS.items():
        kinds = " or ".join(kind.__name__ for kind in kinds)
        lines.append(f"  {key} ({kinds}; {default or 'none'}): {meaning}{', '.join(KINDS) if key == 'task' else ''}")
    strategies = re.search(r"strategy, with its options.*?(?=\n\n)|$", inspect.getdoc(tune), re.DOTALL)[0]
    strategies = re.sub(r"\n +a PEFT configuration.*", "", strategies)  # not in a run.toml
    lines += ["", "[tune] (default): meaning", f"    {strategies}", "", "[train] (type; default): meaning"]
    lines += [f"  {name} ({kind}; {default}): {meaning}" for name, (kind, default, meaning) in _fields().items()]
    return "\n".join(lines)


def labeled(parts: dict[str, Any], column: str | list[str], task: str, say: Callable = print) -> dict[str, Any]:
    """The splits of a corpus with a column "label", which `tokenize` numbers and names for the task.

    column: classes as a ClassLabel, words or whole numbers, or lists of them; lists or columns of 0 and 1; for
    regression numbers, or lists of them.  Rows outside "train" whose label is hidden (none, or -1 where train has no
    such class) are left out, which is said.  Raises ValueError for labels of another kind, with the remedy.
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
            own = [tree_map(lambda item, make=make: None if _none(item) else make(item), own[i]) for i in kept]
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
    shown = f"{min(items, key=lambda item: (item in (0, 1), str(item)), default=None)!r:.60}"
    each = ', or name columns of 0 and 1: label = ["a", "b"]' if record.multi_hot else ""
    words = {isinstance(item, str) for item in items}
    refuse(
        (len(words) > 1, f"words and numbers, {shown} among them; make them alike in all splits"),
        (items and not numbers and lists != (record.a_token or record.multi_hot),
         "lists, not one label a row" if lists else f"one label a row, no lists (JSON Lines){each}"),
        (numbers and (names or any(isinstance(item, str) for item in items)),
         f"{f'{len(names)} classes' if names else shown}; write plain numbers, 2.5, without quotes or decimal commas"),
        (IGNORE in _items(values["train"]) and not (numbers or yes_no or names),
         f"{IGNORE}, which is no class; give the column a datasets.ClassLabel, beside which {IGNORE} is ignored"),
        (odd and not (numbers or yes_no),
         f"{shown}; write whole numbers or words for classes, 0 or 1 in several columns, or set task = 'regression'"),
        what=f"task {task!r} does not fit the corpus: its {column!r} holds ",
    )  # fmt: skip
    return numbers or yes_no
