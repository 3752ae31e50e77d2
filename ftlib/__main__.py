"""The command line: python -m ftlib data fetch|list, train run.toml, doctor."""

import argparse
import dataclasses
import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

_RUN_KEYS = {
    "model": str, "task": str, "corpus": str, "output": str, "tune": (str, dict), "limit": int, "resume": str,
    "train": dict,
}  # fmt: skip


def read_run(path: str | Path) -> dict[str, Any]:
    """The checked contents of a run.toml: see ftlib/README.md.

    Raises ValueError naming the file and the key for what is missing, unknown or of another type.
    """
    path = Path(path)
    try:
        run = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except (ValueError, RecursionError) as error:  # tomllib's own errors, and what it lets through
        raise ValueError(f"{path}: not TOML ({error})") from None
    for key, value in run.items():
        if key not in _RUN_KEYS:
            raise ValueError(f"{path}: unknown key {key!r}; known are {', '.join(_RUN_KEYS)}")
        if not isinstance(value, _RUN_KEYS[key]) or isinstance(value, bool):
            kinds = _RUN_KEYS[key] if isinstance(_RUN_KEYS[key], tuple) else (_RUN_KEYS[key],)
            raise ValueError(f"{path}: {key} = {value!r} must be a {' or a '.join(kind.__name__ for kind in kinds)}")
    for key in ("model", "task", "corpus", "output"):
        if key not in run:
            raise ValueError(f"{path}: {key!r} is missing")
    if run.get("limit", 1) < 1:
        raise ValueError(f"{path}: limit = {run['limit']} must be at least 1")
    return run


def train(path: str) -> int:
    """Train what a run.toml describes; the model ends in output/model, its numbers in output/metrics.json."""
    import ftlib

    from .engine import distributed

    run = read_run(path)
    output = Path(run["output"])
    config = _checked(path, run, output)
    distributed.start()
    first = distributed.rank() == 0  # writes and prints; the others compute
    with distributed.one_first():
        data = ftlib.load_corpus(run["corpus"])
        tokenizer = ftlib.load_tokenizer(run["model"])
    tokenized, names = tokenized_for(run["task"], data, tokenizer)
    labels = len(names) if names else 1
    with distributed.one_first():
        model = ftlib.load_model(run["model"], task=run["task"], num_labels=labels, label_names=names, seed=config.seed)
    try:
        ftlib.unpad(model)
    except ValueError as reason:  # slower, and the same numbers
        if first:
            print(f"with padding: {reason}")
    strategy, options = strategy_of(run)
    report = ftlib.tune(model, strategy, **options)
    if first:
        print(report)
    rows = tokenized["train"]
    if run.get("limit"):
        rows = rows.shuffle(seed=config.seed).select(range(min(run["limit"], len(rows))))
    result = ftlib.fit(model, rows, eval_dataset=tokenized["validation"], tokenizer=tokenizer, config=config)
    if result.stopped == "interrupted":  # what an earlier run wrote stays
        raise KeyboardInterrupt
    test = ftlib.evaluate(model, tokenized["test"], tokenizer=tokenizer, shared=True)
    if first:
        ftlib.save(ftlib.repad(model), output / "model", tokenizer)
        numbers = {"validation": result.metrics, "test": test, "seconds": result.seconds, "steps": result.steps}
        (output / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")
        print(json.dumps(numbers["test"], indent=1))
        print(f"model: {output / 'model'}   steps: {result.steps}   {result.stopped} after {result.seconds:.0f} s")
    distributed.stop()
    return 0


def strategy_of(run: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What `tune` gets: tune = "lora", or a table [tune] with strategy = "lora" and its options."""
    tune = run.get("tune", "full")
    if isinstance(tune, str):
        return tune, {}
    return tune.get("strategy", ""), {key: value for key, value in tune.items() if key != "strategy"}


def _checked(path: str, run: dict[str, Any], output: Path) -> Any:
    """The run's TrainConfig; errors come before anything is loaded and name the file."""
    from .engine.settings import TrainConfig
    from .methods.tuning import OPTIONS
    from .tasks.task import KINDS

    strategy, options = strategy_of(run)
    for key, value, choices in (("task", run["task"], KINDS), ("tune", strategy, OPTIONS)):
        if value not in choices:
            raise ValueError(f"{path}: unknown {key} {value!r}; choose one of {', '.join(choices)}")
    settings, known = run.get("train", {}), sorted(field.name for field in dataclasses.fields(TrainConfig))
    takes = OPTIONS[strategy] or ("no options",)
    for table, given, allowed, what in (
        ("tune", options, takes, f"{strategy!r} takes"), ("train", settings, known, "known are"),
    ):  # fmt: skip
        if unknown := [key for key in given if key not in allowed]:
            raise ValueError(f"{path}: unknown key {unknown[0]!r} in [{table}]; {what} {', '.join(allowed)}")
    settings = {"checkpoint_dir": str(output / "checkpoints"), "resume": run.get("resume", "auto"), **settings}
    if settings["resume"] in ("never", "no", ""):
        settings["resume"] = None
    try:
        return TrainConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def tokenized_for(task: str, data: Any, tokenizer: Any) -> tuple[Any, list[str] | None]:
    """A corpus tokenized for a task, and its label names (None for numbers)."""
    import ftlib

    features = data["train"].features
    column = "tags" if task == "token-classification" else "label" if "label" in features else "intent"
    if column not in features:
        raise ValueError(f"task {task!r} needs a column {column!r}; the corpus has {', '.join(features)}")
    feature = features[column]
    feature = getattr(feature, "feature", feature)  # the inside of a list of tags
    names = list(feature.names) if hasattr(feature, "names") else None
    if (names is None) != (task == "regression"):
        kind = "numbers" if names is None else f"{len(names)} classes"
        raise ValueError(f"task {task!r} does not fit the corpus: its {column!r} holds {kind}")
    text = "tokens" if task == "token-classification" else "text"
    return ftlib.tokenize(data, tokenizer, text=text, label=column, max_length=128), names


def print_assets() -> None:
    """One line an asset: name, whether it is here, size of the download, what it is, licence."""
    from .inputs import assets

    for row in assets.describe():
        here = "here" if row["present"] else "to fetch"
        licence = row["licence"].split(";")[0]  # of the data; the rest is the package's own
        print(f"{row['name']:<16} {here:<9} {row['megabytes']:>5} MB  {row['about']}; licence: {licence}")


def doctor() -> int:
    """Print versions, device, precision and why, the cache, and what is missing."""
    import importlib.metadata as metadata

    from .inputs import assets
    from .show import setup as environment

    environment.setup()
    print(f"cache       {assets.cache_dir()}")
    print_assets()
    for package in ("datasets", "evaluate", "scikit-learn", "seqeval", "matplotlib", "peft", "sentence-transformers"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            print(f"missing     {package}: pip install {package}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ftlib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="fetch or list corpora and weights")
    data = data.add_subparsers(dest="action", required=True)
    fetch = data.add_parser("fetch", help="download, check and unpack; all of them when none is named")
    fetch.add_argument("names", nargs="*")
    data.add_parser("list", help="what there is, and what is here")
    commands.add_parser("train", help="train what a run.toml describes").add_argument("file")
    commands.add_parser("doctor", help="versions, device, precision, cache, what is missing")
    options = parser.parse_args(arguments)
    try:
        if options.command == "train":
            return train(options.file)
        if options.command == "doctor":
            return doctor()
        from .inputs import assets

        if options.action == "fetch":
            for name, path in assets.fetch(options.names or None).items():
                print(f"{name:<18} {path}")
        else:
            print_assets()
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        who = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" in process {os.environ.get('RANK')}"
        print(f"error{who}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
