"""What a run.toml may say: read and checked, key by key, before anything is loaded."""

import difflib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

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
    "max_length": ((int,), str(LENGTH), "tokens of a text, special ones included; what is longer is cut"),
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
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        columns = isinstance(value, list) and not (value and all(isinstance(name, str) for name in value))
        for wrong, need in (
            (not fits, f"a {' or a '.join(kind.__name__ for kind in kinds)}"),
            (columns, "a str or a list of names of columns"),
            (isinstance(value, int) and value < 1, "at least 1"),
            (isinstance(value, float) and not 0 < value < 1, "a share between 0 and 1, or the name of a split"),
        ):
            if wrong:
                raise ValueError(f"{path}: {key} = {value!r} must be {need}")
    if missing := [key for key, (_, default, _) in _KEYS.items() if default == "needed" and not run.get(key)]:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    return run


def strategy_of(run: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What `tune` gets: tune = "lora", or a table [tune] with strategy = "lora" and its options."""
    tune = run.get("tune", "full")
    options = {"strategy": tune} if isinstance(tune, str) else {"strategy": "", **tune}
    return options.pop("strategy"), options


def checked(path: str | Path, run: dict[str, Any], output: Path) -> Any:
    """The run's TrainConfig; errors come before anything is loaded and name the file."""
    from ..methods.tuning import OPTIONS
    from ..tasks.task import KINDS
    from .settings import TrainConfig

    strategy, options = strategy_of(run)
    for key, value, choices in (("task", run["task"], KINDS), ("tune", strategy, tuple(OPTIONS))):
        if value not in choices:
            hint = f"{_near(value, choices)}choose one of {', '.join(choices)}"
            raise ValueError(f"{path}: unknown {key} {value!r}; {hint}")
    settings, takes = run.get("train", {}), OPTIONS[strategy] or ("no options",)
    _refuse_unknown(path, options, takes, " in [tune]", f"{strategy!r} takes")
    _refuse_unknown(path, settings, sorted(_fields()), " in [train]")
    settings = {"checkpoint_dir": str(output / "checkpoints"), "resume": run.get("resume", "auto")} | settings
    settings["resume"] = None if settings["resume"] in ("never", "no", "") else settings["resume"]
    try:
        _try(strategy, options)
        return TrainConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _near(word: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=2)
    return f"did you mean {' or '.join(near)}? " if near else ""


def _refuse_unknown(path: Any, given: Any, known: Any, where: str = "", what: str = "known are") -> None:
    """Say to a key that is not known where it belongs, or what may have been meant."""
    from ..methods.tuning import OPTIONS

    tune = {"strategy", *(option for options in OPTIONS.values() for option in options)}
    places = {"above the tables": _KEYS, "under [train]": _fields(), "under [tune]": tune}
    for key in given:
        if key not in known:
            hint = [f"it belongs {place}; " for place, keys in places.items() if key in keys] or [_near(key, known)]
            raise ValueError(f"{path}: unknown key {key!r}{where}; {hint[0]}{what} {', '.join(known)}")


def _try(strategy: str, options: dict[str, Any]) -> None:
    """The options' own checks, on a model of a few weights; what depends on the layers' names, the real one says."""
    import transformers

    from ..methods.tuning import tune

    targets, depth = options.get("targets"), options.get("layers")
    if isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets):
        options = options | {"targets": "all-linear"}
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"), 1)
    sizes["num_hidden_layers"] = depth if type(depth) is int and 0 < depth < 100 else 2
    tune(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)), strategy, **options)


def _fields() -> dict[str, tuple[str, ...]]:
    """{field of TrainConfig: (type, default, meaning)}, as its source has them."""
    from .settings import TrainConfig

    source = re.findall(r"^    (\w+): (.+?) = (.+?)(?:  # (.*))?$", inspect.getsource(TrainConfig), re.MULTILINE)
    return {name: tuple(rest) for name, *rest in source}


def keys() -> str:
    """What a run.toml may say: every key, with type, default and meaning."""
    from ..methods.tuning import tune
    from ..tasks.task import KINDS

    lines = ["keys of a run.toml (type; default): meaning"]
    for key, (kinds, default, meaning) in _KEYS.items():
        kinds = " or ".join(kind.__name__ for kind in kinds)
        lines.append(f"  {key} ({kinds}; {default or 'none'}): {meaning}{', '.join(KINDS) if key == 'task' else ''}")
    strategies = re.search(r"strategy, with its options.*?(?=\n\n)|$", inspect.getdoc(tune), re.DOTALL)[0]
    strategies = re.sub(r"\n +a PEFT configuration.*", "", strategies)  # not in a run.toml
    lines += ["", "[tune] (default): meaning", f"    {strategies}", "", "[train] (type; default): meaning"]
    lines += [f"  {name} ({kind}; {default}): {meaning}" for name, (kind, default, meaning) in _fields().items()]
    return "\n".join(lines)
