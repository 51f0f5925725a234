"""Tables that are written in place: patched, accumulated into, added to, taken from; and rows of them that a
shuffle touched.

The oracle is a dictionary that is written row by row. Edits come as rows with the iteration in which they are
meant, dealt to the ranks anyhow, and are shuffled to their owners first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.driver import LoopRun
from iterreduce.fixpoint import MaxIterations, Until
from iterreduce.loop import (
    Accumulate,
    Gather,
    Insert,
    Local,
    Loop,
    Patch,
    Remove,
    Replace,
    Shuffle,
    State,
    Superstep,
    Write,
)
from iterreduce.shuffle import CombineShuffle
from tests.engine.kit import Check, Row, by_rank, int_rows, local, raised, rows_of, started

OPS = ("remove", "insert", "patch", "add")
WRITES = {
    "remove": lambda rows: Remove("s", rows),
    "insert": lambda rows: Insert("s", rows),
    "patch": lambda rows: Patch("s", rows),
    "add": lambda rows: Accumulate("s", rows, {"x": ir.SUM, "v": ir.MAX}),
}
Edits = Sequence[Mapping[str, Sequence[Row]]]
NAMES = {"remove": "k", "insert": "kxvt", "patch": "kxt", "add": "kxv"}


def batch_of(rows: Sequence[Row], names: str = "kxvt") -> Batch:
    """Rows (k int64, x float64, v float64[2], t text) as columns."""
    of = dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True))
    made: dict[str, Any] = {"k": np.array(of["k"], np.int64)}
    if "x" in of:
        made["x"] = np.array(of["x"], np.float64)
    if "v" in of:
        made["v"] = np.array(of["v"], np.float64).reshape(len(rows), 2)
    if "t" in of:
        texts = list(of["t"])
        made["t"] = ir.Ragged.from_list(texts) if texts else Batch(t=["a"]).slice(0, 0)["t"]
    return Batch(**made)


def edit_rows(edits: Edits, op: str) -> Batch:
    rows = [(i + 1, *row) for i, edit in enumerate(edits) for row in edit.get(op, ())]
    if not rows:
        return batch_of((), NAMES[op]).with_columns(i=np.zeros(0, np.int64))
    made = batch_of([row[1:] for row in rows], NAMES[op])
    return made.with_columns(i=np.array([row[0] for row in rows]))


def due(rows: Batch, clock: Batch) -> Batch:
    return rows.take(rows["i"] == clock["i"][0] + 1).drop("i")


def edits_loop(
    group: Group, first: Sequence[Row], edits: Edits, until: Until, also: Superstep | None = None
) -> Loop:
    """Every iteration: the edits that are due, then rows shuffled onto the table as it is by then."""
    steps = [
        Superstep(
            op,
            (
                Local(due, (f"{op} rows", "clock"), f"{op} due"),
                Shuffle(f"{op} due", ("k",), f"{op} owned"),
            ),
            (WRITES[op](f"{op} owned"),),
        )
        for op in OPS
    ]
    count = Superstep(
        "count",
        (
            Shuffle("r", ("k",), "h", {"n": ir.sum("x")}, "s", "drop"),
            Shuffle("r", ("k",), "few", {"n": ir.sum("x")}, "s", "drop", touched=True),
            Local(lambda few, s: few.with_columns(x=s["x"], t=s["t"]), ("few", "s"), "both"),
            Local(lambda c: c.with_columns(i=c["i"] + 1), ("clock",), "c"),
        ),
        (Replace("heard", "h"), Replace("touched", "both"), Replace("clock", "c")),
    )
    sources = {
        "first": local(batch_of(first), group),
        "r": local(int_rows(60, 30), group),
        "zero": Batch(i=np.zeros(1, np.int64)),
        **{f"{op} rows": local(edit_rows(edits, op), group) for op in OPS},
    }
    state = {
        "s": State("first", ("k",)),
        "heard": State("", ("k",)),
        "touched": State("", ("k",)),
        "clock": State("zero"),
    }
    body = (*steps, count, *((also,) if also else ()))
    return Loop("edits", sources, state, body, until.on("s"), "s")


def edited(model: dict[int, list[Any]], edit: Mapping[str, Sequence[Row]]) -> dict[int, list[Any]]:
    """The table after the edits of one iteration."""
    out = {k: list(v) for k, v in model.items()}
    for (k,) in edit.get("remove", ()):
        del out[k]
    for k, x, v, t in edit.get("insert", ()):
        assert k not in out
        out[k] = [x, tuple(v), t]
    for k, x, t in edit.get("patch", ()):
        out[k][0], out[k][2] = x, t
    for k, x, v in edit.get("add", ()):
        out[k][0] += x
        out[k][1] = tuple(map(max, out[k][1], v))
    return out


def as_rows(model: Mapping[int, Sequence[Any]]) -> list[Row]:
    return sorted((k, *row) for k, row in model.items())


def heard(keys: set[int]) -> dict[int, int]:
    """What the rows ``r`` sum up to, per key of the table."""
    out = dict.fromkeys(keys, 0)
    rows = int_rows(60, 30)
    for k, x in zip(rows["k"].tolist(), rows["x"].tolist(), strict=True):
        if k in out:
            out[k] += x
    return out


def assert_tables(group: Group, run: LoopRun, model: Mapping[int, Sequence[Any]]) -> None:
    assert sorted(rows_of(group, run.tables["s"])) == as_rows(model)
    sums = heard(set(model))
    assert sorted(rows_of(group, run.tables["heard"])) == sorted(sums.items())
    named = set(int_rows(60, 30)["k"].tolist()) & set(model)
    wanted = sorted((k, sums[k], model[k][0], model[k][2]) for k in named)
    assert sorted(rows_of(group, run.tables["touched"])) == wanted


def made_up(seed: int, iterations: int = 5) -> tuple[list[Row], list[dict[str, list[Row]]]]:
    """A first table and edits of some iterations, which name keys that are there (or are new)."""
    random = np.random.default_rng(seed)

    def value() -> float:
        return float(random.integers(-9, 10))

    def row(k: int) -> Row:
        return k, value(), (value(), value()), "t" * int(random.integers(0, 4))

    spread = int(random.choice([1, 10**12]))  # keys that lie close together, and such that do not
    first = [row(k * spread if k > 15 else k) for k in random.choice(30, 12, replace=False).tolist()]
    keys, edits, fresh = {r[0] for r in first}, [], 100
    for _ in range(iterations):
        edit: dict[str, list[Row]] = {}
        some = [int(k) for k in random.permutation(sorted(keys)) if random.random() < 0.3]
        if random.random() < 0.5:
            edit["remove"] = [(k,) for k in some[:2]]
            keys -= {k for (k,) in edit["remove"]}
        if random.random() < 0.7:
            new = {*(int(k) for k in random.integers(0, 30, 2)), fresh * spread, fresh}
            edit["insert"] = [row(k) for k in sorted(new - keys)]
            keys |= new
            fresh += 1
        some = [int(k) for k in random.permutation(sorted(keys)) if random.random() < 0.4]
        if random.random() < 0.8:
            edit["patch"] = [(k, value(), "p" * int(random.integers(0, 3))) for k in some]
        if random.random() < 0.8:
            edit["add"] = [
                (k, value(), (value(), value())) for k in [*some[:3], *some[:2], *sorted(keys)[:1]]
            ]
        edits.append(edit)
    return first, edits


def check_made_up_edits_against_a_dictionary(group: Group) -> None:
    for seed in range(4):
        first, edits = made_up(seed)
        for options in ({}, {"check": True}, {"naive": True}) if seed == 0 else ({},):
            run = started(edits_loop(group, first, edits, Until((MaxIterations(9),))), group, **options)
            model: dict[int, list[Any]] = {k: list(r) for k, *r in first}
            for edit in edits:
                run.advance()
                model = edited(model, edit)
                assert_tables(group, run, model)


def moved(old: Mapping[int, Sequence[Any]], new: Mapping[int, Sequence[Any]]) -> dict[str, float]:
    """Distances of column x, row by row."""
    steps = [abs(new.get(k, [0.0])[0] - old.get(k, [0.0])[0]) for k in {*old, *new}]
    changed = sum(1 for k in {*old, *new} if k not in old or k not in new or old[k][0] != new[k][0])
    some = any(list(old.get(k, ())) != list(new.get(k, ())) for k in {*old, *new})
    return {
        "l1": sum(steps),
        "l2": float(np.sqrt(sum(s * s for s in steps))),
        "max": max(steps, default=0.0),
        "changed": float(changed),
        "unchanged": float(some),
        "empty": float(len(new)),
        "active": float(sum(1 for row in new.values() if row[0])),
    }


def check_distances_come_from_what_was_written(group: Group) -> None:
    rules = {
        "l1": ir.l1("x") <= 0.0,
        "l2": ir.l2("x") <= 0.0,
        "max": ir.linf("x") <= 0.0,
        "changed": ir.changed("x") <= 0.0,
        "empty": ir.Empty(),
        "active": ir.NoneActive("x"),
        "unchanged": ir.Unchanged(),
    }
    for seed in range(2):
        first, edits = made_up(seed, 3)
        for name, rule in rules.items():
            run = started(edits_loop(group, first, edits, Until((rule, MaxIterations(9)))), group)
            model: dict[int, list[Any]] = {k: list(r) for k, *r in first}
            for edit in edits:
                run.advance()
                before, model = model, edited(model, edit)
                wanted = moved(before, model)[name]
                got = float((run.residual or 0) > 0) if name == "unchanged" else run.residual
                assert got == wanted, (seed, name, edit)
                if run.outcome is not None:
                    break


def check_means_and_functions_of_patched_rows(group: Group) -> None:
    """A mean is of all rows; a function of yours is asked about written rows, a predicate sees all."""
    first = [(k, 1.0, (0.0, 0.0), "") for k in range(20)]
    edits = [{"patch": [(k, 3.0, "") for k in range(5)]}, {"patch": [(7, 1.0, "")]}]
    asked: list[tuple[int, int]] = []

    def twice(old: Batch, new: Batch) -> np.ndarray:
        return 2 * np.abs(new["x"] - old["x"]) + 1

    def settled(old: Batch, new: Batch) -> bool:
        asked.append((len(old), len(new)))
        assert np.array_equal(old["k"], new["k"]) and set(old["x"].tolist()) <= {1.0, 3.0}
        return bool((old["x"] == new["x"]).all())

    for rule, wanted in ((ir.l1("x", fold="mean") <= 0, [0.5, 0.0]), (ir.distance(twice) <= 0, [25.0, 1.0])):
        run = started(edits_loop(group, first, edits, Until((rule, MaxIterations(2)))), group)
        found = []
        for _ in range(2):
            run.advance()
            found.append(run.residual)
        assert found == wanted
    run = started(edits_loop(group, first, edits, Until((ir.Predicate(settled), MaxIterations(5)))), group)
    run.advance()
    assert run.outcome is None
    run.advance()
    assert run.outcome is ir.Outcome.HALTED and all(a == b for a, b in asked)


def state_of(group: Group, run: LoopRun) -> str:
    return repr([by_rank(group, run.tables[n].batch) for n in ("s", "heard", "touched", "clock")])


def check_a_failure_after_the_writes_undoes_them(group: Group) -> None:
    """An exception on one rank, in a stage behind all writes: tables and indexes are as they were."""
    for seed in range(2):
        first, edits = made_up(seed, 4)
        fault = {"on": True, "at": 0}

        def trip(s: Batch, clock: Batch, fault: dict[str, Any] = fault) -> Batch:
            if fault["on"] and clock["i"][0] == fault["at"] and group.rank == group.size - 1:
                raise ValueError("tripped")
            return s

        def bump(clock: Batch, s: Batch) -> Batch:
            return clock

        also = Superstep("trip", (Local(trip, ("s", "clock"), "same", "share"), Gather("clock", "c2")), ())
        rule = ir.l1("x") <= -0.0
        run = started(edits_loop(group, first, edits, Until((rule, MaxIterations(9))), also), group)
        model: dict[int, list[Any]] = {k: list(r) for k, *r in first}
        for i, edit in enumerate(edits):
            fault.update(on=True, at=i + 1)
            before = state_of(group, run) if i else ""
            raised(group, ir.UserCodeError, run.advance)
            assert not before or state_of(group, run) == before
            assert run.iteration == i
            fault["on"] = False
            run.advance()
            model = edited(model, edit)
            assert_tables(group, run, model)
            if run.outcome is not None:
                break


def refused(group: Group, edit: Mapping[str, Sequence[Row]], *texts: str, kind: Any = ir.UsageError) -> None:
    first = [(k, float(k), (0.0, 1.0), f"t{k}") for k in range(12)]
    run = started(edits_loop(group, first, [{}, edit], Until((MaxIterations(9),))), group)
    run.advance()
    before = state_of(group, run)
    error = str(raised(group, kind, run.advance))
    assert all(text in error for text in texts), error
    assert state_of(group, run) == before


def check_wrong_keys_are_named(group: Group) -> None:
    refused(group, {"patch": [(3, 1.0, ""), (99, 1.0, "")]}, "Patch", '"s"', "k=99", "not in it", "Insert")
    refused(group, {"patch": [(3, 1.0, ""), (3, 2.0, "")]}, "k=3", "more than one row")
    refused(group, {"add": [(99, 1.0, (0.0, 0.0))]}, "Accumulate", "k=99", "not in it")
    refused(group, {"insert": [(3, 1.0, (0.0, 0.0), "")]}, "Insert", "k=3", "in it already", "Patch")
    refused(
        group, {"insert": [(50, 1.0, (0.0, 0.0), ""), (50, 2.0, (0.0, 0.0), "")]}, "k=50", "more than one"
    )
    refused(group, {"remove": [(3,), (99,)]}, "Remove", "k=99", "not in it")


def write_once(group: Group, rows: Batch, write: Write, first: Batch | None = None) -> LoopRun:
    table = Batch(k=np.arange(8), x=np.arange(8.0), b=np.zeros(8, bool)) if first is None else first
    step = Superstep("write", (Local(lambda r: r, ("rows",), "w"),), (write,))
    loop = Loop(
        "once",
        {"first": local(table, group), "rows": local(rows, group) if len(rows) else rows},
        {"s": State("first", ("k",))},
        (step,),
        Until((MaxIterations(3),)),
        "s",
    )
    return started(loop, group)


def check_wrong_columns_are_refused(group: Group) -> None:
    some = Batch(k=np.arange(8), x=np.arange(8))
    for rows, write, text in (
        (some, Patch("s", "w"), "float64"),
        (Batch(k=np.arange(8), z=np.zeros(8)), Patch("s", "w"), '"z"'),
        (Batch(k=np.arange(8), x=np.zeros((8, 2))), Patch("s", "w"), "float64[2]"),
        (Batch(k=np.arange(8) + 50, x=np.zeros(8)), Insert("s", "w"), '"b"'),
        (Batch(x=np.zeros(8)), Patch("s", "w"), '"k"'),
        (Batch(k=np.arange(8), b=np.ones(8, bool)), Accumulate("s", "w", {"b": ir.SUM}), "any and all"),
        (Batch(k=np.arange(8), x=np.ones(8)), Accumulate("s", "w", {"x": ir.ANY}), "any and all"),
    ):
        here = Loop(
            "wrong",
            {"first": local(Batch(k=np.arange(8), x=np.arange(8.0), b=np.zeros(8, bool)), group), "w": rows},
            {"s": State("first", ("k",))},
            (Superstep("write", (), (write,)),),
            Until((MaxIterations(3),)),
            "s",
        )
        assert text in str(raised(group, ir.SchemaError, started(here, group).advance))
    wrong = Accumulate("s", "w", {"x": ir.MEAN})
    run = write_once(group, Batch(k=np.arange(8), x=np.ones(8)), wrong)
    assert "mean" in str(raised(group, ir.UsageError, run.advance)) or group.size > 1


def check_rows_of_other_ranks_are_refused(group: Group) -> None:
    if group.size == 1:
        return
    rows = Batch(k=np.arange(8), x=np.ones(8), b=np.ones(8, bool))
    run = write_once(group, rows, Patch("s", "w"))
    error = str(raised(group, ir.UsageError, run.advance))
    assert "belong to other ranks, such as k=" in error and "Shuffle the rows" in error
    run = write_once(group, rows.with_columns(k=rows["k"] + 100), Insert("s", "w"))
    error = str(raised(group, ir.UsageError, run.advance))
    assert "belong to other ranks, such as k=" in error and "Shuffle the rows" in error


def check_rows_everywhere_reach_their_owners(group: Group) -> None:
    rows = Batch(k=np.array([5, 2]), x=np.array([9.0, 8.0]), b=np.array([True, False]))
    loop = Loop(
        "everywhere",
        {"first": local(Batch(k=np.arange(8), x=np.zeros(8), b=np.zeros(8, bool)), group), "w": rows},
        {"s": State("first", ("k",))},
        (
            Superstep("write", (), (Patch("s", "w"),)),
            Superstep("add", (), (Accumulate("s", "w", {"x": ir.SUM, "b": ir.ANY}),)),
        ),
        Until((MaxIterations(2),)),
        "s",
    )
    run = started(loop, group)
    run.run()
    wanted = dict.fromkeys(range(8), (0.0, False)) | {5: (18.0, True), 2: (16.0, False)}
    assert sorted(rows_of(group, run.tables["s"])) == sorted((k, *row) for k, row in wanted.items())


def check_nulls_are_patched_in_and_out(group: Group) -> None:
    rows = Batch(k=np.arange(8), x=np.arange(8.0) * 10)
    clock = {"i": 0}

    def some(s: Batch) -> Batch:
        clock["i"] += 1
        mine = s.select("k").with_columns(x=s["k"] * 1.0)
        if clock["i"] % 2:
            return mine.take(s["k"] < 3).with_valid(x=s["k"][s["k"] < 3] == 1)
        return mine.take(s["k"] < 2)

    loop = Loop(
        "nulls",
        {"first": local(rows, group)},
        {"s": State("first", ("k",))},
        (Superstep("write", (Local(some, ("s",), "w", "share"),), (Patch("s", "w"),)),),
        Until((ir.changed("x") <= 0, MaxIterations(2))).on("s"),
        "s",
    )
    run = started(loop, group)
    run.advance()
    assert run.residual == 3.0
    assert sorted(rows_of(group, run.tables["s"]), key=str)[:3] == [(0, None), (1, 1.0), (2, None)]
    run.advance()
    assert run.residual == 1.0
    assert sorted(rows_of(group, run.tables["s"]), key=str)[:4] == [(0, 0.0), (1, 1.0), (2, None), (3, 30.0)]


def check_a_source_and_other_tables_are_never_written_to(group: Group) -> None:
    """The table's first rows are those of a source that other stages read; and what another state took over
    from the table stays as it was taken.
    """
    rows = Batch(k=np.arange(16), x=np.arange(16.0))
    step = Superstep(
        "both",
        (
            Local(lambda s: s, ("s",), "copy"),
            Local(lambda s: Batch(k=s["k"], x=s["x"][:]), ("s",), "view"),
            Local(lambda s: Batch(k=s["k"][::2], x=s["x"][::2] + 100), ("s",), "odd", "share"),
            Shuffle("odd", ("k",), "w"),
        ),
        (Patch("s", "w"), Replace("before", "copy"), Replace("too", "view")),
    )
    mine = ir.sources.LocalSource(rows, copy=False) if group.size == 1 else local(rows, group)
    loop = Loop(
        "aliases",
        {"first": mine},
        {"s": State("first", ("k",)), "before": State("first", ("k",)), "too": State("first", ("k",))},
        (step,),
        Until((MaxIterations(3),)),
        "s",
    )
    run = started(loop, group, check=True)
    seen = dict(zip(range(16), np.arange(16.0).tolist(), strict=True))
    for _ in range(3):
        run.advance()
        now = dict(rows_of(group, run.tables["s"]))
        assert dict(rows_of(group, run.tables["before"])) == seen
        assert dict(rows_of(group, run.tables["too"])) == seen
        assert now != seen
        seen = now
    assert np.array_equal(rows["x"], np.arange(16.0))


def check_rows_touched_must_be_there(group: Group) -> None:
    """A key that the table lacks is named, first and planned; or it is left out."""
    for missing in ("error", "drop"):
        step = Superstep(
            "step",
            (Shuffle("r", ("k",), "few", {"n": ir.count()}, "s", missing, touched=True),),  # type: ignore[arg-type]
            (Replace("seen", "few"),),
        )
        sources = {
            "first": local(Batch(k=np.arange(9)), group),
            "r": local(Batch(k=np.array([3, 3, 70])), group),
        }
        state = {"s": State("first", ("k",)), "seen": State("", ("k",))}
        run = started(Loop("few", sources, state, (step,), Until((MaxIterations(3),)), "seen"), group)
        if missing == "error":
            assert "k=70" in str(raised(group, ir.UsageError, run.advance))
            continue
        for _ in range(3):
            run.advance()
            assert rows_of(group, run.tables["seen"]) == [(3, 2)]


def check_plans_hold_until_keys_change_anywhere(group: Group) -> None:
    """Patches leave plans alone; an Insert on one rank voids them on all."""
    first = [(k, 0.0, (0.0, 0.0), "") for k in range(30)]
    patch = {"patch": [(k, 1.0, "") for k in range(0, 30, 3)]}
    edits = [patch, patch, patch, patch, {"insert": [(31, 0.0, (0.0, 0.0), "")]}, patch, patch, patch]
    run = started(edits_loop(group, first, edits, Until((MaxIterations(9),))), group, check=True)
    work = [w for w in run.shop.exchangers if isinstance(w, CombineShuffle) and w.stage.into in ("h", "few")]
    planned = []
    for _ in edits:
        run.advance()
        planned.append([w.planned for w in work])
    assert planned[1:4] == [[True, True]] * 3 and planned[4] == [False, False]
    assert planned[-1] == [True, True], "made anew, once the keys were proposed twice"


CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
