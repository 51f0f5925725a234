"""Sparse matrices that SciPy saved (``scipy.sparse.save_npz``): entries as columns row, col, data.

The members of such an archive differ in length, so it is no table: of ``coo`` the three lists of entries are
one, of ``csr`` and ``csc`` the rows (columns) of entries follow from `indptr`, which every rank holds once.
Other archives are read as tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import InputError
from iterreduce.sources.asked import Bounds
from iterreduce.sources.files import Found
from iterreduce.sources.npy import Npz, format_of

LISTS = {"coo": ("row", "col"), "csr": ("indptr", "indices"), "csc": ("indptr", "indices")}
INDEX = Field("fixed", np.dtype(np.int64))


class SparseNpz(Npz):
    """Archives of arrays, and of one sparse matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self._formats: dict[str, str] = {}
        self._pointers: dict[str, Array] = {}

    def inspect(
        self, path: str, wanted: Sequence[str] | None = None, bounds: Bounds = (), glance: bool = False
    ) -> Found:
        """Fields and rows (entries of a matrix)."""
        kind = self._format(path)
        if not kind:
            return super().inspect(path, wanted, bounds, glance)
        verified = {_member_of(kind, name) for name in wanted or ("row", "col", "data")}
        members, nbytes = self.inspect_members(path, None, set() if glance else verified)
        fields = {name: field for name, (field, _) in members.items() if field is not None}
        rows = {name: n for name, (_, n) in members.items()}
        if not glance:
            self._check(path, kind, fields, rows)
            if "indptr" in verified:
                self._check_pointer(path, kind, rows["data"])
        return Found({"row": INDEX, "col": INDEX, "data": fields["data"]}, rows["data"], None, nbytes)

    def _check(self, path: str, kind: str, fields: dict[str, Field], rows: dict[str, int]) -> None:
        if kind not in LISTS:
            raise InputError(f"{path} holds a sparse matrix of format {kind}; save it as coo, csr or csc")
        for name in (*LISTS[kind], "data"):
            if name not in fields or fields[name].kind != "fixed" or fields[name].shape:
                raise InputError(f"{path}: a {kind} matrix needs an array {name}")
        if len({rows[name] for name in (*LISTS[kind], "data") if name != "indptr"}) > 1:
            raise InputError(f"{path}: the lists of its {kind} matrix differ in length")

    def _check_pointer(self, path: str, kind: str, entries: int) -> None:
        ends = self._pointer(path)[0]
        if not len(ends) or ends[0] != 0 or ends[-1] != entries or _falls(ends):
            raise InputError(f"{path}: indptr of its {kind} matrix does not rise from 0 to {entries}")

    def _format(self, path: str) -> str:
        if path not in self._formats:
            self._formats[path] = format_of(path)
        return self._formats[path]

    def _pointer(self, path: str) -> tuple[Array, int]:
        """Where the entries of each row (column) begin, and the bytes read for it: 0 after the first time."""
        if path in self._pointers:
            return self._pointers[path], 0
        field, rows = self.inspect_members(path, ("indptr",), ())[0]["indptr"]
        assert field is not None
        batch, nbytes = super().read(path, Schema({"indptr": field}), 0, rows)
        self._pointers[path] = batch["indptr"].astype(np.int64)
        return self._pointers[path], nbytes

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> tuple[Batch, int]:
        """Rows of a table, or entries of a matrix."""
        kind = self._format(path)
        if not kind:
            return super().read(path, schema, lo, hi)
        found: dict[str, Any] = {}
        total = 0
        for name, field in schema.items():
            member = _member_of(kind, name)
            if member == "indptr":
                ends, nbytes = self._pointer(path)
                found[name] = np.searchsorted(ends, np.arange(lo, hi), side="right") - 1
            else:
                batch, nbytes = super().read(path, Schema({member: field}), lo, hi)
                found[name] = batch[member]
            total += nbytes
        return Batch.from_dict(found), total


def _member_of(kind: str, column: str) -> str:
    """The array from which a column of the matrix is made."""
    of = {"csr": ("col", "row"), "csc": ("row", "col")}.get(kind)
    return column if of is None or column not in of else ("indices", "indptr")[of.index(column)]


def _falls(pointers: Array) -> bool:
    return bool((np.diff(pointers) < 0).any())
