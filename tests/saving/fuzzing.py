"""Damage to files, of every kind and decided by a seed, and the judge of what a reader makes of it.

Used by the bounded tests beside it and by the campaign `benchmarks/fuzz.py`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from iterreduce.collectives import SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.columns.checksum import checksum
from iterreduce.errors import CheckpointError, OutputError
from iterreduce.saving.directory import Attempt
from iterreduce.saving.inspecting import describe
from iterreduce.saving.reading import newest
from iterreduce.saving.sealing import sealed

from .kit import rows_of_every_kind, saved

Files = dict[str, bytes]
Rng = np.random.Generator
MOST_EXTRA_BYTES = 48 << 20  # that reading a small directory may hold, whatever the files claim
ATTEMPT, ONE, TWO = "attempt-000001", "000000000001", "000000000002"


class Finding(Exception):
    """A reader did what it must not."""


# ------------------------------------------------------------------------------- damage to bytes


def _span(raw: bytes, rng: Rng, most: int = 64) -> tuple[int, int]:
    lo = int(rng.integers(len(raw) + 1))
    return lo, min(len(raw), lo + int(rng.integers(1, most)))


def flip(raw: bytes, rng: Rng) -> bytes:
    """One to four bits turned over."""
    out = bytearray(raw)
    for at in rng.integers(0, max(1, 8 * len(raw)), int(rng.integers(1, 5))).tolist() if raw else []:
        out[at // 8] ^= 1 << at % 8
    return bytes(out)


def truncate(raw: bytes, rng: Rng) -> bytes:
    """The end is missing: a few bytes of it, or most, or all."""
    return raw[
        : [0, max(0, len(raw) - int(rng.integers(1, 9))), int(rng.integers(len(raw) + 1))][rng.integers(3)]
    ]


def extend(raw: bytes, rng: Rng) -> bytes:
    """Something stands behind the end: zeros, noise, or the file once more."""
    n = int(rng.integers(1, 5000))
    return raw + [bytes(n), rng.bytes(n), raw][rng.integers(3)]


def zero(raw: bytes, rng: Rng) -> bytes:
    """A page of zeros, as some file systems leave after a crash."""
    page = int(rng.choice([64, 512, 4096]))
    lo = int(rng.integers(len(raw) // page + 1)) * page
    return raw[:lo] + bytes(min(page, len(raw) - lo)) + raw[lo + page :]


def noise(raw: bytes, rng: Rng) -> bytes:
    """Random bytes in the middle."""
    lo, hi = _span(raw, rng)
    return raw[:lo] + rng.bytes(hi - lo) + raw[hi:]


def splice(raw: bytes, rng: Rng) -> bytes:
    """A part of the file stands, or is repeated, at another place of it."""
    lo, hi = _span(raw, rng, 5000)
    at = int(rng.integers(len(raw) + 1))
    end = at + (hi - lo) * int(rng.integers(2))
    return raw[:at] + raw[lo:hi] + raw[end:]


def extreme(raw: bytes, rng: Rng) -> bytes:
    """A word of 1, 2, 4 or 8 bytes is 0, -1, the largest, or so."""
    width = int(rng.choice([1, 2, 4, 8]))
    at = int(rng.integers(max(1, len(raw) - width)))
    word = int(rng.choice([0, 1, -1, 2**31 - 1, 2**62, -(2**63)])) & (256**width - 1)
    return (raw[:at] + word.to_bytes(width, "little") + raw[at + width :])[: len(raw)]


BYTES: tuple[Callable[[bytes, Rng], bytes], ...] = (flip, truncate, extend, zero, noise, splice, extreme)


def damaged(files: Files, rng: Rng) -> tuple[Files, str]:
    """The files of a directory with one thing wrong, and what: in bytes, or in which file stands where."""
    files, names = dict(files), sorted(files)
    name, other = (names[int(i)] for i in rng.integers(0, len(names), 2))
    kind = int(rng.integers(len(BYTES) + 4))
    if kind < len(BYTES):
        files[name] = BYTES[kind](files[name], rng)
        return files, f"{BYTES[kind].__name__} {name}"
    if kind == len(BYTES):
        del files[name]
        return files, f"delete {name}"
    if kind == len(BYTES) + 1:
        files[name], files[other] = files[other], files[name]
        return files, f"swap {name} and {other}"
    if kind == len(BYTES) + 2:
        files[name] = files[other]
        return files, f"{name} is a copy of {other}"
    cut = int(rng.integers(len(files[name]) + 1))
    files[name] = files[name][:cut] + files[other][cut:]
    return files, f"{name} goes on as {other}"


# ------------------------------------------------------------------------------- forged facts


def evil(rng: Rng) -> Any:
    """A value that no field expects."""
    deep: Any = 0
    for _ in range(int(rng.integers(1, 200))):
        deep = [deep]
    values = [
        None, True, -1, 0, 1, 2, 7, 2**31, 2**60, 2**62, 2**63, 2**64, 10**300, 0.5, 1e308, "", "x", "\0",
        "../..", "/etc/passwd", "node-0001.h5", "index.h5", "|O8", "<f8", "|V1", "<M8[99999s]", "0" * 16,
        "\ud800", [], {},
        [0], [[0, 0, 0, "0" * 16]], {"a": 1}, deep, [0] * 100_000, "text", "list", "fixed", 12, -(2**63),
    ]  # fmt: skip
    return values[int(rng.integers(len(values)))]


def places_in(facts: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside."""
    inside = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ()
    return [place for key, value in inside for place in ((*at, key), *places_in(value, (*at, key)))]


def holder_of(facts: Any, place: tuple[Any, ...]) -> Any:
    """What holds the value at this place."""
    for key in place[:-1]:
        facts = facts[key]
    return facts


def forged(raw: bytes, rng: Rng) -> tuple[bytes, str]:
    """A sealed file with one to three fields changed and sealed again; or with JSON that no writer writes."""
    facts = json.loads(raw)
    del facts["checksum"]
    told = []
    for _ in range(int(rng.integers(1, 4))):
        told.append(_forge(facts, rng))
    try:
        raw = sealed(facts)
    except (ValueError, RecursionError):
        return resealed(b'{\n"format": ' + b"[" * 50_000), "deep JSON"
    if rng.integers(20) == 0:
        body = raw[: raw.rindex(b',\n"checksum"')]
        name = (b'"format": NaN', b'"number": 1', b'"x": 1e999', b'"x": ' + b"[" * 10**6)[
            int(rng.integers(4))
        ]
        return resealed(body + b",\n" + name), "JSON of another kind"
    return raw, ", ".join(told)


def resealed(body: bytes) -> bytes:
    """With a checksum that fits."""
    return body + f',\n"checksum": "{checksum(body):016x}"\n}}\n'.encode()


def _forge(facts: Any, rng: Rng) -> str:
    places = places_in(facts)
    place = places[int(rng.integers(len(places)))]
    holder, key, kind = holder_of(facts, place), place[-1], int(rng.integers(5))
    told = "/".join(map(str, place))[:80]
    if kind == 0:
        del holder[key]
        return f"without {told}"
    if kind == 1:
        other = places[int(rng.integers(len(places)))]
        holder[key] = copy.deepcopy(holder_of(facts, other)[other[-1]])
        return f"{told} as {'/'.join(map(str, other))[:80]}"
    if kind == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
        return f"{told} twice"
    if kind == 3 and type(holder[key]) is int:
        holder[key] += int(rng.choice([-8, -1, 1, 8, 2**40]))
        return f"{told} moved"
    holder[key] = evil(rng)
    return f"{told} = {str(holder[key])[:40]}"


# ------------------------------------------------------------------------------- checkpoint directories


class Directory:
    """A checkpoint directory with two checkpoints of different rows, and what may come out of it."""

    def __init__(self, place: Path, ranks: int = 2, rows: int = 40):
        place.mkdir(parents=True)
        self.rows = {1: rows_of_every_kind(rows, 1), 2: rows_of_every_kind(rows + 3, 2)}
        for number, batch in self.rows.items():
            saved(place / str(number), ranks, batch, range(number, number + 1))
        self.files: Files = {}
        for number in self.rows:
            for path in sorted((place / str(number)).rglob("*")):
                if path.is_file():
                    self.files[str(path.relative_to(place / str(number)))] = path.read_bytes()
        shutil.rmtree(place)
        self.checkpoints = [name for name in self.files if name.count("/") == 2]
        self.manifests = [name for name in self.files if name.endswith("manifest.json")]

    def judged(self, place: Path, files: Files, honest: bool = True) -> str:
        """Write these files, read them, and say which checkpoint came out of it, or that there was an error.

        Raises `Finding` where anything else happened. ``honest``: seals tell the truth.
        """
        self.write(place, files)
        if not honest:
            tracemalloc.start()  # sizes lie
        try:
            text, good = describe(place)
            outcome = self._read(place, honest)
            extra = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            shutil.rmtree(place, ignore_errors=True)
        if extra > MOST_EXTRA_BYTES + 12 * sum(map(len, files.values())):
            raise Finding(f"{extra >> 20} MiB were held")
        if honest and (outcome, good) != (wanted := self._wanted(files)):
            raise Finding(f"{outcome}, inspecting said {good}, wanted {wanted}: {text}")
        return outcome

    def _wanted(self, files: Files) -> tuple[str, bool]:
        """What comes out of it, and whether inspecting finds all of it good."""
        harmed = {name for name, raw in self.files.items() if files.get(name) != raw}
        harmed -= {name for name in ("iterreduce.json", f"{ATTEMPT}/attempts.json") if name not in files}
        bad = {name.split("/")[1] for name in harmed if name in self.checkpoints}
        whole = [name for name in ("newest", "before") if {"newest": TWO, "before": ONE}[name] not in bad]
        history = f"{ATTEMPT}/attempts.json" in files
        return "error" if "iterreduce.json" in harmed or not whole else whole[0], not harmed and history

    def write(self, place: Path, files: Files) -> None:
        """Put the files there, and nothing else."""
        shutil.rmtree(place, ignore_errors=True)
        for name in (*self.files, *files):
            os.makedirs((place / name).parent, exist_ok=True)
        for name, raw in files.items():
            (place / name).write_bytes(raw)

    def _read(self, place: Path, honest: bool) -> str:
        group = SoloGroup()
        try:
            found = newest(group, Attempt.open(group, place), lambda text: None)
            if found is None:
                raise Finding("the checkpoints are not seen")
            read = {name: found.read(name, 0, info.rows) for name, info in found.tables.items()}
        except (CheckpointError, OutputError) as error:
            if not str(error).strip():
                raise Finding("an error without words") from error
            return "error"
        right = found.number in self.rows and same(read.get("rows"), self.rows[found.number])
        if honest and not (right and found.facts == {"number": found.number} and list(read) == ["rows"]):
            raise Finding(f"wrong rows or facts as checkpoint {found.number}")
        return {2: "newest", 1: "before"}.get(found.number, "forged") if right else "forged"


def same(found: Batch | None, wanted: Batch) -> bool:
    """Equal rows of equal types."""
    return found is not None and found.schema == wanted.schema and bool(found.equals(wanted))
