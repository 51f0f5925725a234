"""What a superstep is made of, as frozen data: stages that make rows, and writes that change tables.

What it is not: code. Nothing here runs, communicates or knows ranks; `iterreduce.loop` puts these nouns
together, and the engine runs them. A name refers to a source, a prepare output, a state, or the result of an
earlier stage of the same superstep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from iterreduce.columns.aggregators import Aggregator
from iterreduce.columns.batch import Batch
from iterreduce.errors import UsageError

Reduce = Aggregator | Mapping[str, Aggregator]


class Context(NamedTuple):
    """What a kernel may know beside its rows: never the rank.

    ``first_row`` is the global number of the first row of the first table read, and ``rows_total`` the rows
    of all ranks; known for sources, results of loops, sorted rows and behind a `Number`, else 0 and -1 (a
    map may have dropped rows elsewhere).
    """

    iteration: int
    first_row: int
    rows_total: int


@runtime_checkable
class Kernel(Protocol):
    """A local function that is data: the engine may run it in another order or fuse it.

    It may have an attribute ``keeps``: columns of the first table read whose values every row of the result
    has taken over from a row of that table (rows may be dropped or doubled, columns added), as names, or as
    pairs (name in the result, name in the table). Rows that lay by a key of such columns still lie by it, so
    a `Lookup` of them asks nobody; those that lay by another key lie anyhow. A kernel that aggregates has a
    method ``order_free(free)``, which returns it with the aggregators that ``free`` makes of its own.
    """

    def run(self, context: Context, *batches: Batch) -> Batch:
        """One batch from the batches read."""


# ---------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Local:
    """``into = function(*reads)`` without communication.

    ``cut="block"``: the first name in ``reads`` is handed over some blocks of rows at a time, the others
    whole; the results are joined. ``cut="share"``: this rank's whole share at once. ``pure``: the result
    depends on nothing but the rows read, so it is computed once where all of them are invariant.
    ``rank_free``: the result does not depend on which rows the rank has, or which are handed over together; a
    reproducible run asks for that of a share that lies by block, and hands other maps one block at a time.

    Tables that lie alike are handed over side by side, row for row; a table with some rows of another
    (a `Shuffle` that names the rows ``touched``) is handed over beside just those rows of it.
    """

    function: Callable[..., Batch] | Kernel
    reads: tuple[str, ...]
    into: str
    cut: Literal["block", "share"] = "block"
    pure: bool = False
    rank_free: bool = False


@dataclass(frozen=True)
class Joined:
    """Beside each row of a shuffle stand the columns of the row of ``table`` whose key equals column ``on``.

    Names of columns that both have mean the shuffled row's. Rows whose key ``table`` does not have are left
    out. ``table`` is keyed by one column; it may hold some rows only (a frontier).
    """

    table: str
    on: str


@dataclass(frozen=True)
class Splitters:
    """A route: ranges of the key's values instead of its hash, cut by a sample of the rows.

    ``sample``: how many rows per rank are looked at. Rows end up sorted by key over the ranks: those of rank
    0 are smaller than those of rank 1, and so on. ``descending``: for each column of the key, whether its
    larger values come first (none given: no column's do). Nulls come last either way, NaN before them, and
    rows of equal keys keep their order.
    """

    sample: int = 1024
    descending: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Shuffle:
    """Rows to the owner of their key. With ``combine``: one finished row per key that had a row.

    ``combine`` maps output columns to aggregators (or is one aggregator for all value columns); rows are
    combined before sending and again at the owner. Without it ``into`` holds all rows, sorted by key (in
    hash order), rows of one key in canonical order (source block, position); or, with ``sorted=False``, rows
    of all keys in that order, which is half the work and enough for a `Lookup`.
    ``onto`` names a table by key: ``into`` then has exactly its rows, in its order, and a key that the table
    does not have is an error, or its rows are dropped (``missing``). ``touched``: only those of its rows
    whose key had a row, in an order of the engine's choice.
    ``joined``: aggregators of expressions (``ir.sum(ir.col("rank") / ir.col("degree"))``) may read the
    columns of the joined table too. ``route``: by hash, or by ranges (`Splitters`).
    ``improves`` goes with ``touched`` rows of an `Index`, and one minimum or maximum that has the name of a
    column of ``onto``: ``into`` has only the rows of ``onto`` whose value becomes better, with that value.
    Patch ``onto`` with ``into`` and nothing else, and what is known to be as good is not told again.
    ``settle`` goes with ``touched`` rows of an `Index` whose keys are of one table, and one minimum or
    maximum that has the name of a column of ``onto`` (int64 or float64) and reads that column alone of the
    joined table. Rows of ``onto`` whose value becomes better then tell theirs at once, within the rank, until
    no value of the rank improves; ``into`` has the rows that became better, and those that have still
    something to tell, because values came from other ranks: where the column named ``settle`` is False.
    Patch ``onto`` with ``into``, and join with those rows next. The fixpoint is that of a shuffle that does
    not settle, in fewer supersteps, if a better value never leads to a worse one (x + w, the smaller of x and
    w); how far a value has come after some supersteps depends on the ranks.
    """

    rows: str
    key: tuple[str, ...]
    into: str
    combine: Reduce | None = None
    onto: str | None = None
    missing: Literal["error", "drop"] = "error"
    touched: bool = False
    joined: Joined | None = None
    route: Splitters | None = None
    sorted: bool = True
    settle: str = ""
    improves: bool = False


@dataclass(frozen=True)
class Total:
    """Aggregates over all ranks' rows, the same on all ranks: one row per key that had a row, sorted by key.

    ``key`` empty: one row in all (no row at all if there was none).
    """

    rows: str
    key: tuple[str, ...]
    aggregators: Reduce
    into: str


@dataclass(frozen=True)
class Gather:
    """All rows on all ranks, in canonical order."""

    rows: str
    into: str


@dataclass(frozen=True)
class Number:
    """The same rows where they are, whose numbers among those of all ranks are known: to a `Local` that reads
    them, as ``first_row`` and ``rows_total`` of its `Context`.
    """

    rows: str
    into: str


@dataclass(frozen=True)
class Lookup:
    """``columns`` of a keyed table beside rows that name its keys: the rows stay where they are.

    Each distinct key that a rank needs is asked for once; where the rows' keys do not change, the questions
    are not repeated and only values travel. Rows that lie with their table (both by that key) ask nobody; of
    those the table may hold several rows per key: then a row comes out once for each of them.
    ``missing``: a key that the table does not have is an error, its rows are dropped, get nulls, or are the
    ``only`` ones that come out. A null equals no key, unless ``nulls``: then it equals itself, which only
    rows that lie with their table can ask.
    """

    rows: str
    key: tuple[str, ...]
    table: str
    columns: tuple[str, ...]
    into: str
    missing: Literal["error", "drop", "null", "only"] = "error"
    nulls: bool = False


@dataclass(frozen=True)
class Index:
    """Rows that name keys in two columns, resident as numbers: what a graph's edges become. Prepare only.

    ``keys`` maps the two key columns of ``rows`` to the tables that hold their distinct keys, which the
    stage makes: ``{"src": "pages", "dst": "pages"}`` for a graph, two tables for ratings of items by users.
    A table has one key column, named by ``names``, lies by key, and its rows stand in the order of their
    number. ``also`` adds keys: ``{"pages": ("nodes", "id")}``. ``symmetric``: every row counts both ways
    round, those that join a key with itself once. ``into`` is read by `Shuffle` with ``joined`` alone.
    """

    rows: str
    keys: Mapping[str, str]
    into: str
    names: Mapping[str, str]
    also: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    symmetric: bool = False


Stage = Local | Shuffle | Total | Gather | Number | Lookup | Index
STAGES = (Local, Shuffle, Total, Gather, Number, Lookup, Index)


# ---------------------------------------------------------------------- writes


@dataclass(frozen=True)
class Replace:
    """The table becomes these rows, at the end of the superstep.

    ``alike``: they must have the table's columns, each of its type. ``where``: the line of a program that
    asked for it, for messages.
    """

    table: str
    rows: str
    alike: bool = False
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Patch:
    """Columns of these rows overwrite those of the table's rows with the same keys; the rest stays in place.

    Costs as much as there are rows, whatever the size of the table. A key that the table does not have is an
    error.
    """

    table: str
    rows: str


@dataclass(frozen=True)
class Accumulate:
    """Values of these rows are merged into those of the table's rows of the same keys, or into the carry.

    ``merge`` maps columns of the table to SUM, MIN, MAX, ANY or ALL. For a carry the column of that name (or
    the only one) of the local rows is folded over all ranks.
    """

    table: str
    rows: str
    merge: Mapping[str, Aggregator] = field(default_factory=dict)


@dataclass(frozen=True)
class Insert:
    """These rows join the table, behind those that it has. Keys must be new; rows lie with their owner."""

    table: str
    rows: str


@dataclass(frozen=True)
class Remove:
    """The table's rows with the keys of these rows leave it; keys that it does not have are an error."""

    table: str
    rows: str


@dataclass(frozen=True)
class Sink:
    """These rows are kept, iteration after iteration, as one output of the run."""

    output: str
    rows: str


Write = Replace | Patch | Accumulate | Insert | Remove | Sink
WRITES = (Replace, Patch, Accumulate, Insert, Remove, Sink)


# ---------------------------------------------------------------------- what they read and make


def reads_of(stage: Stage) -> tuple[str, ...]:
    """The names a stage reads; what brings the rows first.

    >>> reads_of(Shuffle("edges", ("dst",), "m", onto="pages", joined=Joined("ranks", "src")))
    ('edges', 'pages', 'ranks')
    """
    if isinstance(stage, Local):
        return stage.reads
    if isinstance(stage, Lookup):
        return stage.rows, stage.table
    if isinstance(stage, Index):
        return (stage.rows, *(rows for rows, _ in stage.also.values()))
    if isinstance(stage, Shuffle):
        onto = (stage.onto,) if stage.onto else ()
        return (stage.rows, *onto, *((stage.joined.table,) if stage.joined else ()))
    return (stage.rows,)


def makes(stage: Stage) -> tuple[str, ...]:
    """The names a stage binds.

    >>> makes(Index("edges", {"src": "pages", "dst": "pages"}, "links", {"pages": "page"}))
    ('links', 'pages')
    """
    if isinstance(stage, Index):
        return (stage.into, *dict.fromkeys(stage.keys.values()))
    return (stage.into,)


BUILTINS = {"sum": "SUM", "min": "MIN", "max": "MAX", "any": "ANY", "all": "ALL", "len": "COUNT"}


def check_reduce(what: str, reduce: Any) -> None:
    """Raise `UsageError` unless this is an aggregator, or a mapping of names to aggregators."""
    named = reduce if isinstance(reduce, Mapping) else {"": reduce}
    for name, found in named.items():
        if not isinstance(name, str):
            raise UsageError(f"{what}: wanted names of columns, got {name!r}")
        if not isinstance(found, Aggregator):
            own = getattr(found, "__name__", "") if getattr(found, "__module__", "") == "builtins" else ""
            got = f"Python's {own}; write ir.{BUILTINS[own]}" if own in BUILTINS else type(found).__name__
            of = f' for "{name}"' if name else ""
            raise UsageError(f"{what}: wanted an aggregator such as ir.SUM{of}, got {got}")


def aggregators_of(reduce: Any) -> Iterator[Aggregator]:
    """The aggregators in what a user wrote behind ``combine`` or ``aggregators``."""
    if isinstance(reduce, Aggregator):
        yield reduce
    elif isinstance(reduce, Mapping):
        yield from reduce.values()
