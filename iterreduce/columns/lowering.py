"""Expressions as instructions for `iterreduce.columns.emitting`: types, casts and nulls made plain.

`Lowering` takes the steps that rows go through, conditions and new columns, and writes one program for all of
them. What it writes gives the types, nulls and bits that `iterreduce.columns.compute` gives. What only NumPy
can do (text, dates, vectors, logarithms) is an *island*: computed by NumPy beforehand, and read as a column,
as long as no rows have been dropped; else `Declined`.

A null is a bool beside the number, so masks are instructions like all others. Equal instructions are written
once. Constants and parameters are scalars, handed over in each call: programs do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.compute import _Evaluation, typed
from iterreduce.columns.emitting import Instruction, Program
from iterreduce.columns.expressions import Apply, Column, Constant, Expr, key_of
from iterreduce.columns.instructions import FREE, Declined, Read, Ref, Scalar, as_number, operation_of, short
from iterreduce.columns.operations import DIVISIONS, LOGIC, as_ufunc
from iterreduce.columns.schema import Field
from iterreduce.columns.trees import columns_of
from iterreduce.errors import SchemaError

MOST = 400  # instructions of one program
MOST_OPTIONS = 8  # of is_in, compared one by one


class Lowering:
    """A program while it is written. ``fields``: of the rows; ``values``: of parameters."""

    def __init__(self, fields: Mapping[str, Field], values: Mapping[str, Any]):
        self.fields, self.values = fields, values
        self.code: dict[Instruction, int] = {}
        self.reads: dict[Any, tuple[Read, str]] = {}
        self.scalars: dict[Any, Scalar] = {}
        self.made: dict[str, Ref] = {}
        self.condition: int | None = None

    # ------------------------------------------------------------------ steps

    def keep(self, predicate: Expr) -> None:
        """Only rows in which this holds go on."""
        found = self.lower(predicate)
        if found.nothing or found.dtype != np.bool_:
            raise Declined
        holds = self._held(found)
        self.condition = holds if self.condition is None else self._write("and", "b1", self.condition, holds)

    def make(self, trees: Mapping[str, Expr]) -> dict[str, Ref]:
        """These columns, of the rows that there are now."""
        return {name: self._made(tree) for name, tree in trees.items()}

    def row(self) -> int:
        """The number of the row."""
        return self._write("row", "i8")

    def load(self, name: str) -> Ref:
        """A column by its name: one that was made, or of the rows."""
        if name in self.made:
            if self.made[name].whole is not None:
                raise Declined
            return self.made[name]
        field = self.fields.get(name)
        if field is None or field.kind != "fixed" or field.shape:
            raise Declined
        return self._read(name, field)

    def whole(self, ref: Ref) -> str | Expr | None:
        """The column that it is, as it is, mask and all."""
        if ref.whole is not None:
            return ref.whole
        for (name, mask), (_, dtype) in self.reads.items():
            if not mask and isinstance(name, str) and ref.dtype is not None:
                at = self._load(self.reads[name, False][0], dtype)
                own = self._load(self.reads[name, True][0], "b1") if (name, True) in self.reads else None
                if (at, own) == (ref.at, ref.mask):
                    return name
        return None

    def program(self, outputs: tuple[int, ...], writes: tuple[str, ...]) -> Program:
        """All that was written."""
        if len(self.code) > MOST:
            raise Declined
        condition = -1 if self.condition is None else self.condition
        reads = tuple(dtype for _, dtype in self.reads.values())
        return Program(tuple(self.code), condition, outputs, writes, reads, len(self.scalars))

    @property
    def passes(self) -> int:
        """Operations that NumPy would make a pass of its own of."""
        return sum(instruction[0] not in FREE for instruction in self.code)

    def _made(self, tree: Expr) -> Ref:
        if isinstance(tree, Column) and tree.name in self.made:
            return self.made[tree.name]
        try:
            return self._column(self.lower(tree))
        except Declined:
            if isinstance(tree, Column) and tree.name in self.fields:
                return Ref(whole=tree.name)
            self._beforehand(tree)
            return Ref(whole=tree)

    def _column(self, found: Ref) -> Ref:
        """One number per row: Python numbers get their type, and divide like others."""
        if found.nothing:
            return Ref(self._number(0.0, np.dtype(np.float64)), np.dtype(np.float64), self._bool(False))
        if found.dtype is None:
            dtype = np.asarray(found.weak).dtype
            return Ref(self._number(found.weak, dtype), dtype)
        return replace(found, nonzero=False)

    # ------------------------------------------------------------------ trees

    def lower(self, tree: Expr) -> Ref:
        """What an expression is."""
        if isinstance(tree, Column):
            return self.load(tree.name)
        if not columns_of(tree):
            return self._without_columns(tree)
        assert isinstance(tree, Apply)
        try:
            return self._applied(tree)
        except Declined:
            return self._island(tree)

    def _applied(self, tree: Apply) -> Ref:
        function = LOWER.get(tree.operation)
        arguments = [self.lower(part) for part in tree.arguments]
        if function is not None:
            return function(self, arguments, tree.options)
        return self.elementwise(tree.operation, arguments)

    def _island(self, tree: Expr) -> Ref:
        field = self._beforehand(tree)
        if field.kind != "fixed" or field.shape:
            raise Declined
        return self._read(tree, field)

    def _beforehand(self, tree: Expr) -> Field:
        """The type of what NumPy is to compute on all rows."""
        if self.condition is not None or self.values or any(name in self.made for name in columns_of(tree)):
            raise Declined
        try:
            field = typed(tree, self.fields)
        except SchemaError:
            raise Declined from None
        if field is None:
            raise Declined
        return field

    def _read(self, of: str | Expr, field: Field) -> Ref:
        mask = self._load(Read(of, mask=True), "b1") if field.nullable else None
        return Ref(self._load(Read(of), short(field.dtype)), field.dtype, mask)

    def _load(self, read: Read, dtype: str) -> int:
        key = (read.of if isinstance(read.of, str) else key_of(read.of), read.mask)
        self.reads.setdefault(key, (read, dtype))
        return self._write("load", dtype, list(self.reads).index(key))

    def _without_columns(self, tree: Expr) -> Ref:
        if isinstance(tree, Constant) and type(tree.value) in (int, float):
            return Ref(weak=tree.value, nonzero=tree.value != 0)
        found = value_without_columns(tree, self.values)
        if found.data is None:
            return Ref(nothing=True)
        data = np.asarray(found.data)
        if found.kind != "fixed" or data.shape not in ((), (1,)):
            raise Declined
        mask = (
            None
            if found.mask is None
            else self._scalar(Scalar(np.dtype(bool), tree, mask=True), key_of(tree))
        )
        at = self._scalar(Scalar(data.dtype, tree), key_of(tree))
        return Ref(at, data.dtype, mask, nonzero=found.constant and bool(np.all(data != 0)))

    # ------------------------------------------------------------------ instructions

    def _write(self, *instruction: Any) -> int:
        return self.code.setdefault(instruction, len(self.code))

    def _scalar(self, scalar: Scalar, key: Any) -> int:
        key = (key, scalar.dtype, scalar.mask)
        self.scalars.setdefault(key, scalar)
        return self._write("scalar", short(scalar.dtype), list(self.scalars).index(key))

    def _number(self, value: Any, dtype: np.dtype[Any]) -> int:
        """A number of this type, if it holds it as NumPy demands."""
        short(dtype)
        return self._scalar(Scalar(dtype, value=as_number(value, dtype)), ("value", repr(value)))

    def _literal(self, value: int, dtype: np.dtype[Any]) -> int:
        """A number as part of the program: to divide by one that is known takes a multiplication."""
        as_number(value, dtype)
        return self._write("literal", short(dtype), value)

    def _bool(self, value: bool) -> int:
        return self._number(value, np.dtype(bool))

    def as_type(self, ref: Ref, dtype: np.dtype[Any]) -> int:
        """The number in another type, as ``astype`` gives it."""
        if ref.dtype is None:
            return self._number(ref.weak, dtype)
        source, wanted = short(ref.dtype), short(dtype)
        return ref.at if source == wanted else self._write("cast", wanted, source, ref.at)

    def both(self, a: int | None, b: int | None) -> int | None:
        """Where both masks hold."""
        return b if a is None else a if b is None or a == b else self._write("and", "b1", a, b)

    def _held(self, ref: Ref) -> int:
        return ref.at if ref.mask is None else self._write("and", "b1", ref.at, ref.mask)

    # ------------------------------------------------------------------ operations

    def elementwise(self, name: str, arguments: list[Ref]) -> Ref:
        """NumPy's function row by row, null where an argument is."""
        if any(a.nothing for a in arguments):
            raise Declined
        if name == "power":
            return self._power(*arguments)
        *inputs, dtype = self._resolved(name, arguments)
        mask = None
        for argument in arguments:
            mask = self.both(mask, argument.mask)
        if name in DIVISIONS:
            if dtype.kind == "f" or name == "fmod":
                raise Declined
            mask = self.both(mask, self._divides(arguments[1], dtype))
        operation, of = operation_of(name, inputs, dtype)
        operands = [self.as_type(a, of) for a in arguments]
        if name in DIVISIONS and arguments[1].dtype is None:
            operands[1] = self._literal(arguments[1].weak, of)
        return Ref(self._write(operation, short(of), *operands), dtype, mask)

    def _resolved(self, name: str, arguments: list[Ref]) -> list[np.dtype[Any]]:
        """The types of the loop that NumPy takes."""
        function = as_ufunc(name)
        if function is None or (name in LOGIC and any(a.dtype != np.bool_ for a in arguments)):
            raise Declined
        kinds = [type(a.weak) if a.dtype is None else a.dtype for a in arguments]
        try:
            return list(function.resolve_dtypes((*kinds, None)))
        except (TypeError, ValueError):
            raise Declined from None

    def _divides(self, divisor: Ref, dtype: np.dtype[Any]) -> int | None:
        if divisor.nonzero:
            return None
        at = self.as_type(divisor, dtype)
        return self._write("not_equal", short(dtype), at, self._number(0, dtype))

    def _power(self, base: Ref, exponent: Ref) -> Ref:
        """A square; other powers are NumPy's."""
        if exponent.weak != 2 or base.dtype is None or base.dtype.kind not in "if":
            raise Declined
        dtype = self._resolved("power", [base, exponent])[-1]
        at = self.as_type(base, dtype)
        return Ref(self._write("multiply", short(dtype), at, at), dtype, base.mask)

    def logic(self, name: str, arguments: list[Ref]) -> Ref:
        """Three-valued: what decides alone is sure, whatever the other is."""
        if any(a.nothing for a in arguments):
            no = self._bool(False)
            arguments = [Ref(no, np.dtype(bool), no) if a.nothing else a for a in arguments]
        plain = self.elementwise(name, arguments)
        if plain.mask is None:
            return plain
        sure = self._bool(False)
        for argument in arguments:
            held = argument.at if name == "or" else self._write("not", "b1", argument.at)
            held = held if argument.mask is None else self._write("and", "b1", held, argument.mask)
            sure = self._write("or", "b1", sure, held)
        at = sure if name == "or" else self._write("not", "b1", sure)
        return Ref(at, plain.dtype, self._write("or", "b1", plain.mask, sure))

    def chosen(self, holds: int, then: Ref, otherwise: Ref) -> Ref:
        """The one where a condition holds, else the other."""
        if then.nothing and otherwise.nothing:
            raise Declined
        masks = [self._bool(False) if r.nothing else r.mask for r in (then, otherwise)]
        mask = None
        if masks != [None, None]:
            mask = self._write("select", "b1", holds, *(self._bool(True) if m is None else m for m in masks))
        if then.nothing or otherwise.nothing:
            return replace(self._column(otherwise if then.nothing else then), mask=mask)
        dtype = np.result_type(then.kind, otherwise.kind)
        pair = [self.as_type(r, dtype) for r in (then, otherwise)]
        return Ref(self._write("select", short(dtype), holds, *pair), dtype, mask)


def value_without_columns(tree: Expr, values: Mapping[str, Any]) -> Any:
    """A tree of constants and parameters, as NumPy computes it."""
    try:
        with np.errstate(all="ignore"):
            return _Evaluation(ONE_ROW, values).value(tree)
    except (SchemaError, TypeError, ValueError):
        raise Declined from None


ONE_ROW = Batch._trusted({}, {}, 1)


def _and(writer: Lowering, arguments: list[Ref], options: tuple[Any, ...]) -> Ref:
    return writer.logic("and", arguments)


def _or(writer: Lowering, arguments: list[Ref], options: tuple[Any, ...]) -> Ref:
    return writer.logic("or", arguments)


def _where(writer: Lowering, arguments: list[Ref], options: tuple[Any, ...]) -> Ref:
    condition, then, otherwise = arguments
    if condition.nothing or condition.dtype != np.bool_:
        raise Declined
    return writer.chosen(writer._held(condition), then, otherwise)


def _coalesce(writer: Lowering, arguments: list[Ref], options: tuple[Any, ...]) -> Ref:
    found = arguments[-1]
    for ref in reversed(arguments[:-1]):
        if ref.nothing:
            continue
        if ref.mask is None:
            dtype = np.result_type(ref.kind, ref.kind if found.nothing else found.kind)
            found = Ref(writer.as_type(ref, dtype), dtype)
        else:
            found = writer.chosen(ref.mask, replace(ref, mask=None), found)
    return found


def _is_null(writer: Lowering, arguments: list[Ref], options: tuple[Any, ...]) -> Ref:
    (ref,) = arguments
    if ref.nothing:
        raise Declined
    at = writer._bool(False) if ref.mask is None else writer._write("not", "b1", ref.mask)
    return Ref(at, np.dtype(bool))


def _is_in(writer: Lowering, arguments: list[Ref], options: tuple[Any, ...]) -> Ref:
    (ref,) = arguments
    asked = [option for option in options if option is not None]
    if not asked or len(asked) > MOST_OPTIONS:
        raise Declined
    found, no_nulls = writer._bool(False), replace(ref, mask=None)
    for option in asked:
        equal = writer.elementwise("equal", [no_nulls, writer._without_columns(_constant(option))])
        found = writer._write("or", "b1", found, equal.at)
    mask = ref.mask if len(asked) == len(options) else writer.both(ref.mask, found)
    return Ref(found, np.dtype(bool), mask)


def _constant(value: Any) -> Constant:
    return Constant(value, value.dtype.str if isinstance(value, np.generic) else type(value).__name__)


def _cast(writer: Lowering, arguments: list[Ref], options: tuple[Any, ...]) -> Ref:
    (ref,) = arguments
    if ref.dtype is None or options[0] in ("text", "bytes"):
        raise Declined
    source, dtype = ref.dtype, np.dtype(options[0])
    short(dtype)
    if dtype.kind == "b" or source.kind == "b" or dtype.kind == "f" or np.can_cast(source, dtype):
        return Ref(writer.as_type(ref, dtype), dtype, ref.mask)
    return _integer(writer, ref, source, dtype)


def _integer(writer: Lowering, ref: Ref, source: np.dtype[Any], dtype: np.dtype[Any]) -> Ref:
    """Where integers of the wanted width hold it."""
    limits, name = np.iinfo(dtype), short(source)
    if source.kind == "f":
        low, high = (writer._number(float(limit), source) for limit in (limits.min, limits.max + 1))
        fits = writer._write("within", name, ref.at, low, high)
    else:
        own, holds = np.iinfo(source), list[int]()
        if limits.min > own.min:
            holds.append(writer._write("greater_equal", name, ref.at, writer._number(limits.min, source)))
        if limits.max < own.max:
            holds.append(writer._write("less_equal", name, ref.at, writer._number(limits.max, source)))
        fits = holds[0] if len(holds) == 1 else writer._write("and", "b1", *holds)
    inside = writer._write("select", name, fits, ref.at, writer._number(0, source))
    return Ref(writer.as_type(Ref(inside, source), dtype), dtype, writer.both(ref.mask, fits))


LOWER: dict[str, Callable[[Lowering, list[Ref], tuple[Any, ...]], Ref]] = {
    "and": _and,
    "or": _or,
    "where": _where,
    "coalesce": _coalesce,
    "is_null": _is_null,
    "is_in": _is_in,
    "cast": _cast,
}
