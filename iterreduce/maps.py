"""Maps run block by block: what user code is handed, what of it comes back, and in which pieces.

User code sees read-only views of resident columns, so it cannot change an invariant by accident. A column
that comes back as the very object that was handed out is the resident column: it is not copied, and keeps
its lineage token if so in every piece. A map with ``cut="block"`` sees as many neighbouring canonical blocks
at a time as fit the cache, so its temporaries stay in cache and memory does not grow with the input.

Nothing here communicates.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.errors import InUserCode, SchemaError, UsageError
from iterreduce.laid import carried
from iterreduce.loop import Context, Kernel, Local
from iterreduce.table import BY_BLOCK, EVERYWHERE, NO_TOKENS, Layout, RowsOf, Table, read_only

PIECE_BYTES = 1 << 20  # input bytes of one piece: half of an L2 cache of 2 MiB, the rest is for temporaries


class Piece(NamedTuple):
    """Rows ``lo`` to ``hi`` of a share as a map returned them, with the tokens of columns passed on."""

    lo: int
    hi: int
    batch: Batch
    tokens: Mapping[str, int]


_piece = tuple.__new__  # Piece(...) itself costs twice as much
_array = np.ndarray


class Handed:
    """A batch as handed to user code, as views, and the resident columns behind them with their tokens."""

    __slots__ = ("batch", "columns", "lo", "tokens", "views")

    def __init__(self, batch: Batch, tokens: Mapping[str, int], lo: int = 0):
        self.views = views = dict[str, Any]()
        self.columns = columns = batch._columns
        for name, column in columns.items():
            if type(column) is Ragged:
                views[name] = read_only(column)
            else:  # the same, without the call
                views[name] = view = column.view()
                view.setflags(False)
        self.batch = Batch._trusted(views, batch._valid, batch._length, batch._schema)
        self.tokens, self.lo = tokens, lo

    def name_of(self, column: Any) -> str | None:
        """Which of the columns that were handed out this is, if it is one."""
        for name, view in self.views.items():
            if view is column:
                return name
        return None


def take_back(result: Batch, handed: Iterable[Handed]) -> tuple[Batch, dict[str, int]]:
    """The result with resident columns in place of their views, and the tokens of those columns."""
    tokens: dict[str, int] = {}
    columns, valid = result._columns.copy(), result._valid
    for name, column in columns.items():
        if type(column) is _array and column.base is None:
            continue  # no view of anything
        for of in handed:
            if of.views.get(name) is column:  # nearly always, a column is passed on under its name
                columns[name], token = of.columns[name], of.tokens.get(name)
                break
        else:
            columns[name], token = renamed(column, handed)
        if token and name not in valid:
            tokens[name] = token
    return Batch._trusted(columns, valid, result._length, result._schema), tokens


def renamed(column: Any, handed: Iterable[Handed]) -> tuple[Any, int | None]:
    """The resident column behind one that was handed out under any name, and its token; or the column."""
    for of in handed:
        name = of.name_of(column)
        if name is not None:
            return of.columns[name], of.tokens.get(name)
    return column, None


_thread = threading.local()  # of this rank: ranks may be threads


def refuse_in_user_code(what: str, ranks: int) -> None:
    """Raise `UsageError` where user code of a run asks for something collective."""
    if ranks > 1 and getattr(_thread, "in_user_code", False):
        raise UsageError(
            f"{what} on {ranks} ranks was asked for inside a function that a run is calling; "
            "the other ranks may not be there: run it before, and give its result to the loop as a source"
        )


def in_user_code(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; what it raises is marked as the user's."""
    _thread.in_user_code = True
    try:
        return function(*args)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: other ranks wait for this one
        raise InUserCode(error) from error
    finally:
        _thread.in_user_code = False


def call(
    function: Callable[..., Batch] | Kernel, context: tuple[int, int, int], batches: Sequence[Batch]
) -> Batch:
    """Run user code on batches; what it returns must be a `Batch`. ``context``: the fields of a `Context`."""
    kernel = getattr(function, "run", None)  # isinstance of a protocol costs 15 us
    if kernel is not None:
        result = kernel(Context(*context), *batches)
    else:
        _thread.in_user_code = True
        try:
            result = function(*batches)  # type: ignore[operator]
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: other ranks wait for this one
            raise InUserCode(error) from error
        finally:
            _thread.in_user_code = False
    if type(result) is not Batch and not isinstance(result, Batch):
        raise SchemaError(
            f"{describe(function)} returned {type(result).__name__}: wanted an ir.Batch, such as "
            "ir.Batch(key=..., value=...)"
        )
    return result


def describe(function: Any) -> str:
    """The name of a function and where it is written."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{name} ({os.path.basename(code.co_filename)}, line {code.co_firstlineno})" if code else name


def refuse_share(stage: Local, tables: Mapping[str, Table]) -> None:
    """Raise `UsageError` where a whole share that lies by block is read: it is cut by ranks."""
    for name in stage.reads:
        if tables[name].layout.kind == "block":
            raise UsageError(
                f'{describe(stage.function)} with cut="share" reads "{name}", of which each rank has another '
                "part: a reproducible run cannot know that the result is the same on any number of ranks; "
                'use cut="block", or say Local(..., rank_free=True)'
            )


class PieceCutter:
    """Cuts a table into pieces of whole blocks, and remembers the cut while the table stays the same."""

    def __init__(self, piece_bytes: int = PIECE_BYTES):
        self.piece_bytes = piece_bytes
        self._of: Batch | None = None
        self._tokens: Mapping[str, int] = NO_TOKENS
        self._pieces: list[Handed] = []

    def pieces(self, table: Table) -> list[Handed]:
        """The table's pieces, at least one row each; none for a share without rows."""
        if self._of is not table.batch or self._tokens != table.tokens:
            self._pieces = [Handed(part, table.tokens, lo) for lo, part in self._cut(table)]
            self._of, self._tokens = table.batch, table.tokens
        return self._pieces

    def _cut(self, table: Table) -> Iterator[tuple[int, Batch]]:
        rows, nbytes = len(table.batch), table.batch.nbytes
        if rows == 0:
            return
        if nbytes <= self.piece_bytes or table.block_starts is None:
            yield 0, table.batch
            return
        for lo, hi in zip(
            *piece_bounds(table.block_starts, max(1, self.piece_bytes * rows // nbytes)), strict=True
        ):
            yield lo, table.batch.slice(lo, hi)


def piece_bounds(block_starts: Array, rows_wanted: int) -> tuple[list[int], list[int]]:
    """Ends of pieces of whole neighbouring blocks, each of at most ``rows_wanted`` rows or one block.

    >>> piece_bounds(np.array([0, 4, 8, 12, 13]), 8)
    ([0, 8], [8, 13])
    """
    ends = [0]
    starts = block_starts
    while ends[-1] < starts[-1]:
        lo = ends[-1]
        at = int(np.searchsorted(starts, lo + rows_wanted, side="right")) - 1
        if starts[at] <= lo:  # one block is larger than a piece
            at = int(np.searchsorted(starts, lo, side="right"))
        ends.append(int(starts[at]))
    return ends[:-1], ends[1:]


class BlockMap:
    """One `Local` stage at work: in pieces, or on the whole share."""

    def __init__(self, stage: Local, piece_bytes: int = PIECE_BYTES, reproducible: bool = False):
        """``reproducible``: one canonical block at a time, whatever its size, unless the map says that it
        does not matter.
        """
        self.stage, self.reproducible = stage, reproducible
        self.cutter = PieceCutter(0 if reproducible and not stage.rank_free else piece_bytes)
        self._whole: dict[str, tuple[Table, Handed]] = {}
        self._beside: dict[str, tuple[Batch, list[Handed], list[Handed]]] = {}
        self._seen: tuple[list[Table], list[Handed], list[list[Batch]]] | None = None

    def pieces(self, tables: Mapping[str, Table], iteration: int) -> Iterable[Piece]:
        """The map's results, piece by piece, in canonical order."""
        first = tables[self.stage.reads[0]]
        pieces = self.cutter.pieces(first)
        beside = self._all_beside(tables, first, pieces)
        if len(pieces) == 1:  # a small share: what a generator costs is seen
            return (self._piece(first, iteration, pieces[0], beside[0]),)
        return map(partial(self._piece, first, iteration), pieces, beside)

    def single(self, tables: Mapping[str, Table], iteration: int) -> tuple[Handed, Batch] | None:
        """The rows of a block map as they were handed to user code, all at once, and what it made of them,
        before `take_back`; None where they are more than one piece, or none, or on every rank: nothing was
        called.
        """
        read, known = list(map(tables.__getitem__, self.stage.reads)), self._seen
        if known is None or not all(map(is_, known[0], read)):
            if read[0].everywhere:
                return None
            self._all_beside(tables, read[0], self.cutter.pieces(read[0]))
            known = self._seen
        assert known is not None
        if len(known[1]) != 1:
            return None
        handed, first = known[1][0], read[0]
        context = iteration, first.first_row, first.rows_total
        return handed, call(self.stage.function, context, (handed.batch, *known[2][0]))

    def _piece(self, first: Table, iteration: int, handed: Handed, others: list[Batch]) -> Piece:
        lo, batch = handed.lo, handed.batch
        context = iteration, first.first_row + lo, first.rows_total
        result = call(self.stage.function, context, (batch, *others))
        made, tokens = take_back(result, (handed,))
        return _piece(Piece, (lo, lo + batch._length, made, tokens))

    def _all_beside(
        self, tables: Mapping[str, Table], first: Table, pieces: list[Handed]
    ) -> list[list[Batch]]:
        """What each piece is handed beside its rows, made anew where any table is another than before."""
        read = list(map(tables.__getitem__, self.stage.reads))
        known = self._seen
        if known is not None and known[1] is pieces and all(map(is_, known[0], read)):
            return known[2]
        others = [
            self._other(n, t, first, pieces) for n, t in zip(self.stage.reads[1:], read[1:], strict=True)
        ]
        beside = [[o[i % len(o)].batch for o in others] for i in range(len(pieces))]
        self._seen = read, pieces, beside
        return beside

    def _other(self, name: str, table: Table, first: Table, pieces: list[Handed]) -> list[Handed]:
        """What each piece is handed beside its rows: a whole table, or the rows at the same place of one laid
        out alike.
        """
        if table.everywhere or table.layout.kind != first.layout.kind:
            return [self._hand(name, table)]
        if first.rows_of is not None and first.rows_of.lies_in(table.batch):
            rows = first.rows_of.rows
            return [
                Handed(table.batch.take(rows[p.lo : p.lo + len(p.batch)]), NO_TOKENS, p.lo) for p in pieces
            ] or [self._hand(name, table)]
        if len(table) != len(first):
            raise SchemaError(
                f'{describe(self.stage.function)} reads "{self.stage.reads[0]}" and "{name}" side by side, '
                f"but they have {len(first)} and {len(table)} rows here; tables by {first.layout.kind} "
                "must have the same rows"
            )
        known = self._beside.get(name)
        if known is None or known[0] is not table.batch or known[1] is not pieces:
            self._check_keys(name, table, first)
            cut = [Handed(table.batch.slice(p.lo, p.lo + len(p.batch)), table.tokens, p.lo) for p in pieces]
            known = (table.batch, pieces, cut or [self._hand(name, table)])
            self._beside[name] = known
        return known[2]

    def _check_keys(self, name: str, table: Table, first: Table) -> None:
        for key in first.layout.keys:
            ours, theirs = first.batch.select(key), table.batch.select(key)
            if ours[key] is not theirs[key] and not ours.equals(theirs):
                raise SchemaError(
                    f'{describe(self.stage.function)} reads "{self.stage.reads[0]}" and "{name}" side by '
                    "side, "
                    f'but their rows are not of the same "{key}"; shuffle one onto the other'
                )

    def share(self, tables: Mapping[str, Table], iteration: int) -> Table:
        """The map's result on the whole share."""
        stage, whole = self.stage, self._whole
        if self.reproducible and not stage.rank_free and stage.cut == "share":
            refuse_share(stage, tables)
        first, handed, batches = tables[stage.reads[0]], list[Handed](), list[Batch]()
        for name in stage.reads:
            table, known = tables[name], whole.get(name)
            if first.rows_of is not None:
                given = self._hand_beside(name, table, first)
            elif known is not None and known[0] is table:
                given = known[1]
            else:
                given = Handed(table.batch, table.tokens)
                whole[name] = table, given
            handed.append(given)
            batches.append(given.batch)
        result = call(stage.function, (iteration, first.first_row, first.rows_total), batches)
        return self._placed(*take_back(result, handed), tables)

    def _hand_beside(self, name: str, table: Table, first: Table) -> Handed:
        """The table, or those of its rows that the first table read is made of."""
        if first.rows_of is not None and table is not first and first.rows_of.lies_in(table.batch):
            return Handed(table.batch.take(first.rows_of.rows), NO_TOKENS)
        known = self._whole.get(name)  # as in `_hand`, without the call
        if known is None or known[0] is not table:
            self._whole[name] = known = table, Handed(table.batch, table.tokens)
        return known[1]

    def _placed(self, batch: Batch, tokens: Mapping[str, int], tables: Mapping[str, Table]) -> Table:
        """Where the rows of a share's result live: as the first table read that is not everywhere."""
        rows, stage = batch._length, self.stage
        for name in stage.reads:
            like = tables[name]
            layout = like.layout
            if layout.kind != "everywhere":
                if layout.keys:
                    layout = layout_after(stage.function, layout, batch)
                if rows == like.batch._length:
                    of = None if like.rows_of is None else passed_on(like, batch)
                    return Table(batch, layout, tokens, like.block_starts, 0, -1, 0, of)
                return Table(batch, layout, tokens, np.array([0, rows]))
        return Table(batch, EVERYWHERE, tokens, np.array([0, rows]), 0, rows)

    def whole(self, tables: Mapping[str, Table], iteration: int) -> Table | None:
        """All pieces joined; None on a rank without rows (which cannot know the schema)."""
        if self.stage.cut == "share":
            return self.share(tables, iteration)
        first = tables[self.stage.reads[0]]
        return joined(first, list(self.pieces(tables, iteration)), self.stage.function)

    def on_nothing(self, tables: Mapping[str, Table], iteration: int) -> Batch:
        """What the map makes of no rows: its schema, for when no rank has any."""
        handed = [self._hand(name, tables[name]) for name in self.stage.reads]
        like = tables[self.stage.reads[0]].layout.kind
        beside = [tables[n].layout.kind == like != "everywhere" for n in self.stage.reads]
        batches = [h.batch.slice(0, 0) if i == 0 or beside[i] else h.batch for i, h in enumerate(handed)]
        return call(self.stage.function, (iteration, 0, 0), batches)

    def _hand(self, name: str, table: Table) -> Handed:
        known = self._whole.get(name)
        if known is None or known[0] is not table:
            known = (table, Handed(table.batch, table.tokens))
            self._whole[name] = known
        return known[1]


def layout_after(function: Any, layout: Layout, batch: Batch) -> Layout:
    """How rows lie after a map: by the key of the table that they came from, if they have it still."""
    if hasattr(function, "keeps"):
        keys = carried(function, layout.keys)
        return BY_BLOCK if keys is None else Layout(layout.kind, keys)
    for key in layout.keys:
        if key not in batch._columns:
            return BY_BLOCK
    return layout


def joined(first: Table, pieces: list[Piece], function: Any = None) -> Table | None:
    """The pieces as one table laid out like the table they were cut from; pieces without rows have no say."""
    if not pieces:
        return None
    whole = all(len(p.batch) == p.hi - p.lo for p in pieces)
    ends = np.cumsum([0] + [len(p.batch) for p in pieces])
    pieces = [p for p in pieces if len(p.batch)] or pieces[:1]
    tokens = common_tokens(pieces) if whole else {}
    batch = _join(first, pieces, tokens)
    layout = layout_after(function, first.layout, batch)
    if whole:
        return Table(batch, layout, tokens, first.block_starts, rows_of=passed_on(first, batch))
    return Table(batch, layout, NO_TOKENS, ends)


def passed_on(first: Table, batch: Batch) -> RowsOf | None:
    """Which rows of another table these still are: those of ``first``, if its keys were passed on."""
    if first.rows_of is None or len(batch) != len(first):
        return None
    same = all(batch._columns.get(k) is first.batch[k] for k in first.layout.keys)
    return first.rows_of if same else None


def common_tokens(pieces: Sequence[Piece]) -> dict[str, int]:
    """The columns that every piece passed on, with their tokens."""
    tokens = dict(pieces[0].tokens)
    for piece in pieces[1:]:
        tokens = {n: t for n, t in tokens.items() if piece.tokens.get(n) == t}
    return tokens


def _join(first: Table, pieces: list[Piece], tokens: Mapping[str, int]) -> Batch:
    """Joined columns; one that was passed on is the resident column itself, not a copy of it."""
    resident = {token: name for name, token in first.tokens.items()}
    kept = {n: first.batch[resident[t]] for n, t in tokens.items() if t in resident}
    if len(pieces) == 1:
        return pieces[0].batch
    rest = [n for n in pieces[0].batch.names if n not in kept]
    made = Batch.concat([p.batch.select(*rest) for p in pieces]) if rest else Batch()
    order = pieces[0].batch.names
    columns = {n: kept[n] if n in kept else made[n] for n in order}
    return Batch.from_dict(columns, {n: made.valid(n) for n in rest})
