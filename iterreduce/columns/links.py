"""Edges of a graph on one rank, by source slot: what every target hears in an iteration.

    out[t] = combine over the edges (s -> t) of edge(x[s], ..., w, ...)

`Links.dense` goes over all edges, `Links.sparse` over those of some sources. Sources and targets are plain
numbers; who they are, and on which rank, is the engine's business, as is every exchange.

What it is not: a graph of vertices. A source slot and a target of one number need not be the same vertex.
Speed comes from the caller's numbering: sources by descending out-degree and targets by descending in-degree
put hubs side by side, which is worth a factor of 2 to 3 on graphs that have hubs and nothing elsewhere.

How it can go wrong: slots that do not fit (`UsageError`, also for a source with more edges than was said);
sums of int64 that wrap around beyond 64 bits, as NumPy's do; a custom edge function that returns floats where
``out`` is int64, which cuts them off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.link_kernels import (
    COMBINES,
    EDGE_FUNCTIONS,
    MOST_COLUMNS,
    ON_GRID,
    EdgeFunction,
    along,
    along_some,
    over_blocks,
    over_pieces,
)
from iterreduce.columns.link_layout import Blocks, Pieces, Rows, in_degrees, lay_out
from iterreduce.columns.link_rows import RowsBuilder
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError

LAST_STAMP = 2**16 - 1
INT64 = np.dtype(np.int64)
SPARSE_GRAIN = 1 << 16
"""Edges of a frontier per thread that pay for all threads' reading all of them."""
Range = tuple[int, int]
States = Array | Sequence[Array]
Lines = tuple[float, float]
Operation = tuple[EdgeFunction, str, int, int]
"""The edge function, how its values are folded, and of how many values and columns it is."""


class Pool(Protocol):
    """Threads that call a function over ranges; see `iterreduce.columns.threads`."""

    threads: int

    def run(self, function: Callable[[int, int], Any], ranges: Sequence[Range]) -> list[Any]: ...


@kernel
def _collect(stamps: Any, stamp: Any, lo: Any, hi: Any, touched: Any) -> None:
    """Targets in ``[lo, hi)`` with this stamp, ascending."""
    found = 0
    for t in range(lo, hi):
        if stamps[t] == stamp:
            touched[lo + found] = t
            found += 1


class LinksBuilder(RowsBuilder):
    """Takes edges chunk by chunk, where it is known how many leave each source; see `RowsBuilder`.

    >>> builder = LinksBuilder(2, 3, np.array([2, 1]), {"w": np.dtype(np.float64)})
    >>> builder.add(np.array([1, 0]), np.array([2, 2]), {"w": np.array([0.5, 1.0])})
    >>> builder.add(np.array([0]), np.array([1]), {"w": np.array([4.0])})
    >>> builder.finish().n_edges
    3
    """

    def finish(self) -> Links:
        """The links; the builder is used up."""
        return Links(self.rows())


class Links:
    """A rank's edges by source, and what is heard along them.

    >>> links = Links.build(np.array([0, 0, 1]), np.array([1, 2, 2]), 2, 3, {"w": np.array([1.0, 2.0, 3.0])})
    >>> x, out = np.array([10.0, 20.0]), np.empty(3)
    >>> links.dense("sum", x, out).tolist()
    [0.0, 10.0, 30.0]
    >>> links.dense("min", x, out, edge="x+w", columns=("w",)).tolist()
    [inf, 11.0, 12.0]
    >>> links.sparse("max", np.array([1]), x, out).tolist(), float(out[2])
    ([2], 20.0)
    """

    def __init__(self, rows: Rows) -> None:
        self._rows: Rows | None = rows
        self._layout: Pieces | Blocks | None = None
        self._counts: Array | None = None
        self._parts: dict[tuple[int, int], list[Range]] = {}
        self._stamps, self._touched = np.empty(0, np.uint16), np.empty(0, np.int32)
        self._stamp = 0
        self.n_sources, self.n_targets = len(rows.offsets) - 1, rows.n_targets
        self.n_edges = len(rows.targets)
        self.columns = {name: column.dtype for name, column in rows.columns.items()}

    @classmethod
    def build(
        cls,
        sources: Array,
        targets: Array,
        n_sources: int,
        n_targets: int,
        columns: Mapping[str, Array] | None = None,
    ) -> Self:
        """Links of edges that are all at hand; see `LinksBuilder` for chunks."""
        columns = columns or {}
        _check_slots("sources", sources, n_sources)
        degrees = np.bincount(sources, minlength=n_sources)
        builder = LinksBuilder(n_sources, n_targets, degrees, {name: c.dtype for name, c in columns.items()})
        builder.add(sources, targets, columns)
        return cls(builder.rows())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [a.nbytes for a in (self._rows, self._layout, self._counts) if a is not None]
        return sum(held) + self._stamps.nbytes + self._touched.nbytes

    @property
    def counts(self) -> Array:
        """Edges to each target: int64 of shape ``(n_targets,)``, read-only."""
        if self._counts is None:
            self._counts = np.zeros(self.n_targets, np.int64)
            in_degrees(self._by_source().targets, self._counts)
            self._counts.flags.writeable = False
        return self._counts

    @property
    def offsets(self) -> Array:
        """Where the edges of each source begin: int64 of shape ``(n_sources + 1,)``."""
        return self._by_source().offsets

    def _by_source(self) -> Rows:
        if self._rows is None:
            raise UsageError("these links keep no edges by source (drop_rows was called)")
        return self._rows

    def prepare(self) -> Self:
        """Lay the edges out for `dense` now rather than at its first call."""
        if self._layout is None:
            self._layout = lay_out(self._by_source(), self.counts)
        return self

    def drop_rows(self) -> None:
        """Keep what `dense` needs only: about half of the memory; `sparse` is no longer possible."""
        self.prepare()
        self._rows = None

    def edges_of(self, frontier: Array) -> int:
        """How many edges leave these sources: what `sparse` costs."""
        return self._by_source().edges_of(frontier)

    def parts(self, n: int) -> list[Range]:
        """At most n ranges of targets with about equal numbers of edges, for `dense` on n threads."""
        return self._cut(n, self.prepare()._layout.grain)  # type: ignore[union-attr]

    def _cut(self, n: int, grain: int) -> list[Range]:
        """Ranges that begin at multiples of ``grain``."""
        if (n, grain) not in self._parts:
            work = np.cumsum(self.counts + 1)
            whole = int(work[-1]) if len(work) else 0
            cuts = np.searchsorted(work, [whole * p // n for p in range(n)]) // grain * grain
            starts = np.unique(cuts).tolist()
            ends = [*starts[1:], self.n_targets]
            self._parts[n, grain] = [(lo, hi) for lo, hi in zip(starts, ends, strict=True) if lo < hi]
        return self._parts[n, grain]

    def dense(
        self,
        combine: str,
        states: States,
        out: Array,
        edge: str | EdgeFunction | None = None,
        columns: Sequence[str] = (),
        *,
        grid: Lines | None = None,
        pool: Pool | None = None,
        part: Range | None = None,
    ) -> Array:
        """Fill ``out`` with what every target hears along all edges, and return it.

        ``combine`` is sum, min, max or count; ``states`` one to three arrays by source slot, of float64,
        float32, int64, int32 or bool, shape ``(n_sources,)`` or longer; ``out`` float64 or int64 of shape
        ``(n_targets,)``. ``edge`` is a name (``x``, ``x*w``, ``x+w``, ``x-w``, ``min(x,w)``, ``max(x,w)``) or
        a compiled scalar function of the states' values and those of the edge ``columns``, in this order.
        Targets without an edge get 0, or the largest (min) or smallest (max) number of the dtype.

        With a ``grid``, two numbers as in `iterreduce.columns.grids`, floats are summed as pairs of integers:
        ``out`` is int64 of shape ``(n_targets, 2)``.

        With a pool its threads share the work; ``part``, one of `parts`, fills only these targets. The bits
        are the same either way.
        """
        self._check_out(out, grid)
        if part is None and pool is not None and pool.threads > 1:
            self.prepare()
            given = combine, states, out, edge, columns
            pool.run(lambda lo, hi: self.dense(*given, grid=grid, part=(lo, hi)), self.parts(pool.threads))
            return out
        lo, hi = part or (0, self.n_targets)
        if combine == "count":
            out[lo:hi] = self.counts[lo:hi]
            return out
        xs, operation = self._checked(combine, states, out, edge, columns, self.n_sources, grid)
        layout = self.prepare()._layout
        assert layout is not None
        if (lo % layout.grain or hi % layout.grain) and hi != self.n_targets:
            raise UsageError(f"part ({lo}, {hi}): wanted multiples of {layout.grain}: take it from parts()")
        self._walk(layout, operation, xs, columns, (out, grid), lo, hi)
        return out

    def _walk(
        self,
        layout: Pieces | Blocks,
        operation: Operation,
        xs: tuple[Array, ...],
        columns: Sequence[str],
        into: tuple[Array, Lines | None],
        lo: int,
        hi: int,
    ) -> None:
        ws, target = tuple(layout.columns[name] for name in columns), _target(operation[1], *into)
        if isinstance(layout, Pieces):
            where = layout.runs, layout.rows, layout.longs, layout.index
            over_pieces(*operation)(xs, ws, *where, *target, lo, hi)
        else:
            place = layout.bounds, layout.bits, layout.index, layout.target
            over_blocks(*operation)(xs, ws, *place, *target, lo, hi)

    def sparse(
        self,
        combine: str,
        frontier: Array,
        states: States,
        out: Array,
        edge: str | EdgeFunction | None = None,
        columns: Sequence[str] = (),
        *,
        aligned: bool = False,
        grid: Lines | None = None,
        pool: Pool | None = None,
    ) -> Array:
        """Push along the edges of the sources in ``frontier`` only; the targets that heard something.

        ``frontier`` is an integer array of source slots, each at most once where ``combine`` is sum. States
        are by slot, or, if ``aligned``, by row of the frontier. Only the entries of ``out`` at the returned
        targets (int32, ascending, valid until the next call) are written. The cost is that of the frontier's
        edges. Otherwise as `dense`.
        """
        self._check_out(out, grid)
        rows = self._by_source()
        if combine == "count":
            combine, states, edge, columns = "sum", np.ones(self.n_sources, np.int8), None, ()
            aligned = False
        n = len(frontier) if aligned else self.n_sources
        xs, operation = self._checked(combine, states, out, edge, columns, n, grid)
        _check_slots("frontier", frontier, self.n_sources)
        frontier = _frozen(frontier)
        stamp, touched = self._next_stamp(), self._touched
        ws, target = tuple(rows.columns[name] for name in columns), _target(operation[1], out, grid)
        given = frontier, xs, ws, rows.offsets, rows.targets, *target, self._stamps, stamp, touched

        def push_some(lo: int, hi: int) -> Range:
            found = along_some(*operation, aligned)(*given, lo, hi)
            self._put_in_order(stamp, lo, hi, found)
            return lo, found

        threads = 1
        if pool is not None and pool.threads > 1:
            threads = min(pool.threads, self.edges_of(frontier) // SPARSE_GRAIN)
        if pool is not None and threads > 1:
            return _close_up(touched, pool.run(push_some, self._cut(threads, 1)))
        found = along(*operation, aligned)(*given)
        self._put_in_order(stamp, 0, self.n_targets, found)
        return touched[:found]

    def _next_stamp(self) -> Any:
        if len(self._touched) < self.n_targets:
            self._stamps, self._touched = (
                np.zeros(self.n_targets, np.uint16),
                np.empty(self.n_targets, np.int32),
            )
        if self._stamp == LAST_STAMP:
            self._stamps.fill(0)
            self._stamp = 0
        self._stamp += 1
        return np.uint16(self._stamp)

    def _put_in_order(self, stamp: Any, lo: int, hi: int, found: int) -> None:
        """Ascending targets, by a sort or, where most were touched, by a look at all."""
        if found * 8 > hi - lo:
            _collect(self._stamps, stamp, lo, hi, self._touched)
        else:
            self._touched[lo : lo + found].sort()

    def _check_out(self, out: Array, grid: Lines | None) -> None:
        shape = (self.n_targets,) if grid is None else (self.n_targets, 2)
        if out.dtype not in ((np.float64, INT64) if grid is None else (INT64,)) or out.shape != shape:
            wanted = "int64" if grid is not None else "float64 or int64"
            raise UsageError(f"out: wanted {wanted} of shape {shape}, got {out.dtype} {out.shape}")

    def _checked(
        self,
        combine: str,
        states: States,
        out: Array,
        edge: str | EdgeFunction | None,
        columns: Sequence[str],
        rows: int,
        grid: Lines | None,
    ) -> tuple[tuple[Array, ...], Operation]:
        """States as a tuple of read-only arrays (one compiled loop serves both kinds), and what to do."""
        xs = (states,) if isinstance(states, np.ndarray) else tuple(states)
        if combine not in COMBINES or (grid is not None and combine != "sum"):
            raise UsageError(f"combine {combine!r}: wanted one of {', '.join((*COMBINES, 'count'))}")
        if not len(xs) <= MOST_COLUMNS >= len(columns) or any(len(x) < rows or x.ndim != 1 for x in xs):
            raise UsageError(
                f"states of shapes {[x.shape for x in xs]} and {len(columns)} edge columns: wanted at most "
                f"{MOST_COLUMNS} of each, states of shape ({rows},) or longer"
            )
        if missing := [name for name in columns if name not in self.columns]:
            raise UsageError(f"edge columns {missing}: there are {list(self.columns)}")
        dtypes = [x.dtype for x in xs] + [self.columns[name] for name in columns]
        made = out.dtype if grid is None else np.dtype(np.float64)
        function = _named(edge, dtypes, made) if edge is None or isinstance(edge, str) else edge
        how = combine if grid is None else ON_GRID
        return tuple(_frozen(x) for x in xs), (function, how, len(xs), len(columns))


def _named(edge: str | None, dtypes: list[np.dtype[Any]], out: np.dtype[Any]) -> EdgeFunction:
    name = edge or "x"
    if name not in EDGE_FUNCTIONS or len(dtypes) != (1 if name == "x" else 2):
        raise UsageError(
            f"edge function {name!r} of {len(dtypes)} columns: wanted one of {', '.join(EDGE_FUNCTIONS)}, "
            "with one state and, but for x, one edge column"
        )
    if out == np.int64 and not _is_int64(dtypes):
        raise UsageError(f"values of {', '.join(map(str, dtypes))} into int64: give a float64 array for out")
    return EDGE_FUNCTIONS[name]


def _is_int64(dtypes: list[np.dtype[Any]]) -> bool:
    """True where arithmetic on these dtypes stays within int64, as Numba has it."""
    kinds = {dtype.kind for dtype in dtypes}
    narrow = all(dtype.kind != "u" or dtype.itemsize < 8 for dtype in dtypes)
    return kinds <= set("iub") and narrow and ("u" not in kinds or "i" in kinds or len(dtypes) == 1)


def _check_slots(name: str, slots: Array, n_sources: int) -> None:
    if len(slots):
        low, high = int(slots.min()), int(slots.max())
        if low < 0 or high >= n_sources:
            raise UsageError(f"{name} from {low} to {high}: wanted source slots below {n_sources}")


def _frozen(x: Array) -> Array:
    x = np.ascontiguousarray(x).view()
    x.flags.writeable = False
    return x


def _close_up(touched: Array, found: list[Range]) -> Array:
    """Parts that begin at ``lo`` and hold so many entries, moved together."""
    n = 0
    for lo, count in found:
        if n < lo:
            touched[n : n + count] = touched[lo : lo + count]
        n += count
    return touched[:n]


def _target(combine: str, out: Array, grid: Lines | None) -> tuple[Array, Any, Any]:
    """What a loop writes to, what it begins with, and the grid."""
    if grid is None:
        return out, identity(combine, out.dtype), ()
    zero = INT64.type(0)
    return out.reshape(-1), (zero, zero), grid


def identity(combine: str, dtype: np.dtype[Any]) -> Any:
    """What a target without an edge gets: 0, or the last number of the dtype for min and max."""
    if combine in ("sum", "count"):
        return dtype.type(0)
    if dtype.kind == "f":
        return dtype.type(np.inf if combine == "min" else -np.inf)
    limits = np.iinfo(dtype)
    return dtype.type(limits.max if combine == "min" else limits.min)
