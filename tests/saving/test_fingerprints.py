"""What tells one job from another, and what does not."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import iterreduce as ir
import iterreduce.fingerprints as fingerprints
from iterreduce.agreement import Guard
from iterreduce.collectives import Group
from iterreduce.fingerprints import described, difference, input_digests
from iterreduce.sources import LocalSource, open_source
from iterreduce.testing import run_ranks
from tests.engine.kit import share

RANKS = (1, 2, 3, 5, 8)


def loop(function: Any, **more: Any) -> ir.Loop:
    step = ir.Superstep("step", (ir.Local(function, ("s",), "t", cut="share"),), (ir.Replace("s", "t"),))
    given: dict[str, Any] = {"until": ir.Until.of([], 3), "result": "s", **more}
    return ir.Loop("loop", {"a": ir.Batch(x=np.ones(2))}, {"s": ir.State("a")}, (step,), **given)


def scaled(factor: Any) -> Any:
    return lambda s: s.with_columns(x=factor * s["x"])


def plus(s: ir.Batch, by: float = 1.0) -> ir.Batch:
    return s.with_columns(x=s["x"] + by)


def times(factor: float) -> Any:
    def by(s: ir.Batch, *, factor: float = factor) -> ir.Batch:
        return s.with_columns(x=s["x"] * factor)

    return by


@dataclass(frozen=True)
class Model:
    factor: float

    def step(self, s: ir.Batch) -> ir.Batch:
        return s.with_columns(x=s["x"] * self.factor)


def callable_(sign: int) -> Any:
    def up(self: Any, s: ir.Batch) -> ir.Batch:
        return s.with_columns(x=s["x"] + 1)

    def down(self: Any, s: ir.Batch) -> ir.Batch:
        return s.with_columns(x=s["x"] - 1)

    return type("Step", (), {"__call__": up if sign > 0 else down})()


def nulls(*valid: bool) -> ir.Batch:
    return ir.Batch.from_dict({"x": np.ones(2)}, {"x": np.array(valid)})


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (loop(times(2.0)), loop(times(3.0)), "function.defaults.factor: 2.0 then, 3.0 now"),
        (loop(Model(2.0).step), loop(Model(3.0).step), "function.self.factor: 2.0 then, 3.0 now"),
        (loop(callable_(1)), loop(callable_(-1)), "function.__call__ has changed"),
        (loop(scaled(nulls(True, False))), loop(scaled(nulls(False, True))), "function.factor: "),
        (loop(scaled(2.0)), loop(scaled(3.0)), "function.factor: 2.0 then, 3.0 now"),
        (loop(scaled(np.ones(2))), loop(scaled(np.zeros(2))), "function.factor: float64[2] "),
        (loop(plus), loop(functools.partial(plus, by=2.0)), "arguments"),
        (loop(plus), loop(lambda s: s), "function: plus then, "),
        (loop(plus), loop(plus, params={"k": 3}), "params"),
        (loop(plus), loop(plus, carry={"n": ir.Carry(ir.SUM)}), "carry"),
        (loop(plus), loop(plus, until=ir.Until.of(ir.l1("x") <= 1, 3).on("s")), "until: MaxIterations then"),
        (loop(plus), loop(plus, partitions=64), "partitions: 1024 then, 64 now"),
    ],
)
def test_what_makes_another_loop_is_named(one: ir.Loop, other: ir.Loop, told: str) -> None:
    found = difference(described(one), described(other))
    assert found is not None and told in found


def test_code_that_changed_is_told_unless_python_did() -> None:
    def one(s: ir.Batch) -> ir.Batch:
        return s.with_columns(x=s["x"] + 1)

    first = described(loop(one))
    code = one.__code__

    def other(s: ir.Batch) -> ir.Batch:
        return s.with_columns(x=s["x"] - 1)

    one.__code__ = other.__code__.replace(co_name=code.co_name, co_qualname=code.co_qualname)
    found = difference(first, described(loop(one)))
    assert found is not None and "has changed" in found and "function" in found
    assert difference(first, described(loop(one)), same_python=False) is None


def test_a_slice_of_rows_is_as_the_rows_alone() -> None:
    names = ir.Ragged.from_list(["", "a", "bc"])
    part, alone = (
        loop(scaled(rows))
        for rows in (ir.Batch(x=names).slice(1, 3), ir.Batch(x=ir.Ragged.from_list(["a", "bc"])))
    )
    assert difference(described(part), described(alone)) is None


@given(st.integers(1, 1000), st.floats(0, 1))
def test_thresholds_are_no_other_loop(n: int, threshold: float) -> None:
    def with_rule(x: float, most: int) -> ir.Loop:
        return loop(plus, until=ir.Until.of(ir.l1("x") <= x, most).on("s"))

    assert difference(described(with_rule(0.5, 10)), described(with_rule(threshold, n))) is None


# ---------------------------------------------------------------------- the input


def digests(ranks: int, make: Any) -> dict[str, str]:
    def job(group: Group) -> dict[str, str]:
        source = make(group)
        source.open(group)
        return input_digests(group, {"rows": source}, Guard(group.rank, 0))

    found = run_ranks(ranks, job)
    assert all(other == found[0] for other in found)
    return found[0]


@pytest.mark.parametrize("ranks", RANKS)
def test_digests_do_not_depend_on_ranks_or_on_how_rows_are_dealt(ranks: int, tmp_path: Path) -> None:
    rows = ir.Batch(k=np.arange(1000), name=ir.Ragged.from_list([f"n{i}" for i in range(1000)]))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200_000, 2)))
    for make in (lambda g: LocalSource(share(rows, g)), lambda g: open_source(tmp_path / "x.npy")):
        assert digests(ranks, make) == digests(1, make)
    uneven = digests(ranks, lambda g: LocalSource(share(rows, g, [0] * (g.size - 1) + [1000])))
    assert uneven == digests(1, lambda g: LocalSource(rows))


@pytest.mark.parametrize("at", [0, 1, 700_000, 1_599_999])
def test_every_byte_of_a_file_counts(at: int, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(200_000))
    before = digests(2, lambda g: open_source(path))
    raw = bytearray(path.read_bytes())
    raw[128 + at] ^= 1
    path.write_bytes(raw)
    assert digests(2, lambda g: open_source(path)) != before


def test_pieces_that_change_places_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "CHUNK_BYTES", 4096)
    path = tmp_path / "x.npy"
    x = np.arange(4096.0)
    np.save(path, x)
    before = digests(3, lambda g: open_source(path))
    start = (4096 - 128) // 8  # values from here on begin with a piece
    x[start : start + 512], x[start + 512 : start + 1024] = (
        x[start + 512 : start + 1024].copy(),
        x[start : start + 512].copy(),
    )
    np.save(path, x)
    assert digests(3, lambda g: open_source(path)) != before


def test_of_a_very_large_file_pieces_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(fingerprints, "MOST_CHUNKS", 10)
    path = tmp_path / "x.npy"
    np.save(path, np.arange(100_000.0))
    first = digests(1, lambda g: open_source(path))
    assert digests(3, lambda g: open_source(path)) == first
    np.save(path, np.arange(100_001.0))
    assert digests(1, lambda g: open_source(path)) != first
