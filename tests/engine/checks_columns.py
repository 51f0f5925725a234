"""Columns of every kind, with nulls, of no rows and of few, come through the stages as they were."""

from __future__ import annotations

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Ragged
from iterreduce.loop import Gather, Local, Shuffle, Total
from tests.engine import oracle
from tests.engine.checks_answers import N, dicts
from tests.engine.kit import (
    Check,
    all_on,
    as_tuple,
    int_rows,
    local,
    once,
    raised,
    rows_of,
    share,
    values_of,
)


def check_no_rows_give_no_rows_of_the_right_columns(group: Group) -> None:
    rows = int_rows(0, 3).with_columns(w=Ragged.from_list(["x"]).slice(0, 0))
    for stage in (
        Shuffle("r", ("k",), "t", {"x": ir.SUM}),
        Shuffle("r", ("k", "w"), "t"),
        Total("r", ("k",), {"x": ir.MEAN}, "t"),
        Total("r", (), {"x": ir.SUM}, "t"),
        Gather("r", "t"),
    ):
        made = once(group, {"r": local(rows, group)}, Local(lambda r: r, ("r",), "m"), stage)
        assert rows_of(group, made) == []
        assert "x" in made.batch


def check_few_rows_of_text_through_a_map(group: Group) -> None:
    """A rank without rows has not run the map: it knows no columns, and what it sends has no words at all."""
    for n in (1, 2):
        rows = Batch(k=["one", "two"][:n], x=np.arange(n), w=["", "b"][:n])
        for stage in (
            Shuffle("m", ("k",), "t", {"x": ir.SUM}),
            Shuffle("m", ("k", "w"), "t"),
            Gather("m", "t"),
            Total("m", ("w",), {"x": ir.SUM}, "t"),
        ):
            made = once(
                group, {"r": local(rows, group, all_on(group, n, 1))}, Local(lambda r: r, ("r",), "m"), stage
            )
            assert len(rows_of(group, made)) == n


def check_nulls_on_one_rank_make_the_column_nullable_everywhere(group: Group) -> None:
    rows = int_rows(N, 6).select("k", "x")
    for holder in {0, group.size - 1}:
        masked = share(rows, group).with_valid(x=share(rows, group)["x"] % 3 > 0)
        nulls = {"r": local(rows, group)}

        def some_nulls(r: Batch, holder: int = holder, masked: Batch = masked) -> Batch:
            return masked if group.rank == holder and len(r) else r

        n = len(rows)
        lo, hi = n * holder // group.size, n * (holder + 1) // group.size
        plain = [
            {**d, "x": None if lo <= i < hi and d["x"] % 3 == 0 else d["x"]}
            for i, d in enumerate(dicts(rows))
        ]
        wanted = oracle.reduced(plain, ("k",), {"s": ("sum", "x"), "n": ("count", "x")})
        reduce = {"s": ir.sum("x"), "n": ir.count("x")}
        for stage in (Shuffle("m", ("k",), "t", reduce), Total("m", ("k",), reduce, "t")):
            got = once(group, nulls, Local(some_nulls, ("r",), "m", cut="share"), stage)
            assert {(row[0],): row[1:] for row in rows_of(group, got)} == wanted
        whole = once(group, nulls, Local(some_nulls, ("r",), "m", cut="share"), Gather("m", "t"))
        assert [row[1] for row in rows_of(group, whole)] == [d["x"] for d in plain]


def check_vectors_are_summed_element_by_element(group: Group) -> None:
    random = np.random.default_rng(3)
    rows = Batch(
        k=random.integers(0, 4, N),
        p=random.integers(0, 99, (N, 3)).astype(np.float32),
        q=random.integers(0, 9, (N, 1)),
    )
    wanted = {
        k: as_tuple(
            [rows["p"][rows["k"] == k].sum(axis=0).tolist(), rows["q"][rows["k"] == k].min(axis=0).tolist()]
        )
        for k in range(4)
    }
    for stage in (
        Shuffle("r", ("k",), "t", {"p": ir.SUM, "q": ir.MIN}),
        Total("r", ("k",), {"p": ir.SUM, "q": ir.MIN}, "t"),
    ):
        assert {r[0]: r[1:] for r in rows_of(group, once(group, {"r": local(rows, group)}, stage))} == wanted


def check_vectors_are_keys(group: Group) -> None:
    """Also those of one element; a total stands in their order, element by element."""
    numbers = np.random.default_rng(4).integers(-2, 3, (N, 2))
    for width in (1, 2):
        rows = Batch(v=numbers[:, :width], x=np.arange(N), y=np.ones((N, 1)))
        sums: dict[tuple[int, ...], tuple[int, float]] = {}
        for i, key in enumerate(map(tuple, numbers[:, :width].tolist())):
            x, y = sums.get(key, (0, 0.0))
            sums[key] = x + i, y + 1
        wanted = [as_tuple([list(key), x, [y]]) for key, (x, y) in sorted(sums.items())]
        given = {"r": local(rows, group)}
        assert sorted(rows_of(group, once(group, given, Shuffle("r", ("v",), "t", ir.SUM)))) == wanted
        mapped = Local(lambda r: r, ("r",), "m")
        assert rows_of(group, once(group, given, mapped, Total("m", ("v",), ir.SUM, "t"))) == wanted


def check_argmin_takes_the_first_of_equal_rows(group: Group) -> None:
    rows = int_rows(N, 4).with_columns(at=np.arange(N), w=int_rows(N, 4)["x"] // 20)
    reduce = {"low": ir.argmin("at", by="w"), "high": ir.argmax("at", by="w")}
    wanted = {
        k: (oracle.where(g, "at", "w", False), oracle.where(g, "at", "w", True))
        for (k,), g in oracle.grouped(dicts(rows), ("k",)).items()
    }
    for stage in (Shuffle("r", ("k",), "t", reduce), Total("r", ("k",), reduce, "t")):
        assert {r[0]: r[1:] for r in rows_of(group, once(group, {"r": local(rows, group)}, stage))} == wanted


def check_other_columns_on_one_rank_are_refused_on_all(group: Group) -> None:
    rows = int_rows(N, 4).select("k", "x")

    def other(r: Batch) -> Batch:
        return r.with_columns(x=r["x"].astype(np.float32)) if group.rank == group.size - 1 else r

    if group.size == 1:
        return
    for stage in (
        Shuffle("m", ("k",), "t", ir.SUM),
        Total("m", ("k",), ir.SUM, "t"),
        Shuffle("m", ("k",), "t"),
        Gather("m", "t"),
    ):
        raised(
            group,
            ir.DisagreementError,
            lambda stage=stage: once(group, {"r": local(rows, group)}, Local(other, ("r",), "m"), stage),
        )  # type: ignore[misc]


def check_values_of_a_column_come_back_as_they_were(group: Group) -> None:
    columns = {
        "a": np.arange(5, dtype=np.uint8),
        "b": np.array([1.5, np.nan, -0.0, np.inf, 0.1]),
        "c": np.arange(5) % 2 > 0,
        "d": ["", "x", "\u20ac", "yyyyyyyyyyyyyyyy", "z"],
        "e": np.arange(20, dtype=np.float32).reshape(5, 2, 2),
        "f": [b"", b"\0", b"ab", b"c", b""],
        "g": np.arange(5).astype("M8[D]"),
        "h": np.arange(5) * 1j,
    }
    rows = Batch(**columns).with_valid(a=np.array([1, 0, 1, 1, 0], bool), d=np.array([1, 1, 0, 1, 1], bool))
    made = once(group, {"r": local(rows, group)}, Gather("r", "t")).batch
    assert made.equals(rows)
    spread = once(
        group,
        {"r": local(rows.with_columns(k=np.arange(5)), group)},
        Shuffle("r", ("k",), "s"),
        Gather("s", "t"),
    ).batch
    assert spread.take(np.argsort(spread["k"])).drop("k").equals(rows)
    assert values_of(made, "a") == [0, None, 2, 3, None]


def check_expressions_of_columns_are_aggregated(group: Group) -> None:
    """By a shuffle and by a total, of rows and of what a map makes; a null operand gives a null."""
    rows = int_rows(3000, 12, 3).with_valid(f=np.arange(3000) % 5 != 0)
    x, f = ir.col("x"), ir.col("f")
    reduce = {
        "double": ir.sum(x * 2),
        "least": ir.min(x - f),
        "mean": ir.mean(f / 4),
        "both": ir.sum(ir.where(x > f, 1, 0)),
        "rows": ir.count(),
    }
    known: dict[int, list[tuple[int, float | None]]] = {}
    for k, x_, f_ in zip(rows["k"].tolist(), rows["x"].tolist(), values_of(rows, "f"), strict=True):
        known.setdefault(k, []).append((x_, f_))
    wanted = []
    for k, pairs in sorted(known.items()):
        real = [(a, b) for a, b in pairs if b is not None]
        more = sum(a > b for a, b in real)
        mean = sum(b for _, b in real) / len(real) / 4
        wanted.append((k, 2 * sum(a for a, _ in pairs), min(a - b for a, b in real), mean, more, len(pairs)))
    for stages in (
        (Shuffle("r", ("k",), "t", reduce),),
        (Total("r", ("k",), reduce, "t"),),
        (Local(lambda r: r.with_columns(x=r["x"] + 0), ("r",), "m"), Shuffle("m", ("k",), "t", reduce)),
        (Local(lambda r: r.with_columns(x=r["x"] + 0), ("r",), "m"), Total("m", ("k",), reduce, "t")),
    ):
        got = sorted(rows_of(group, once(group, {"r": local(rows, group)}, *stages)))
        assert [row[0:3] + row[4:] for row in got] == [row[0:3] + row[4:] for row in wanted]
        np.testing.assert_allclose([row[3] for row in got], [row[3] for row in wanted], rtol=1e-12)
    whole = once(group, {"r": local(rows, group)}, Total("r", (), {"s": ir.sum(x * x)}, "t"))
    assert rows_of(group, whole) == [(int((rows["x"] ** 2).sum()),)]


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
