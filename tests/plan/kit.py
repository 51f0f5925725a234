"""What the tests of lazy datasets share: tables dealt to ranks, and the answer on every number of ranks.

A test is a function of `Tables` that returns a lazy dataset. It is called once with all rows in one place,
where `oracle` interprets the plan that it makes, and on every rank of several numbers of ranks, where the
engine runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.plan.nodes import Source
from iterreduce.sources import LocalSource
from iterreduce.testing import run_ranks
from tests.engine.kit import by_rank, same
from tests.plan import oracle
from tests.plan.oracle import Rows

RANKS = (1, 2, 3, 5, 8)
Deal = str  # "even", "first" (one rank has all rows), "last", or "cut" (by row number modulo ranks)


class Table:
    """Rows as a test writes them: column kinds, and tuples."""

    def __init__(self, kinds: Mapping[str, str], rows: Sequence[Sequence[Any]] = ()):
        self.kinds = dict(kinds)
        self.rows: Rows = [dict(zip(kinds, row, strict=True)) for row in rows]
        self.nullable = [n for n in kinds if any(row[n] is None for row in self.rows)]

    def share(self, rank: int, size: int, deal: Deal) -> Rows:
        """What a rank has of them, in order over the ranks."""
        n = len(self.rows)
        if deal in ("first", "last"):
            mine = rank == (0 if deal == "first" else size - 1)
            return self.rows if mine else []
        return self.rows[n * rank // size : n * (rank + 1) // size]


class Tables:
    """The tables of a test as lazy datasets: of all rows, or of a rank's share."""

    def __init__(self, tables: Mapping[str, Table], group: Group | None = None, deal: Deal = "even"):
        self.tables, self.group, self.deal = tables, group, deal

    def __getitem__(self, name: str) -> Dataset:
        table = self.tables[name]
        group = self.group
        rows = table.rows if group is None else table.share(group.rank, group.size, self.deal)
        source = LocalSource(oracle.batch_of(rows, table.kinds, table.nullable))
        return Dataset(Source(source=source, fields=dict(source.schema)), group)  # types known on all ranks

    def batch(self, name: str) -> Any:
        """All rows as a batch, the same on all ranks."""
        return oracle.batch_of(self.tables[name].rows, self.tables[name].kinds)


Build = Callable[[Tables], Dataset]


def answer(group: Group, data: Dataset, **options: Any) -> Rows:
    """All rows of a result, in rank order; what is everywhere must be the same on all ranks. Collective."""
    result = data.run(group, **options)
    names = same_names(group, result.batch)
    ranks = by_rank(group, result.batch)
    if result.everywhere:
        assert all(repr(rows) == repr(ranks[0]) for rows in ranks), "not the same on all ranks"
        ranks = ranks[:1]
    return [dict(zip(names, map(_listed, row), strict=True)) for rows in ranks for row in rows]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def same_names(group: Group, batch: Any) -> tuple[str, ...]:
    """The columns, after a check that all ranks have the same. Collective."""
    same(group, repr(batch.schema.names if hasattr(batch.schema, "names") else tuple(batch.schema)))
    return tuple(batch.names)


def on_ranks(
    build: Build, tables: Mapping[str, Table], size: int, deal: Deal = "even", **options: Any
) -> Rows:
    """What the engine makes of it on so many ranks."""

    def work(group: Group) -> Rows:
        return answer(group, build(Tables(tables, group, deal)), **options)

    return run_ranks(size, work)[0]


def wanted(build: Build, tables: Mapping[str, Table]) -> Rows:
    """What its plan means."""
    return oracle.rows_of(build(Tables(tables)).node)


def agrees(
    build: Build,
    tables: Mapping[str, Table],
    sizes: Sequence[int] = RANKS,
    deals: Sequence[Deal] = ("even",),
    in_order: bool = False,
    want: Rows | None = None,
) -> Rows:
    """Check that the engine's rows are those of the oracle, on all these numbers of ranks; returns them."""
    want = wanted(build, tables) if want is None else want
    for size in sizes:
        for deal in deals:
            got = on_ranks(build, tables, size, deal)
            try:
                oracle.same_rows(got, want, in_order)
            except AssertionError as error:
                raise AssertionError(f"{size} ranks, {deal}: {error}") from None
    return want
