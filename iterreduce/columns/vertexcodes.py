"""Local numbers for the keys of rows that come in pieces: first all are counted, then each is looked up."""

from __future__ import annotations

from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.groups import KeyIndex, number_keys
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field


class Numbering:
    """Distinct keys of one type, by number, and how often each came in each of some roles.

    >>> from iterreduce.columns.schema import Field
    >>> numbering = Numbering(Field("fixed", np.dtype(np.int64)), 2)
    >>> numbering.count(np.array([7, 9, 7]), 0)
    >>> numbering.codes(np.array([9, 9])).tolist() == [numbering.keys().tolist().index(9)] * 2
    True
    """

    def __init__(self, field: Field, roles: int):
        self.field, self._roles = field, roles
        self._parts: list[tuple[Any, Array]] = []
        self._index: KeyIndex | None = None

    def count(self, keys: Any, role: int | None) -> None:
        """Take up the keys of some rows; they count in this role (None: in none)."""
        numbered = number_keys(Batch(key=keys))
        counts = np.zeros((self._roles, len(numbered)), np.int64)
        if role is not None:
            counts[role] = np.bincount(numbered.codes, minlength=len(numbered))
        self._parts.append((numbered.keys, counts))

    def _settle(self) -> None:
        if self._index is None:
            met = Batch.concat([k for k, _ in self._parts]) if self._parts else None
            numbered = number_keys(met) if met is not None else None
            if numbered is None:
                from iterreduce.columns.schema import Schema

                numbered = number_keys(Batch.empty(Schema({"key": self.field})))
            self._keys = numbered.keys
            self._counts = np.zeros((self._roles, len(numbered)), np.int64)
            if self._parts:
                np.add.at(self._counts.T, numbered.codes, np.concatenate([c for _, c in self._parts], 1).T)
            self._index = KeyIndex(self._keys)

    def keys(self) -> Any:
        """The distinct keys, by number."""
        self._settle()
        return self._keys["key"]

    @property
    def counts(self) -> Array:
        """int64 ``(roles, keys)``."""
        self._settle()
        return self._counts

    def codes(self, keys: Any) -> Array:
        """The number of each row's key, int32 ``(n,)``."""
        self._settle()
        assert self._index is not None
        return self._index.lookup(Batch(key=keys)).astype(np.int32)
