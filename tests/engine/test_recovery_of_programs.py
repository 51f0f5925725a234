"""Any program, any ranks that die at any collectives: the others end with the bits of an undisturbed run.

Or they all learn that rows are gone, where rows were given to the ranks and nobody else can have them.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.collectives import Group
from iterreduce.errors import RanksLost
from iterreduce.events import Events
from iterreduce.options import Options
from iterreduce.recovery import LoopRun, enduring
from iterreduce.run import Result, delivered, digest, run_loop
from iterreduce.table import BY_BLOCK, EVERYWHERE, Table
from iterreduce.testing import Death, run_ranks
from tests.engine.dying import counted, sums_of
from tests.engine.kit import int_rows
from tests.saving.programs import PROGRAMS, Program, app, graph
from tests.saving.test_odd_programs import ODD

FILE, HELD, EDGES = "rows of a file", "rows of a file that stay", "edges of a file"
PLAYED = sorted({*PROGRAMS, *ODD, FILE, HELD, EDGES})
NOT_GIVEN = {
    "grows",
    "text keys",
    "keys and no rows",
    FILE,
    HELD,
    EDGES,
}  # of all others the rows are the ranks' own


class Story(NamedTuple):
    """Who runs what, how, and who dies when."""

    program: str
    size: int
    deaths: tuple[Death, ...]
    options: dict[str, Any]
    saves: bool
    drives: bool  # the caller advances it, and asks for other work between


@st.composite
def stories(draw: st.DrawFn, names: list[str]) -> Story:
    size = draw(st.sampled_from([2, 3, 5, 8]))
    ranks = st.integers(0, size - 1)
    several = draw(st.sampled_from([1, 1, 2, size - 1]))
    lost = draw(st.lists(ranks, min_size=1, max_size=several, unique=True))
    heard = st.one_of(st.none(), st.lists(ranks, max_size=size, unique=True).map(tuple))
    most = draw(st.sampled_from([30, 120, 400]))
    options = {
        "copy_every": draw(st.sampled_from([None, 1, 1, 2, 0])),
        "naive": draw(st.integers(0, 5)) == 0,
        "memory_bytes": draw(st.sampled_from([None, None, 30_000_000])),
    }
    deaths = tuple(Death(rank, draw(st.integers(1, most)), draw(heard)) for rank in lost)
    return Story(
        draw(st.sampled_from(names)), size, deaths, options, draw(st.booleans()), draw(st.booleans())
    )


@given(stories(PLAYED))
@settings(max_examples=35, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of busy machines
def test_whoever_dies_the_others_end_as_if_nobody_had(story: Story) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoints that could not be written
        loaded: set[int] = set()
        write_files(folder)
        try:
            found = run_ranks(story.size, played, story, folder, loaded, heals=True, deaths=story.deaths)
        except RanksLost:
            assert story.program not in NOT_GIVEN
            copied = story.options["copy_every"] != 0 and {death.rank for death in story.deaths} <= loaded
            assert len(story.deaths) > 1 or not copied, "the only rank that died left a copy"
            return
    assert len(found) >= story.size - len(story.deaths)
    assert set(found) <= {undisturbed(story.program, story.drives)}


@cache
def undisturbed(program: str, drives: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_files(folder)
        (facts,) = run_ranks(1, played, Story(program, 1, (), {}, False, drives), folder, set())
    return facts


def played(group: Group, story: Story, folder: str, loaded: set[int]) -> str:
    """What came of it, as text. ``loaded``: who had its rows and went on, by the first numbers."""
    me, events = group.rank, Events()
    events.subscribe(lambda event: loaded.add(me) if event.name == "load" else None)
    saving = {"checkpoint_dir": f"{folder}/saved", "checkpoint_every": 1} if story.saves else {}
    options = Options(reproducible=True, **story.options, **saving)
    loop = program(story.program, folder)(group)
    return driven(loop, group, options, events) if story.drives else ran(loop, group, options, events)


def write_files(folder: str) -> None:
    rows, edges = int_rows(1200, 13), graph()
    lines = [f"{k},{x}\n" for k, x in zip(rows["k"].tolist(), rows["x"].tolist(), strict=True)]
    (Path(folder) / "rows.csv").write_text("k,x\n" + "".join(lines))
    np.savetxt(Path(folder) / "edges.el", np.column_stack([edges["src"], edges["dst"]]), "%d")


def program(name: str, folder: str) -> Program:
    if name == EDGES:
        return lambda group: pagerank(ir.read_edges(f"{folder}/edges.el", block_bytes=300))(group)
    if name in (FILE, HELD):
        made = sums_of if name == FILE else counted
        return lambda group: made(ir.read(f"{folder}/rows.csv", block_bytes=500).as_source())
    return {**PROGRAMS, **ODD}[name]


def pagerank(edges: ir.Dataset) -> Program:
    return app("benchmarks/waist/pagerank.py", edges, max_iterations=8, tolerance=0.0)


def ran(loop: ir.Loop, group: Group, options: Options, events: Events) -> str:
    """As the command line runs it: the engine drives it, and the result is delivered."""

    def looked_at(made: Result) -> str:
        sunk = {n: digest(Table(out.batch, out.layout), group) for n, out in sorted(made.outputs.items())}
        rows = digest(Table(made.batch, EVERYWHERE if made.everywhere else BY_BLOCK), group)
        return repr((made.outcome, made.iterations, made.values, made.result_sha256, rows, sunk))

    return delivered(run_loop(loop, group, options, events), group, looked_at)


def driven(loop: ir.Loop, group: Group, options: Options, events: Events) -> str:
    """As a caller drives it, who asks for other work meanwhile."""
    run, seen = LoopRun(loop, group, options, events), [""]

    def counted() -> int:
        number = np.array([len(seen)])
        group.allreduce(number, "max")
        return int(number[0])

    def rows() -> str:
        table = run.tables[run.loop.result]
        return digest(Table(table.batch, EVERYWHERE if table.everywhere else BY_BLOCK), group)

    while not seen[-1].startswith("<Outcome"):
        seen.append(repr(run.advance()))
        assert len(seen) % 3 or enduring(group, counted) == len(seen)
        if options.checkpoint_dir and not len(seen) % 4:
            run.save()
    run.finish()
    found = run.enduring(rows)
    run.close()
    return repr((seen, found))
