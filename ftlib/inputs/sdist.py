"""Download a source archive from the package index and run nothing in it: `pip download` would run its setup.py.

`python sdist.py -d FOLDER PACKAGE==VERSION`, with the options of `pip download`, has pip find the archive (on the
user's index, through the proxy, with the certificates) and fetch its bytes, by functions that are pip's own and may
change: tried with pip 23.2.1, 24.0, 25.0 and 26.0.
To copy: this file alone.
"""

import sys
from pathlib import Path


def save(arguments: list[str]) -> None:
    """Put the archive that `pip download` would choose into its folder, unopened; SystemExit where there is none."""
    from pip._internal.commands import create_command
    from pip._vendor.packaging.requirements import Requirement

    command = create_command("download")
    with command.main_context():
        options, (text,) = command.parse_args(["--no-binary=:all:", *arguments])
        wanted, session = Requirement(text), command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = finder.find_best_candidate(wanted.name, wanted.specifier).best_candidate
        if found is None:
            sys.exit(f"ERROR: no source archive of {wanted} on the package index")
        answer = session.get(found.link.url_without_fragment, headers={"Accept-Encoding": "identity"})
        answer.raise_for_status()
        target = Path(options.download_dir) / found.link.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(answer.content)


if __name__ == "__main__":
    save(sys.argv[1:])
