"""Programs with odd tables are interrupted: no rows, fewer rows than ranks, odd columns and odd names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
import iterreduce.lasting
from iterreduce import Outcome
from iterreduce.collectives import Group
from iterreduce.driver import LoopRun
from iterreduce.errors import CheckpointError
from iterreduce.options import Options
from iterreduce.saving.sealing import sealed
from iterreduce.testing import run_ranks
from tests.engine.checks_nested import choosing_k, kmeans
from tests.saving.programs import Program, dealt, interrupted, run_once
from tests.saving.test_lasting import counting, facts


def each(function: Any, start: ir.Batch, keys: tuple[str, ...] = (), n: int = 8) -> Program:
    """The state is replaced by what the function makes of each rank's share of it."""
    step = ir.Superstep(
        "step",
        (ir.Local(function, ("s",), "t", cut="share", rank_free=True),),
        (ir.Replace("s", "t"), ir.Sink("log", "t")),
    )

    def program(group: Group) -> ir.Loop:
        source = start if keys else dealt(start, group).node.source
        return ir.Loop("odd", {"a": source}, {"s": ir.State("a", keys)}, (step,), ir.Until.of([], n), "s")

    return program


def texts(s: ir.Batch) -> ir.Ragged:
    return ir.Ragged.from_list([*(text + "x" for text in s["x"].to_list()), ""]).slice(0, len(s))


NULLS = ir.Batch.from_dict({"x": np.arange(5.0)}, {"x": np.array([1, 0, 1, 0, 1], bool)})
DAYS = np.array(["2020-01-01", "NaT"], "M8[D]")

ODD: dict[str, Program] = {
    "no rows": each(lambda s: s.with_columns(x=s["x"] * 2.0), ir.Batch(x=np.zeros(0))),
    "two rows": each(lambda s: s.with_columns(x=s["x"] * 2.0), ir.Batch(x=np.ones(2))),
    "no columns": each(lambda s: s, ir.Batch()),
    "ends without rows": each(lambda s: s.take(np.arange(max(0, len(s) - 1))), ir.Batch(x=np.arange(6.0))),
    "grows from few": each(lambda s: ir.Batch.concat([s, s]) if len(s) else s, ir.Batch(x=np.arange(2.0))),
    "floats where there are no rows": each(
        lambda s: ir.Batch(x=np.array([v + 1 for v in s["x"].tolist()])), ir.Batch(x=np.arange(2))
    ),
    "integers become floats": each(lambda s: ir.Batch(x=s["x"] * 1.5), ir.Batch(x=np.arange(3))),
    "text": each(lambda s: ir.Batch(x=texts(s)), ir.Batch(x=ir.Ragged.from_list(["ä", "", "c"]))),
    "text keys": each(
        lambda s: s.with_columns(v=s["v"] + 1),
        ir.Batch(k=ir.Ragged.from_list(["ä", "", "c", "d"]), v=np.arange(4)),
        keys=("k",),
    ),
    "keys and no rows": each(
        lambda s: s.with_columns(v=s["v"] + 1),
        ir.Batch(k=np.zeros(0, np.int64), v=np.zeros(0)),
        keys=("k",),
    ),
    "nulls": each(lambda s: s.with_columns(x=s["x"] + 1), NULLS),
    "long and odd names": each(
        lambda s: s.with_columns(**{"n" * 5000: s["x"], "a/b\0c": s["x"], "": s["x"]}), ir.Batch(x=np.ones(4))
    ),
    "days": each(lambda s: ir.Batch(x=s["x"] + np.timedelta64(1, "D")), ir.Batch(x=DAYS)),
}


@pytest.mark.parametrize("name", list(ODD))
def test_an_odd_program_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = run_once(ODD[name], 3, reproducible=True)[0]
    same = interrupted(ODD[name], tmp_path / "same", [(3, 1), (3, 2), (3, None)], reproducible=True)
    assert facts(same) == facts(whole)
    other = interrupted(ODD[name], tmp_path / "other", [(3, 1), (5, 1), (1, 1), (8, None)], reproducible=True)
    assert facts(other) == facts(whole)


@pytest.mark.parametrize("pieces", [[(1, 2), (1, 1)], [(3, 2), (2, 1)], [(2, 1), (5, 1), (3, 1)]])
def test_what_was_sunk_is_there_in_the_order_of_iterations(
    pieces: list[tuple[int, int]], tmp_path: Path
) -> None:
    program = each(lambda s: s.with_columns(x=s["x"] + 1), ir.Batch(x=np.arange(3) / 4), n=12)
    result = interrupted(program, tmp_path / "saved", [*pieces, (1, None)])
    expected = [i + part for i in range(1, 13) for part in (0.0, 0.25, 0.5)]
    assert result.outputs["log"]["x"].tolist() == expected


def test_names_of_states_and_outputs_may_look_like_those_of_stored_tables(tmp_path: Path) -> None:
    def program(group: Group) -> ir.Loop:
        def more(s: ir.Batch) -> ir.Batch:
            return s.with_columns(x=s["x"] + 1)

        stages = (
            ir.Local(more, ("output log",), "a", cut="share", rank_free=True),
            ir.Local(lambda s: ir.Batch(y=-s["x"]), ("a",), "b", cut="share", rank_free=True),
        )
        step = ir.Superstep("step", stages, (ir.Replace("output log", "a"), ir.Sink("log", "b")))
        start = {"start": ir.Batch(x=np.arange(2.0))}
        states = {"output log": ir.State("start")}
        return ir.Loop("names", start, states, (step,), ir.Until.of([], 4), "output log")

    result = interrupted(program, tmp_path / "saved", [(2, 2), (2, None)])
    assert result["x"].tolist() == [4.0, 5.0]
    assert result.outputs["log"]["y"].tolist() == [-1, -2, -2, -3, -3, -4, -4, -5]


def test_a_driver_of_its_own_that_went_too_far_to_be_followed_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterreduce.lasting, "MOST_REPLAYED", 3)
    saving = Options(checkpoint_dir=str(tmp_path / "saved"), checkpoint_every=0)
    first = LoopRun(counting(limit=9), None, saving)
    for _ in range(5):
        first.advance()
    first.save()
    again = LoopRun(counting(limit=9), None, saving)
    with pytest.raises(CheckpointError, match=r"only the first 3 positions .* had made 2 more; run"):
        again.advance()
    assert again.run() is Outcome.ITERATIONS_USED and again.iteration == 9


def as_once(facts: dict[str, Any], told: list[Any]) -> None:
    """The positions as they were saved before they were a table."""
    hexed = lambda x: None if x is None else float(x).hex()  # noqa: E731
    facts["journal"] = [[at.iteration, hexed(at.residual), list(at.path), list(at.loops)] for at in told]


def unnamed(facts: dict[str, Any], told: list[Any]) -> None:
    facts["journal"]["loops"] = facts["journal"]["loops"][:1]


@pytest.mark.parametrize("change", [None, as_once, unnamed])
def test_positions_of_inner_loops_are_given_again(change: Any, tmp_path: Path) -> None:
    saving = Options(checkpoint_dir=str(tmp_path / "saved"), checkpoint_every=0)

    def drive(group: Group, commits: int) -> list[Any]:
        run = LoopRun(choosing_k(group, kmeans()), group, saving)
        told = [run.advance() for _ in range(commits)]
        run.save()
        return told

    first = run_ranks(3, drive, 9)[0]
    assert len({at.loops for at in first}) == 2 and {at.residual is None for at in first} == {True, False}
    if change is not None:
        (path,) = tmp_path.glob("saved/attempt-*/0*/manifest.json")
        manifest = json.loads(path.read_bytes())
        del manifest["checksum"]
        change(manifest["facts"], first)
        path.write_bytes(sealed(manifest))
    if change is unnamed:
        with pytest.raises(CheckpointError, match="of loops that are not named"):
            run_ranks(2, drive, 11)
    else:
        again = run_ranks(2, drive, 11)[0]
        assert again[:9] == first and again == run_ranks(1, drive, 11)[0]


def test_a_source_that_is_a_loop_saves_nothing_of_its_own(tmp_path: Path) -> None:
    inner = each(lambda s: s.with_columns(x=s["x"] * 2), ir.Batch(x=np.arange(4.0)), n=4)

    def program(group: Group) -> ir.Loop:
        step = ir.Superstep(
            "step",
            (ir.Local(lambda s: s.with_columns(x=s["x"] + 1), ("s",), "t", cut="share", rank_free=True),),
            (ir.Replace("s", "t"),),
        )
        source = {"a": inner(group)}
        return ir.Loop("outer", source, {"s": ir.State("a")}, (step,), ir.Until.of([], 6), "s")

    whole = run_once(program, 3, reproducible=True)[0]
    pieces = [(3, 5), (2, 1), (3, None)]  # commits of the loop that is the source count as well
    result = interrupted(program, tmp_path / "saved", pieces, reproducible=True)
    assert facts(result) == facts(whole)
