"""Operations of expressions on text and bytes: comparing, finding, cutting, joining, changing case.

Text is UTF-8 and compares by bytes, which is the order of code points; lengths and positions count
characters. Rows of ASCII are worked on as they lie; case and white space of other rows are Python's, row by
row, so that they mean what Python's ``str`` means by them.

Loops are compiled when the first rows come (`text_kernels`); typing, which has none, needs no compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.values import NULL, Value, joined, repeated, settled
from iterreduce.errors import SchemaError

BLANKS = {"text": b"\t\n\v\f\r\x1c\x1d\x1e\x1f ", "bytes": b"\t\n\v\f\r "}
EVERYTHING = 2**62  # characters: to the end of any row


def compared(name: str, values: Sequence[Value], rows: int) -> Value:
    """Two columns of text, or of bytes, by a comparison of NumPy's."""
    mask = joined([value.mask for value in values])
    one = all(value.one for value in values)
    found = _compared(name, values, 1 if one else rows)
    return Value(found[0] if one else found, mask, one, all(v.constant for v in values))


def _compared(name: str, values: Sequence[Value], rows: int) -> Array:
    if not rows:
        return np.zeros(0, bool)
    from iterreduce.columns import text_kernels

    a, b = (_rows_of(value, rows) for value in values)
    if name in ("equal", "not_equal"):
        alike = np.empty(rows, bool)
        text_kernels.equal(*a, *b, alike)
        return alike if name == "equal" else ~alike
    signs = np.empty(rows, np.int8)
    text_kernels.compare(*a, *b, signs)
    made: Array = getattr(np, name)(signs, 0)
    return made


def _rows_of(value: Value, rows: int) -> tuple[Array, Array, Array]:
    """Data, starts and lengths; one value stands once in memory."""
    if not value.one:
        column: Ragged = value.data
        return column.values, column.offsets[:-1], column.lengths
    single = repeated(value.data, 1)
    return single.values, np.zeros(rows, np.int64), np.full(rows, len(single.values))


def concatenated(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """Texts, or bytes, one behind the other."""
    if all(value.data is None for value in values):
        return NULL
    values = settled(values)
    if len({value.kind for value in values}) > 1 or values[0].kind not in ("text", "bytes"):
        shown = " and ".join(value.described for value in values)
        raise SchemaError(f"concat of {shown}: wanted text, or bytes; convert by .cast(str)")
    mask = joined([value.mask for value in values])
    parts = [value.column(rows) for value in values]
    if len(parts) == 1 or not rows:
        return Value(parts[0], mask)
    every = Ragged.concat(parts).take(np.arange(rows * len(parts)).reshape(len(parts), rows).T.reshape(-1))
    return Value(Ragged(every.offsets[:: len(parts)].copy(), every.values, parts[0].kind), mask)


def _column(what: str, values: Sequence[Value], rows: int) -> tuple[Ragged, Any]:
    """The one argument as a column of text or bytes."""
    (value,) = values
    if value.data is None:
        value = Value("", value.mask, one=True)
    if value.kind not in ("text", "bytes"):
        raise SchemaError(f"{what} of {value.described}: wanted text or bytes; convert by .cast(str)")
    return value.column(rows), value.mask


def length(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """Characters of text, bytes of bytes."""
    column, mask = _column("str.length", values, rows)
    return Value(_counts(column), mask)


def _counts(column: Ragged) -> Array:
    if column.kind != "text" or not len(column):
        return column.lengths
    from iterreduce.columns import text_kernels

    out = np.empty(len(column), np.int64)
    text_kernels.characters(column.values, column.offsets[:-1], column.lengths, out)
    return out


def _finder(name: str, place: int) -> Callable[[Sequence[Value], tuple[Any, ...], int], Value]:
    def found(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
        column, mask = _column(f"str.{name}", values, rows)
        (literal,) = options
        if isinstance(literal, str) != (column.kind == "text"):
            raise SchemaError(f"str.{name} of {column.kind}: wanted {column.kind}, got {literal!r}")
        out = np.zeros(rows, bool)
        if rows:
            from iterreduce.columns import text_kernels

            asked = repeated(literal, 1).values
            text_kernels.found(column.values, column.offsets[:-1], column.lengths, asked, place, out)
        return Value(out, mask)

    return found


contains, starts_with, ends_with = _finder("contains", 0), _finder("starts_with", 1), _finder("ends_with", 2)


def sliced(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """``text[start:][:length]``."""
    column, mask = _column("str.slice", values, rows)
    if not rows:
        return Value(column, mask)
    from iterreduce.columns import text_kernels

    start, most = options
    most = EVERYTHING if most is None else most
    counts = _counts(column) if start < 0 else column.lengths
    out, text = np.empty((rows, 2), np.int64), column.kind == "text"
    text_kernels.cut(column.values, column.offsets[:-1], column.lengths, counts, start, most, text, out)
    return Value(_pieces(column, out), mask)


def _pieces(column: Ragged, cuts: Array) -> Ragged:
    """The parts of the rows that begin and are as long as ``cuts`` says."""
    from iterreduce.columns.gather import gathered

    offsets = np.zeros(len(cuts) + 1, np.int64)
    np.cumsum(cuts[:, 1], out=offsets[1:])
    return Ragged(offsets, gathered(column.values, np.ascontiguousarray(cuts[:, 0]), offsets), column.kind)


def strip(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """Without white space at both ends."""
    column, mask = _column("str.strip", values, rows)
    if not rows:
        return Value(column, mask)
    from iterreduce.columns import text_kernels

    blank = np.zeros(256, bool)
    blank[list(BLANKS[column.kind])] = True
    cuts = np.empty((rows, 2), np.int64)
    text_kernels.stripped(column.values, column.offsets[:-1], column.lengths, blank, cuts)
    return Value(_with_others(_pieces(column, cuts), column, str.strip), mask)


def lower(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """In lower case."""
    return _cased("str.lower", values, rows, (ord("A"), ord("Z"), 32), str.lower)


def upper(values: Sequence[Value], options: tuple[Any, ...], rows: int) -> Value:
    """In upper case."""
    return _cased("str.upper", values, rows, (ord("a"), ord("z"), -32), str.upper)


def _cased(
    what: str, values: Sequence[Value], rows: int, letters: tuple[int, int, int], other: Callable[[str], str]
) -> Value:
    column, mask = _column(what, values, rows)
    if not rows:
        return Value(column, mask)
    column, (first, last, shift) = column.compact(), letters
    table = np.arange(256, dtype=np.uint8)
    table[first : last + 1] += np.array(shift).astype(np.uint8)
    made = Ragged(column.offsets, table[column.values], column.kind)
    return Value(_with_others(made, column, other), mask)


def _with_others(made: Ragged, column: Ragged, function: Callable[[str], str]) -> Ragged:
    """The rows made, but those of text that is not ASCII from Python's function."""
    others = _not_ascii(column)
    if not len(others):
        return made
    raw = [function(text).encode(errors="surrogateescape") for text in column.take(others).to_list()]
    index = np.arange(len(column))
    index[others] = len(column) + np.arange(len(others))
    given = Ragged.from_list(raw)
    return Ragged.concat([made, Ragged(given.offsets, given.values, column.kind)]).take(index)


def _not_ascii(column: Ragged) -> Array:
    if column.kind != "text" or not (column.values >= 128).any():
        return np.zeros(0, np.int64)
    high = np.zeros(len(column.values) + 1, np.int64)
    np.cumsum(column.values >= 128, out=high[1:])
    return np.flatnonzero(high[column.offsets[1:]] > high[column.offsets[:-1]])


def among(value: Value, asked: list[Any], rows: int) -> Any:
    """Which rows are one of these texts: found by hash, then compared."""
    if any(type(a) is not (str if value.kind == "text" else bytes) for a in asked):
        raise SchemaError(f"is_in of {value.kind}: wanted constants of {value.kind}, got {asked[:3]}")
    if value.one:
        return np.bool_(value.data in asked)
    if not rows or not asked:
        return np.zeros(rows, bool)
    from iterreduce.columns.hashing import hash_bytes

    constants = Ragged.from_list(list(dict.fromkeys(asked)))
    hashes = hash_bytes(constants)
    order = np.argsort(hashes)
    place = np.minimum(np.searchsorted(hashes[order], hash_bytes(value.data)), len(hashes) - 1)
    nearest = constants.take(order[place])
    if len(np.unique(hashes)) < len(hashes):  # two constants of one hash: compare with each
        each = [compared("equal", [value, Value(a, one=True)], rows).data for a in dict.fromkeys(asked)]
        return np.logical_or.reduce(each)
    return compared("equal", [value, Value(nearest)], rows).data
