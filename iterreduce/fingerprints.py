"""What a job is, in words that can be compared: its loop, its parameters, and its input.

A checkpoint belongs to one job. `described` makes a flat mapping of a loop, place -> text, so that the first
place where two jobs differ can be named. A function is its name, its compiled code (without line numbers:
comments may change) and the plain values that it closes over; an object is its type, the code by
which it is called and, if it is a dataclass, its fields. Stopping rules are named without their thresholds:
who asks for more iterations goes on with the same loop.

`input_digests` tells what the sources hold: of files sizes and checksums of all bytes (of very large ones of
chunks spread evenly), of arrays an order-free digest of their rows, so neither depends on the number of ranks
nor on where the files lie. How it can go wrong: functions that a function calls by a global name, values in
globals, and attributes of objects that are no dataclasses are not looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from iterreduce.agreement import Guard, raise_agreed
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.checksum import checksum
from iterreduce.columns.expressions import Expr, key_of
from iterreduce.columns.hashing import hash_words, row_sums
from iterreduce.columns.ragged import Ragged
from iterreduce.fixpoint import Until
from iterreduce.loop import Loop
from iterreduce.sources.local import LocalSource

CHUNK_BYTES = 1 << 20
MOST_CHUNKS = 4096  # of one file: up to 4 GiB every byte is looked at
DEPTH = 12  # of values in values; what lies deeper is named by its type
CODE = ".code"
OURS = "iterreduce."  # modules whose code is known by its version
PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype)


# ---------------------------------------------------------------------- the loop


def described(loop: Loop) -> dict[str, str]:
    """Everything of a loop but its sources' rows, by place.

    >>> from iterreduce.loop import Local, Replace, State, Superstep
    >>> def twice(factor):
    ...     return Local(lambda s: s.with_columns(x=factor * s["x"]), ("s",), "t", cut="share")
    >>> def loop(factor, n):
    ...     step = Superstep("step", (twice(factor),), (Replace("s", "t"),))
    ...     start = {"a": Batch(x=np.ones(1))}
    ...     return Loop("double", start, {"s": State("a")}, (step,), Until.of([], n), "s")
    >>> difference(described(loop(2, 3)), described(loop(2, 99)))
    >>> difference(described(loop(2, 3)), described(loop(5, 3)))
    'body.0.stages.0.function.factor: 2 then, 5 now'
    """
    return dict(_lines("", _fields(loop), 0))


def stopping_rules(loop: Loop) -> dict[str, str]:
    """The rules, with their thresholds, of a loop and of the loops in its body."""
    out = dict(_lines("until", loop.until.rules, 0))
    for step in loop.body:
        if isinstance(step, Loop):
            out.update({f"{step.name}: {place}": text for place, text in stopping_rules(step).items()})
    return out


def difference(then: Mapping[str, str], now: Mapping[str, str], same_python: bool = True) -> str | None:
    """The first place where two jobs differ, in words; None where they are the same."""
    for place in dict.fromkeys((*then, *now)):
        if place.endswith(CODE) and not same_python:
            continue
        if then.get(place) != now.get(place):
            if place.endswith(CODE):
                return f"the code of the function at {place.removesuffix(CODE)} has changed"
            return f"{place}: {then.get(place, 'nothing')} then, {now.get(place, 'nothing')} now"
    return None


def python() -> str:
    """The Python whose compiled code can be compared: major.minor."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _fields(loop: Loop) -> dict[str, Any]:
    found = {f.name: getattr(loop, f.name) for f in dataclasses.fields(loop)}
    found["sources"] = {
        name: source if isinstance(source, Loop | Batch) else _source_words(source)
        for name, source in loop.sources.items()
    }
    return found


def _source_words(source: Any) -> str:
    """What kind of source it is, and what it reads of its files, where that is not all."""
    asked = getattr(source, "asked", "")
    return f"{type(source).__name__} of {asked}" if asked else type(source).__name__


def _lines(place: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    """The value as (place, text), one for each of its plain parts."""
    at = f"{place}." if place else ""
    if isinstance(value, PLAIN):
        yield place, repr(value.item() if isinstance(value, np.generic) else value)
    elif isinstance(value, Batch | np.ndarray | Ragged):
        yield place, array_text(value)
    elif isinstance(value, Expr):
        yield place, repr(key_of(value))
    elif isinstance(value, Group):  # of another number of ranks it is another one
        yield place, Group.__name__
    elif isinstance(value, Until):
        yield place, ", ".join(type(rule).__name__ for rule in value.rules)
    elif depth > DEPTH:
        yield place, type(value).__name__
    elif isinstance(value, Loop):
        yield from _lines(place, _fields(value), depth + 1)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _lines(f"{at}{key}", part, depth + 1)
        if not value:
            yield place, "nothing"
    elif isinstance(value, set | frozenset):
        yield place, repr(sorted(map(repr, value)))
    elif isinstance(value, tuple | list):
        yield f"{at}length", str(len(value))
        for i, part in enumerate(value):
            yield from _lines(f"{at}{i}", part, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"{at}kind", type(value).__name__
        for field in (f for f in dataclasses.fields(value) if f.compare):
            yield from _lines(f"{at}{field.name}", getattr(value, field.name), depth + 1)
        yield from _method_lines(place, value)
    else:
        yield from _function_lines(place, value, depth)


def _function_lines(place: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    at = f"{place}." if place else ""
    if isinstance(value, functools.partial):
        yield from _lines(place, value.func, depth + 1)
        yield from _lines(f"{at}arguments", (value.args, value.keywords), depth + 1)
        return
    function = getattr(value, "py_func", value)  # compiled by Numba
    if isinstance(function, types.MethodType):
        if dataclasses.is_dataclass(function.__self__):
            yield from _lines(f"{at}self", function.__self__, depth + 4)
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        yield place, getattr(value, "__qualname__", "") or type(value).__qualname__
        yield from _method_lines(place, value)
        return
    yield place, function.__qualname__
    yield place + CODE, code_digest(function.__code__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            inside = cell.cell_contents
        except ValueError:  # not bound yet: it refers to itself
            continue
        if inside is not value:
            yield from _lines(f"{at}{name}", inside, depth + 4)
    if function.__defaults__:
        yield from _lines(f"{at}defaults", function.__defaults__, depth + 4)
    if function.__kwdefaults__:
        yield from _lines(f"{at}defaults", function.__kwdefaults__, depth + 4)


def _method_lines(place: str, value: Any) -> Iterator[tuple[str, str]]:
    """The code of a user's object that is called, or run as a map."""
    for name in ("__call__", "run"):
        method = getattr(type(value), name, None)
        if isinstance(method, types.FunctionType) and not f"{method.__module__}".startswith(OURS):
            yield f"{place}.{name}{CODE}", code_digest(method.__code__)


def code_digest(code: types.CodeType) -> str:
    """Of what a function does, not of where it stands in its file."""
    parts = [code.co_code.hex(), repr(code.co_names), repr(code.co_varnames), repr(code.co_freevars)]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            parts.append(code_digest(constant))
        elif isinstance(constant, frozenset):
            parts.append(repr(sorted(map(repr, constant))))
        else:
            parts.append(repr(constant))
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=8).hexdigest()


def array_text(value: Any) -> str:
    """Schema and content of rows that stand in the loop itself.

    >>> array_text(np.arange(3))
    'int64[3] cf5ddb2411b6887b'
    """
    batch = value if isinstance(value, Batch) else None
    columns = [value] if batch is None else [batch[name] for name in batch.names]
    digest = hashlib.blake2b(digest_size=8)
    for column in columns:
        for array in _arrays(column):
            plain = array.astype("U") if array.dtype.hasobject else np.ascontiguousarray(array)
            digest.update(plain.tobytes())
    if batch is not None:
        for mask in map(batch.valid, batch.names):
            if mask is not None and not mask.all():
                digest.update(mask.tobytes())
        return f"{batch.schema.describe()} of {len(batch)} rows {digest.hexdigest()}"
    kind = value.kind if isinstance(value, Ragged) else value.dtype
    return f"{kind}{list(getattr(value, 'shape', [len(value)]))} {digest.hexdigest()}"


def _arrays(column: Any) -> tuple[Any, ...]:
    """What a column holds, wherever its values begin."""
    if not isinstance(column, Ragged):
        return (column,)
    first, last = column.offsets[0], column.offsets[-1]
    return column.offsets - first, column.values[first:last]


# ---------------------------------------------------------------------- the input


def input_digests(group: Group, sources: Mapping[str, Any], guard: Guard) -> dict[str, str]:
    """What each opened source holds, by name; for each of its files by number. Collective."""
    parts = {place: part for name, source in sources.items() for place, part in _inputs(name, source)}
    sums = np.zeros((len(parts), 2), np.int64)
    for row, part in zip(sums, parts.values(), strict=True):
        found = guard.run(_share_of, part, group.rank, group.size)
        if found is not None:
            row[:] = found
    flat = np.concatenate([sums.reshape(-1), [guard.failure is not None]]).astype(np.int64)
    group.allreduce(flat, "sum")
    if flat[-1]:
        raise_agreed(group, guard.failure)
    total = flat[:-1].reshape(-1, 2).view(np.uint64)
    return {
        place: f"{int(rows)} {'bytes' if isinstance(part, str) else 'rows'}, digest {int(sum_):016x}"
        for (place, part), (rows, sum_) in zip(parts.items(), total, strict=True)
    }


def _inputs(place: str, source: Any) -> Iterator[tuple[str, str | Batch]]:
    """The files and batches behind a source: paths, and this rank's rows."""
    if isinstance(source, Loop):
        for name, inner in source.sources.items():
            yield from _inputs(f"{place}.{name}", inner)
    elif isinstance(source, LocalSource):
        yield place, source.rows
    elif getattr(source, "files", None):
        for i, file in enumerate(source.files):
            yield (f"{place}, file {i + 1}" if len(source.files) > 1 else place), file.path
    elif (inner := _made_of(source)) is not None:
        yield from _inputs(place, inner)


def _made_of(source: Any) -> Any:
    """The source behind one that is made of another."""
    if isinstance(source, Batch):
        return None
    if getattr(source, "source", None) is not None:
        return source.source
    return next((s for s in vars(source).values() if hasattr(s, "open") and hasattr(s, "read")), None)


def opened_first(sources: Iterable[Any]) -> Iterator[Any]:
    """The sources, and those of loops that are sources, that are opened before they are read."""
    for source in sources:
        if isinstance(source, Loop):
            yield from opened_first(source.sources.values())
        elif not isinstance(source, Batch):
            yield source


def locals_of(source: Any) -> Iterator[LocalSource]:
    """The caller's arrays behind a source."""
    if isinstance(source, LocalSource):
        yield source
    elif isinstance(source, Loop):
        for inner in source.sources.values():
            yield from locals_of(inner)
    elif (made_of := _made_of(source)) is not None:
        yield from locals_of(made_of)


def _share_of(part: str | Batch, rank: int, size: int) -> tuple[int, int]:
    """Bytes or rows of this rank's part, and the sum of their hashes modulo 2^64 as int64."""
    if isinstance(part, Batch):
        if not part.names:
            return 0, 0
        return len(part), row_sums(part)[1]
    return _file_share(part, rank, size)


def _file_share(path: str, rank: int, size: int) -> tuple[int, int]:
    nbytes = os.stat(path).st_size
    chunks = -(-nbytes // CHUNK_BYTES)
    chosen = range(chunks) if chunks <= MOST_CHUNKS else np.linspace(0, chunks - 1, MOST_CHUNKS).astype(int)
    mine = chosen[len(chosen) * rank // size : len(chosen) * (rank + 1) // size]
    sums = np.zeros(len(mine), np.int64)
    with open(path, "rb", buffering=0) as file:
        for i, chunk in enumerate(mine):
            data = os.pread(file.fileno(), CHUNK_BYTES, int(chunk) * CHUNK_BYTES)
            sums[i] = checksum(data) + int(chunk) & 2**63 - 1
    return (nbytes if rank == 0 else 0), int(hash_words(sums).sum(dtype=np.uint64).view(np.int64))
