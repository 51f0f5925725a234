"""A real graph with string ids: the relations of WordNet, from Debian's package ``wordnet-base``.

The package is fetched with apt-get (no root is needed) and unpacked with dpkg, neither of which installs it;
the edge list is made once and kept in the temporary directory. Format of the data files: wndb(5WN).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "wordnet-base"
#: The letter before a synset's number says in which file it stands; satellites stand with the adjectives.
FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}


def edge_list() -> Path:
    """The file ``src dst``, one line per relation; made by whoever comes first. Raises `RuntimeError`."""
    folder = Path(tempfile.gettempdir()) / f"iterreduce-{PACKAGE}-{os.getuid()}"
    path = folder / "wordnet.edges"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "edges"
            lines = (f"{src} {dst}\n" for src, dst in relations(fetched(Path(work))))
            with made.open("w") as file:
                file.write("# relations of WordNet: synset synset\n")
                file.writelines(lines)
            made.replace(path)
    return path


def fetched(work: Path) -> Path:
    """The folder of data files: of an installed package, or of one that is fetched. Raises `RuntimeError`."""
    installed = Path("/usr/share/wordnet")
    if (installed / FILES["n"]).exists():
        return installed
    _run(["apt-get", "download", PACKAGE], work)
    packages = sorted(work.glob(f"{PACKAGE}_*.deb"))
    if not packages:
        raise RuntimeError(f"apt-get download {PACKAGE} said it was well, but left no package")
    _run(["dpkg", "-x", packages[-1].name, "unpacked"], work)
    found = next((work / "unpacked").rglob(FILES["n"]), None)
    if found is None:
        raise RuntimeError(f"{packages[-1].name} holds no {FILES['n']}")
    return found.parent


def _run(command: list[str], work: Path) -> None:
    told = f"the WordNet graph needs Debian's package {PACKAGE}: `{' '.join(command)}`"
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{told} cannot run: {error}") from error
    if done.returncode:
        raise RuntimeError(
            f"{told} failed with {done.returncode} (are there package lists? apt-get update): {done.stderr}"
        )


def relations(folder: Path) -> Iterator[tuple[str, str]]:
    """All pointers, as (synset, synset); a synset is its letter and its number."""
    for letter, name in FILES.items():
        for line in (folder / name).read_text(encoding="ascii").splitlines():
            if not line.startswith("  "):  # the licence
                yield from pointers(letter, line.split(" | ")[0].split())


def pointers(letter: str, cells: list[str]) -> Iterator[tuple[str, str]]:
    """The pointers of one synset: number, file, type, count of words (hexadecimal), words, pointers."""
    at = 4 + 2 * int(cells[3], 16)
    for i in range(int(cells[at])):
        _, number, kind, _ = cells[at + 1 + 4 * i : at + 5 + 4 * i]
        yield letter + cells[0], kind + number
