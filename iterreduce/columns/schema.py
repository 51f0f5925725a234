"""Names and types of columns: what two ranks compare before they exchange rows.

A schema is data: it can be written as JSON, digested to 63 bits, and read back without running code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from iterreduce.errors import SchemaError, did_you_mean

FieldKind = Literal["fixed", "bytes", "text", "list"]
# complex and half floats may be held and moved; object, str and void arrays may not
FIXED_KINDS = "biufcmM"


@dataclass(frozen=True)
class Field:
    """The type of one column: of a fixed dtype and row shape, or ragged (``dtype`` is then that of its
    values).

    >>> Field("fixed", np.dtype("float64"), (16,)).describe()
    'float64[16]'
    """

    kind: FieldKind
    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()
    nullable: bool = False

    def describe(self) -> str:
        """``float64[16]``, ``int64``, ``text``, ``list of int64``; a trailing ``?`` where nulls may stand."""
        shape = f"[{','.join(map(str, self.shape))}]" if self.shape else ""
        name = {"fixed": f"{self.dtype.name}{shape}", "list": f"list of {self.dtype.name}"}.get(
            self.kind, self.kind
        )
        return name + ("?" if self.nullable else "")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a fixed column."""
        return int(self.dtype.itemsize * np.prod(self.shape, dtype=np.int64))


class Schema(Mapping[str, Field]):
    """Column names in order, with their fields.

    >>> s = Schema({"id": Field("fixed", np.dtype("int64"))})
    >>> s.describe(), Schema.from_json(s.to_json()) == s
    ('id int64', True)
    """

    __slots__ = ("_digest", "_fields")

    def __init__(self, fields: Mapping[str, Field] | Iterable[tuple[str, Field]]):
        self._fields = dict(fields)
        self._digest: int | None = None

    def __getitem__(self, name: str) -> Field:
        try:
            return self._fields[name]
        except KeyError:
            raise SchemaError(missing_column(name, self._fields)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return self.digest()

    def __repr__(self) -> str:
        return f"Schema({self.describe()})"

    def describe(self) -> str:
        """``id int64, x float64[16]``."""
        return ", ".join(f"{name} {field.describe()}" for name, field in self._fields.items())

    def to_json(self) -> str:
        """One line, the same on all ranks for equal schemas."""
        rows = [[name, f.kind, f.dtype.str, list(f.shape), f.nullable] for name, f in self._fields.items()]
        return json.dumps(rows, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """The inverse of ``to_json``; reads data only."""
        return cls(
            (name, Field(kind, np.dtype(dtype), tuple(shape), nullable))
            for name, kind, dtype, shape, nullable in json.loads(text)
        )

    def digest(self) -> int:
        """63 bits that differ where the schemas differ; never 0."""
        if self._digest is None:
            raw = hashlib.blake2b(self.to_json().encode(), digest_size=8).digest()
            self._digest = (int.from_bytes(raw, "little") >> 1) | 1
        return self._digest

    def require(self, *names: str) -> None:
        """Raise `SchemaError` for the first name that is not a column, with the nearest one."""
        for name in names:
            if name not in self._fields:
                raise SchemaError(missing_column(name, self._fields))


def missing_column(name: str, columns: Iterable[str]) -> str:
    """The message for an unknown column."""
    columns = list(columns)
    listed = ", ".join(columns) or "none"
    return f'no column "{name}" (columns: {listed}){did_you_mean(name, columns)}'


def difference(ours: Schema, theirs: Schema) -> str:
    """The first difference of two schemas, in words; empty if there is none."""
    for name in (*ours, *theirs):
        if name not in theirs or name not in ours:
            return f'column "{name}" is on one side only'
        if ours[name] != theirs[name]:
            return f'column "{name}" is {ours[name].describe()} here and {theirs[name].describe()} there'
    return (
        ""
        if list(ours) == list(theirs)
        else f"columns stand in another order: {list(ours)} and {list(theirs)}"
    )


def never_null(schema: Schema) -> Schema:
    """The schema without its nullable marks: what must agree before rows can stand in one column."""
    return Schema({n: Field(f.kind, f.dtype, f.shape) for n, f in schema.items()})


def either_null(a: Schema, b: Schema) -> Schema:
    """Schema ``a`` with a column nullable where it is in either."""
    return Schema({n: Field(f.kind, f.dtype, f.shape, f.nullable or b[n].nullable) for n, f in a.items()})
