"""Columns whose rows differ in length: bytes, text and lists, as offsets + values.

What it is not: a string library. It knows how to hold, take, join and cut rows; hashing, packing and
parsing read its two arrays directly. No Python loop runs over rows here, except where Python objects
come in (``from_list``) or go out (``to_list``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from iterreduce.errors import SchemaError

RaggedKind = Literal["bytes", "text", "list"]
Array = np.ndarray[Any, np.dtype[Any]]


class Ragged:
    """``len`` rows of varying length: row ``i`` is ``values[offsets[i]:offsets[i + 1]]``.

    ``offsets`` is int64 of shape ``(n + 1,)``, ascending, and need not begin at 0 (a slice shares its
    values); ``values`` is one-dimensional: uint8 for ``bytes`` and ``text`` (UTF-8), any fixed dtype for
    ``list``.

    >>> words = Ragged.from_list(["to", "be", ""])
    >>> words.to_list(), words.lengths.tolist()
    (['to', 'be', ''], [2, 2, 0])
    """

    __slots__ = ("__weakref__", "kind", "offsets", "values")

    def __init__(self, offsets: Array, values: Array, kind: RaggedKind = "bytes"):
        if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) == 0:
            raise SchemaError(
                f"offsets of a ragged column: wanted int64 of shape (rows + 1,), got {offsets.dtype} "
                f"{offsets.shape}"
            )
        if values.ndim != 1 or values.dtype.hasobject:
            raise SchemaError(
                f"values of a ragged column: wanted one dimension of a fixed dtype, got {values.dtype} "
                f"{values.shape}"
            )
        if kind != "list" and values.dtype != np.uint8:
            raise SchemaError(f"values of a {kind} column: wanted uint8, got {values.dtype}")
        if offsets[0] < 0 or offsets[-1] > len(values):
            raise SchemaError(
                f"offsets of a ragged column run to {int(offsets[-1])}, but it holds {len(values)} values"
            )
        self.offsets, self.values, self.kind = offsets, values, kind

    @classmethod
    def from_list(cls, rows: Sequence[str | bytes] | Iterable[str | bytes]) -> Ragged:
        """Rows of ``str`` (text, stored as UTF-8) or of ``bytes``; a mixture is refused."""
        rows = list(rows)
        text = any(isinstance(row, str) for row in rows)
        if any(not isinstance(row, str if text else bytes) for row in rows):
            kinds = sorted({type(row).__name__ for row in rows})
            raise SchemaError(
                f"a column of text or bytes holds {' and '.join(kinds)}: make all of them str, or all bytes"
            )
        raw = [row.encode() if isinstance(row, str) else row for row in rows]
        offsets = np.zeros(len(raw) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, raw), np.int64, len(raw)), out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(raw), np.uint8), "text" if text else "bytes")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return f"Ragged({len(self)} rows of {self.kind}, {len(self.values)} {self.values.dtype} values)"

    def __getitem__(self, index: int) -> Any:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"row {index} of a ragged column of {n} rows")
        index %= n
        return self._row(int(self.offsets[index]), int(self.offsets[index + 1]))

    def _row(self, lo: int, hi: int) -> Any:
        piece = self.values[lo:hi]
        if self.kind == "text":
            return piece.tobytes().decode(errors="surrogateescape")
        return piece.tobytes() if self.kind == "bytes" else piece

    @property
    def lengths(self) -> Array:
        """int64 of shape ``(rows,)``."""
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held (of a slice: only its own)."""
        return int(self.offsets.nbytes + (self.offsets[-1] - self.offsets[0]) * self.values.itemsize)

    def to_list(self) -> list[Any]:
        """Python rows: ``str``, ``bytes`` or arrays."""
        ends = self.offsets.tolist()
        return [self._row(lo, hi) for lo, hi in pairwise(ends)]

    def slice(self, lo: int, hi: int) -> Ragged:
        """Rows ``lo`` to ``hi``, sharing memory."""
        return Ragged(
            self.offsets[lo : hi + 1] if hi > lo else self.offsets[lo : lo + 1], self.values, self.kind
        )

    def take(self, rows: Array) -> Ragged:
        """The rows at these positions (int array, or bool mask), copied."""
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        starts = self.offsets[:-1][rows]
        lengths = self.offsets[1:][rows] - starts
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # late: who takes no rows of text pays for no compiler
        from iterreduce.columns.gather import gathered

        return Ragged(offsets, gathered(self.values, starts, offsets), self.kind)

    def compact(self) -> Ragged:
        """The same rows with offsets that begin at 0 and values that hold nothing else (no copy if so
        already).
        """
        lo, hi = int(self.offsets[0]), int(self.offsets[-1])
        if lo == 0 and hi == len(self.values):
            return self
        return Ragged(self.offsets - lo, self.values[lo:hi], self.kind)

    def copy(self) -> Ragged:
        """Its own memory."""
        tight = self.compact()
        return Ragged(tight.offsets.copy(), tight.values.copy(), self.kind)

    def equals(self, other: Ragged) -> bool:
        """Same rows, whatever the offsets."""
        if len(self) != len(other) or self.kind != other.kind:
            return False
        a, b = self.compact(), other.compact()
        return bool(np.array_equal(a.offsets, b.offsets) and np.array_equal(a.values, b.values))

    def differs(self, other: Ragged) -> Array:
        """Which rows are not the same, bool of shape ``(rows,)``, of two columns of equal length.

        >>> Ragged.from_list(["to", "be"]).differs(Ragged.from_list(["to", "bee"])).tolist()
        [False, True]
        """
        out: Array = self.lengths != other.lengths
        rows = np.flatnonzero(~out)
        a, b = self.take(rows), other.take(rows)
        unlike = np.zeros(len(a.values) + 1, np.int64)
        np.cumsum(a.values != b.values, out=unlike[1:])
        out[rows] = unlike[a.offsets[1:]] > unlike[a.offsets[:-1]]
        return out

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """All rows of the parts, in order; parts must be of one kind and value dtype."""
        kinds = {(part.kind, part.values.dtype) for part in parts}
        if len(kinds) != 1:
            raise SchemaError(f"cannot join ragged columns of different kinds: {sorted(map(str, kinds))}")
        tight = [part.compact() for part in parts]
        ends = np.cumsum([0] + [len(part.values) for part in tight])
        offsets = [part.offsets[1:] + end for part, end in zip(tight, ends[:-1], strict=True)]
        return cls(
            np.concatenate([np.zeros(1, np.int64), *offsets]),
            np.concatenate([p.values for p in tight]),
            parts[0].kind,
        )
