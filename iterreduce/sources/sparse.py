"""Sparse matrices that SciPy saved (``scipy.sparse.save_npz``): entries as columns row, col, data.

The members of such an archive differ in length, so it is no table: of ``coo`` the three lists of entries are
one, of ``csr`` and ``csc`` the rows (columns) of entries follow from `indptr`, which every rank holds once.
Other archives are read as tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import InputError
from iterreduce.sources.npy import Npz, format_of

LISTS = {"coo": ("row", "col"), "csr": ("indptr", "indices"), "csc": ("indptr", "indices")}
INDEX = Field("fixed", np.dtype(np.int64))


class SparseNpz(Npz):
    """Archives of arrays, and of one sparse matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self._formats: dict[str, str] = {}
        self._pointers: dict[str, Array] = {}

    def inspect(self, path: str) -> tuple[Schema, int]:
        """Schema and rows (entries of a matrix)."""
        kind = self._format(path)
        if not kind:
            return super().inspect(path)
        members = self.inspect_members(path)
        fields = {name: field for name, (field, _) in members.items()}
        rows = {name: n for name, (_, n) in members.items()}
        self._check(path, kind, fields, rows)
        return Schema({"row": INDEX, "col": INDEX, "data": fields["data"]}), rows["data"]

    def _check(self, path: str, kind: str, fields: dict[str, Field], rows: dict[str, int]) -> None:
        if kind not in LISTS:
            raise InputError(f"{path} holds a sparse matrix of format {kind}; save it as coo, csr or csc")
        for name in (*LISTS[kind], "data"):
            if name not in fields or fields[name].kind != "fixed" or fields[name].shape:
                raise InputError(f"{path}: a {kind} matrix needs an array {name}")
        if len({rows[name] for name in (*LISTS[kind], "data") if name != "indptr"}) > 1:
            raise InputError(f"{path}: the lists of its {kind} matrix differ in length")
        if kind != "coo":
            pointers = self._pointer(path)
            if not len(pointers) or pointers[0] != 0 or pointers[-1] != rows["data"] or _falls(pointers):
                raise InputError(
                    f"{path}: indptr of its {kind} matrix does not rise from 0 to {rows['data']}"
                )

    def _format(self, path: str) -> str:
        if path not in self._formats:
            self._formats[path] = format_of(path)
        return self._formats[path]

    def _pointer(self, path: str) -> Array:
        if path not in self._pointers:
            field, rows = self.inspect_members(path, verify=False)["indptr"]
            batch = super().read(path, Schema({"indptr": field}), 0, rows)
            self._pointers[path] = batch["indptr"].astype(np.int64)
        return self._pointers[path]

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> Batch:
        """Rows of a table, or entries of a matrix."""
        kind = self._format(path)
        if not kind:
            return super().read(path, schema, lo, hi)
        of = {"csr": ("col", "row"), "csc": ("row", "col")}.get(kind)
        found: dict[str, Any] = {}
        for name, field in schema.items():
            if of is not None and name == of[1]:
                ends = self._pointer(path)
                found[name] = np.searchsorted(ends, np.arange(lo, hi), side="right") - 1
            else:
                member = "indices" if of is not None and name == of[0] else name
                found[name] = super().read(path, Schema({member: field}), lo, hi)[member]
        return Batch.from_dict(found)


def _falls(pointers: Array) -> bool:
    return bool((np.diff(pointers) < 0).any())
