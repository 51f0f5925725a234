"""Steps of rows, conditions and new columns, as one compiled pass: for batches that are large enough.

`Fused` runs what it can of a chain of steps in one loop over the rows that writes only the rows kept: no
array per operation, no numbers of rows, no second look at a column. What it gives equals what
`iterreduce.columns.compute` gives, types and nulls included, so that whether it is used never shows.

Machine code is made once per node and kind of program, and filed on disk. Making it takes longer than NumPy
takes for one pass over millions of rows, and loading it as long as for some pieces; so either is done only
once NumPy has lost as much time on this program as it would cost. Who never gets there, never pays; who does,
pays twice.

What it declines: text, vectors, dates and most functions of floats are NumPy's, before the pass (as columns
that it reads) or after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch, Column
from iterreduce.columns.compute import NOTHING_GIVEN, compute
from iterreduce.columns.emitting import SIGNATURE, Program, compiled
from iterreduce.columns.expressions import Expr
from iterreduce.columns.instructions import Declined, Read, Ref, Scalar
from iterreduce.columns.jit import on_disk
from iterreduce.columns.lowering import Lowering, value_without_columns
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.trees import parameters_of

LEAST_ROWS = 4096
"""Below, an array per operation is as fast as the preparation of a call (20 us)."""
LEAST_PASSES = 3
"""Passes over memory that one pass must replace."""
SECONDS_PER_ROW = 1e-9
"""What a pass of NumPy's costs more than a step of the fused loop, for one row in cache."""
LOAD_SECONDS = 0.01
"""To find a loop on disk and load it."""
COMPILE_SECONDS = 0.5


@dataclass(frozen=True)
class Make:
    """A step: these columns; ``rest``: beside those that there are."""

    trees: Mapping[str, Expr]
    rest: bool = False


Step = Expr | Make  # an expression: the rows for which it is true


class _Machine:
    """The loop of a program: loaded, or made, when it has been missed for as long as that takes."""

    def __init__(self, program: Program):
        self._program = program
        self._made: Any = None
        self._ready = False
        self._missed, self._look_at = 0.0, LOAD_SECONDS

    def loop(self, rows: int, passes: int, eager: bool) -> Any:
        """The loop, or None: NumPy is cheaper."""
        if not self._ready:
            self._missed += rows * passes * SECONDS_PER_ROW
            if not eager and self._missed < self._look_at:
                return None
            self._made = self._made or compiled(self._program)
            self._ready = eager or self._missed >= COMPILE_SECONDS or on_disk(self._made, SIGNATURE)
            self._look_at = COMPILE_SECONDS
        return self._made if self._ready else None


_MACHINES: dict[Program, _Machine] = {}


def _machine(program: Program) -> _Machine:
    found = _MACHINES.get(program)
    return found if found is not None else _MACHINES.setdefault(program, _Machine(program))


@dataclass
class _Bound:
    """Steps bound to the types of columns: what is read, handed over and written; ``done``: steps."""

    done: int
    machine: _Machine
    passes: int
    reads: list[Read]
    scalars: list[Scalar]
    outputs: dict[str, Ref | str | Expr]  # written, or of the rows as it is, or NumPy's
    writes: tuple[np.dtype[Any], ...]
    places: dict[int, int]  # instruction -> number of what is written
    loads: dict[int, int]  # instruction -> number of what is read, where rows are not dropped
    drops: bool
    words: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        fixed = [s.tree is None or not parameters_of(s.tree) for s in self.scalars]
        self.words = [
            _word(s, NOTHING_GIVEN) if f else None for s, f in zip(self.scalars, fixed, strict=True)
        ]


def _word(scalar: Scalar, values: Mapping[str, Any]) -> int:
    """A scalar as 64 bits."""
    value = scalar.value
    if scalar.tree is not None:
        found = value_without_columns(scalar.tree, values)
        value = found.mask if scalar.mask else found.data
    return int.from_bytes(np.asarray(value, scalar.dtype).tobytes(), "little")


class Fused:
    """A chain of steps. ``wanted[i]``: the columns that are read behind step i, None: all.

    >>> from iterreduce.columns.expressions import col
    >>> chain = Fused([col("x") > 1, Make({"y": col("x") * 2 + 1})], eager=True)
    >>> done, rows = chain.run(Batch(x=np.arange(5.0)), {})
    >>> done, rows["y"].tolist()
    (2, [5.0, 7.0, 9.0])
    """

    def __init__(
        self, steps: Sequence[Step], wanted: Sequence[set[str] | None] | None = None, eager: bool = False
    ):
        self.steps, self.eager = list(steps), eager
        self.wanted = list(wanted) if wanted is not None else [None] * len(steps)
        self._bound: dict[Any, _Bound | None] = {}

    def run(self, rows: Batch, values: Mapping[str, Any]) -> tuple[int, Batch]:
        """How many steps were done, and the rows behind them; 0 and the rows as they came: NumPy's work."""
        if not self.eager and len(rows) < LEAST_ROWS:
            return 0, rows
        key = _types(rows, values)
        if key not in self._bound:
            self._bound[key] = self._bind(rows, values)
        bound = self._bound[key]
        loop = None if bound is None else bound.machine.loop(len(rows), bound.passes, self.eager)
        if bound is None or loop is None:
            return 0, rows
        return bound.done, _run(bound, loop, rows, values)

    def _bind(self, rows: Batch, values: Mapping[str, Any]) -> _Bound | None:
        """The longest chain of first steps that can be done in one pass, if that pays."""
        for done in range(len(self.steps), 0, -1):
            try:
                bound = self._lowered(done, rows, values)
            except Declined:
                continue
            worth = bound.passes >= (1 if self.eager else LEAST_PASSES)
            return bound if worth else None
        return None

    def _lowered(self, done: int, rows: Batch, values: Mapping[str, Any]) -> _Bound:
        writer = Lowering(rows.schema, values)
        names = dict.fromkeys(rows.names)
        for step in self.steps[:done]:
            if isinstance(step, Expr):
                writer.keep(step)
                continue
            made = writer.make(step.trees)
            if step.rest:
                writer.made.update(made)
            else:
                writer.made, names = made, {}
                writer.fields = {}
            names |= dict.fromkeys(made)
        return _bound(done, writer, rows, list(names), self.wanted[done - 1])


def _types(rows: Batch, values: Mapping[str, Any]) -> Any:
    """What a binding depends on."""
    masks = rows._valid
    columns = tuple(
        [
            (n, c.kind, c.values.dtype, n in masks)
            if isinstance(c, Ragged)
            else (n, c.dtype, c.shape[1:], n in masks)
            for n, c in rows._columns.items()
        ]
    )
    if not values:
        return columns
    return columns, tuple((n, None if v is None else np.asarray(v).dtype) for n, v in values.items())


def _bound(done: int, writer: Lowering, rows: Batch, names: list[str], wanted: set[str] | None) -> _Bound:
    drops = writer.condition is not None
    outputs: dict[str, Ref | str | Expr] = {}
    for name in names:
        if wanted is None or name in wanted or name in writer.made:
            outputs[name] = _output(writer, name, drops)
    writes: dict[int, np.dtype[Any]] = {}
    code = list(writer.code)
    for ref in outputs.values():
        if isinstance(ref, Ref):
            assert ref.dtype is not None
            for at, dtype in ((ref.at, ref.dtype), (ref.mask, np.dtype(bool))):
                if at is not None and (drops or code[at][0] != "load"):
                    writes[at] = dtype
    if drops and any(isinstance(ref, str) for ref in outputs.values()):
        writes[writer.row()] = np.dtype(np.int64)
    kinds = tuple(f"{dtype.kind}{dtype.itemsize}" for dtype in writes.values())
    program = writer.program(tuple(writes), kinds)
    loads = {at: i[2] for i, at in writer.code.items() if i[0] == "load"}
    passes = writer.passes + (2 + len(writes) if drops else 0)
    places = {at: k for k, at in enumerate(writes)}
    reads, scalars = [read for read, _ in writer.reads.values()], list(writer.scalars.values())
    machine, types = _machine(program), tuple(writes.values())
    return _Bound(done, machine, passes, reads, scalars, outputs, types, places, loads, drops)


def _output(writer: Lowering, name: str, drops: bool) -> Ref | str | Expr:
    """A column made, or read where rows are dropped; else the column as it is, or as NumPy makes it."""
    ref = writer.made.get(name)
    if ref is not None:
        whole = ref.whole if drops else writer.whole(ref)
        if drops and isinstance(whole, Expr):
            raise Declined
        return ref if whole is None else whole
    if drops:
        try:
            return writer.load(name)
        except Declined:
            pass
    return name


def _run(bound: _Bound, loop: Any, rows: Batch, values: Mapping[str, Any]) -> Batch:
    read = _read(bound, rows, values)
    written = [np.empty(len(rows), dtype) for dtype in bound.writes]
    words = [_word(s, values) if w is None else w for s, w in zip(bound.scalars, bound.words, strict=True)]
    table = np.array([*map(_address, read), *words, *map(_address, written)], np.uint64)
    count = loop(_address(table), len(rows))
    if count < len(rows):
        for column in written:
            column.resize(count, refcheck=False)  # gives the pages back that were not touched
    return _batch(bound, rows, values, read, written, count)


def _address(column: Array) -> int:
    address: int = column.__array_interface__["data"][0]
    return address


def _read(bound: _Bound, rows: Batch, values: Mapping[str, Any]) -> list[Any]:
    """The columns that are read; what NumPy computes beforehand, computed."""
    islands: dict[int, tuple[Column, Array | None]] = {}
    found: list[Any] = []
    for read in bound.reads:
        if isinstance(read.of, str):
            column: Any = rows._valid[read.of] if read.mask else rows._columns[read.of]
        else:
            if id(read.of) not in islands:
                islands[id(read.of)] = compute(read.of, rows, values)
            column = islands[id(read.of)][read.mask]
        found.append(column if column.flags.c_contiguous else np.ascontiguousarray(column))
    return found


def _batch(
    bound: _Bound,
    rows: Batch,
    values: Mapping[str, Any],
    read: list[Any],
    written: list[Array],
    count: int,
) -> Batch:
    columns, valid = dict[str, Column](), dict[str, Array]()

    def at(instruction: int) -> Any:
        place = bound.places.get(instruction)
        return written[place] if place is not None else read[bound.loads[instruction]]

    left = [ref for ref in bound.outputs.values() if isinstance(ref, str)]
    rest = rows
    if left and bound.drops and count < len(rows):
        rest = rows.select(*left).take(written[-1])
    for name, ref in bound.outputs.items():
        if isinstance(ref, str):
            columns[name], mask = rest._columns[ref], rest._valid.get(ref)
        elif isinstance(ref, Expr):
            columns[name], mask = compute(ref, rows, values)
        else:
            columns[name], mask = at(ref.at), None if ref.mask is None else at(ref.mask)
        if mask is not None:
            valid[name] = mask
    return Batch._trusted(columns, valid, count)
