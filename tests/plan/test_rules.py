"""Each rewrite by itself: the plan before and after, and the same rows; and random loop bodies, whose
invariants never travel again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce import col
from iterreduce.collectives import Group
from iterreduce.dataset import Dataset
from iterreduce.plan.nodes import Aggregate, Join, MapBatches, Node, walk
from iterreduce.plan.nodes import Group as Grouping
from iterreduce.plan.planning import rewritten, to_loop
from iterreduce.plan.rules import Applied
from iterreduce.plan.tree import tree
from iterreduce.run import run_loop
from iterreduce.testing import run_ranks


def dealt(group: Group | None, **columns: Any) -> Dataset:
    """Rows, of a group its share."""
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    lo, hi = (len(next(iter(columns.values()))) * r // size for r in (rank, rank + 1))
    return Dataset.from_local(group, **{name: c[lo:hi] for name, c in columns.items()})


def rows(group: Group | None = None) -> Dataset:
    return dealt(group, k=np.array([3, 1, 1, 2, 3, 9]), x=np.arange(6), y=np.arange(6.0))


def table(group: Group | None = None) -> Dataset:
    return dealt(group, k=np.array([1, 2, 3, 4]), z=np.array([10, 20, 30, 40]))


def rewrite(data: Dataset) -> tuple[Node, list[str]]:
    """The plan after all rules, and which were applied."""
    applied = Applied()
    return rewritten(data.node, applied), [name for name, _ in applied.rules]


def text(data: Dataset) -> str:
    return "\n".join(tree(rewrite(data)[0]))


def answers(data: Dataset, optimize: bool, group: Group | None = None) -> list[Any]:
    """The rows, sorted; floats to 12 digits."""
    loop = to_loop(data.node, group, optimize=optimize)
    batch = Dataset.of_loop(loop).collect(group)
    columns = []
    for name in batch.names:
        valid = batch.valid(name)
        values = batch[name].tolist()
        columns.append([v if valid is None or valid[i] else None for i, v in enumerate(values)])
    return sorted((tuple(_short(v) for v in row) for row in zip(*columns, strict=True)), key=repr)


def _short(value: Any) -> Any:
    return float(f"{value:.12g}") if isinstance(value, float) else value


def check(data: Dataset, rule: str) -> str:
    """The rule was applied and changed no row; the plan after it."""
    assert rule in rewrite(data)[1]
    assert answers(data, True) == answers(data, False)
    return text(data)


# ---------------------------------------------------------------------- each rule


def test_constants_are_folded() -> None:
    assert "z = (x + int64(3))" in check(rows().select(z=col("x") + (ir.lit(1) + 2)), "fold constants")


def test_a_filter_that_all_rows_pass_goes() -> None:
    assert "filter" not in check(rows().filter(ir.lit(1) < ir.lit(2)), "fold constants in filters")


def test_projections_of_projections_are_one() -> None:
    made = check(rows().select("k", z=col("x") * 2).select(w=col("z") + col("k")), "merge projections")
    assert made.count("select") == 1


def test_what_would_be_computed_twice_is_not_merged() -> None:
    twice = rows().select(z=col("x") * 2).select(w=col("z") + col("z"))
    assert "merge projections" not in rewrite(twice)[1]


def test_a_projection_of_all_columns_goes() -> None:
    assert check(rows().select("k", "x", "y"), "drop projections of all") == "read local: k, x, y"


def test_filters_of_filters_are_one() -> None:
    made = check(rows().filter(col("x") > 1).filter(col("y") < 5), "merge filters")
    assert made.count("filter") == 1


def test_a_filter_that_drops_padded_rows_makes_the_join_an_inner_one() -> None:
    made = check(rows().left_join(table(), on="k").filter(col("z") > 10), "outer joins to inner")
    assert "inner join" in made


def test_filters_move_below_projections_joins_groups_unions_and_sorts() -> None:
    below = rows().select("k", v="x").filter(col("v") > 1)
    assert check(below, "filters below projections").splitlines()[0].startswith("select")
    joined = rows().join(table(), on="k").filter((col("x") > 1) & (col("z") < 30))
    made = check(joined, "filters below joins")
    assert "- filter (x > 1)" in made and "- filter (z < 30)" in made
    grouped = rows().group_by("k").agg(n=ir.count()).filter(col("k") > 1)
    assert check(grouped, "filters below groups").splitlines()[0].startswith("group")
    assert check(rows().union(rows()).filter(col("x") > 1), "filters below unions").startswith("union")
    assert check(rows().sort("x").filter(col("x") > 1), "filters below sorts").startswith("sort")


def test_filters_and_columns_reach_the_reader(tmp_path: Any) -> None:
    pytest.importorskip("pyarrow")
    rows().select("k", "x", "y").write(str(tmp_path / "rows.parquet"))
    read = Dataset.read(str(tmp_path / "rows.parquet")).filter(col("x") > 3).select("k")
    made = check(read, "filters into readers")
    assert "only" not in made and "(no other column is read)" in made and "unless x > 3" in made


def test_the_total_of_groups_is_that_of_the_rows() -> None:
    sums = rows().group_by("k").agg(s=ir.sum("x"), m=ir.max("y")).select("k", t="s", m="m")
    made = check(sums.agg(t=ir.sum("t"), m=ir.max("m")), "totals before groups")
    assert "group by" not in made


def test_totals_of_groups_skip_nulls_as_the_rows_do() -> None:
    empty = rows().left_join(table(), on="k")
    for data in (empty, empty.filter(col("k") == 9), empty.filter(col("k") < 0)):
        check(data.group_by("k").agg(z=ir.sum("z")).agg(z=ir.sum("z")), "totals before groups")


@pytest.mark.parametrize(
    "total",
    [
        lambda g: g.agg(n=ir.sum("n")),  # of no rows: null, and a count would be 0
        lambda g: g.agg(n=ir.max("s")),  # another aggregate than that of the groups
        lambda g: g.agg(n=ir.count()),
        lambda g: g.filter(col("s") > 1).agg(n=ir.sum("s")),
    ],
)
def test_other_totals_of_groups_stay(total: Any) -> None:
    grouped = rows().group_by("k").agg(s=ir.sum("x"), n=ir.count())
    assert "totals before groups" not in rewrite(total(grouped))[1]
    assert answers(total(grouped), True) == answers(total(grouped), False)


def test_groups_that_others_read_are_totalled_themselves() -> None:
    grouped = rows().group_by("k").agg(s=ir.sum("x"))
    data = grouped.with_columns(part=col("s") / grouped.sum("s"))
    assert "totals before groups" not in rewrite(data)[1]
    assert answers(data, True) == answers(data, False)


# ---------------------------------------------------------------------- equal parts


def test_what_is_written_twice_is_made_once() -> None:
    def spent() -> Dataset:
        return source.filter(col("x") > 0).group_by("k").agg(s=ir.sum("x"))

    source = rows()
    made = spent().join(spent().rename(s="t"), on="k")
    check(made, "equal parts once")
    assert sum(isinstance(node, Grouping) for node in walk(rewrite(made)[0])) == 1


def test_equal_numbers_are_one_total() -> None:
    source = rows()
    data = source.with_columns(a=col("x") / source.sum("x"), b=col("y") / source.sum("x"))
    check(data, "equal parts once")
    assert sum(isinstance(node, Aggregate) for node in walk(rewrite(data)[0])) == 1


def same(batch: ir.Batch) -> ir.Batch:
    return batch


def test_functions_are_called_as_often_as_they_are_written_unless_declared_pure() -> None:
    source, types = rows(), {"k": int, "x": int, "y": float}
    for pure in (False, True):
        data = source.map_batches(same, columns=types, pure=pure)
        data = data.union(source.map_batches(same, columns=types, pure=pure))
        found = sum(isinstance(node, MapBatches) for node in walk(rewrite(data)[0]))
        assert found == (1 if pure else 2)


def test_parts_that_differ_in_a_constant_or_a_name_stay_two() -> None:
    source = rows()
    one, other = (
        source.group_by("k").agg(s=ir.sum(col("x") + 1)),
        source.group_by("k").agg(s=ir.sum(col("x") + 1.0)),
    )
    assert "equal parts once" not in rewrite(one.union(other.select("k", s=col("s").cast("int64"))))[1]


# ---------------------------------------------------------------------- in the body of an iteration


def loop(body: Any, group: Group | None = None, iterations: int = 3) -> Dataset:
    """An iteration over a keyed table of ranks, with links that stay."""
    start = dealt(group, page=np.arange(4), rank=np.array([1.0, 2.0, 3.0, 4.0]))
    links = dealt(group, src=np.array([0, 0, 1, 2, 3, 3]), dst=np.array([1, 2, 3, 0, 0, 3]), w=np.arange(6.0))
    return ir.iterate(lambda ranks: body(ranks, links), start, max_iterations=iterations, key="page")


def told(ranks: Dataset, heard: Dataset) -> Dataset:
    return ranks.select("page").left_join(heard, on="page").select("page", rank=col("h").fill_null(0) / 2)


def test_columns_of_the_side_that_stays_are_computed_once() -> None:
    def body(ranks: Dataset, links: Dataset) -> Dataset:
        sent = links.join(ranks, src="page").with_columns(v=ir.maximum(col("w") * 2, 1.0), u=col("rank") + 1)
        return told(ranks, sent.group_by(page="dst").agg(h=ir.mean(col("v") * col("u"))))

    data = loop(body)
    check(data, "invariant columns below joins")
    joins = [n for n in walk(rewrite(data)[0]) if isinstance(n, Join) and n.how == "inner"]
    assert "maximum" in joins[0].left.label and "rank" not in joins[0].left.label


def test_a_join_that_others_read_too_keeps_its_columns() -> None:
    def body(ranks: Dataset, links: Dataset) -> Dataset:
        sent = links.join(ranks, src="page")
        more = sent.with_columns(v=col("w") * 2).group_by(page="dst").agg(h=ir.sum("v"))
        least = sent.group_by(page="dst").agg(least=ir.min("rank"))
        return told(ranks, more.join(least, on="page").select("page", "h"))

    assert "invariant columns below joins" not in rewrite(loop(body))[1]


def test_a_keyed_table_that_changes_stands_right_of_rows_that_stay() -> None:
    def body(ranks: Dataset, links: Dataset) -> Dataset:
        sent = ranks.join(links.rename(src="page"), on="page").select("rank", to="dst")
        return told(ranks, sent.group_by(page="to").agg(h=ir.sum("rank")))

    data = loop(body)
    check(data, "table to the right")
    assert "indexed by" in data.explain()


def test_what_depends_on_a_key_alone_stands_beside_the_table_of_the_key() -> None:
    def body(ranks: Dataset, links: Dataset) -> Dataset:
        weighted = links.join(links.group_by("src").agg(n=ir.count()), on="src")
        sent = weighted.join(ranks, src="page")
        return told(ranks, sent.group_by(page="dst").agg(h=ir.sum(col("rank") / col("n"))))

    check(loop(body), "dependent columns beside their key")


# ---------------------------------------------------------------------- lowering, by what is told and sent


def test_rows_that_lie_by_a_key_are_not_shuffled_by_it_again() -> None:
    data = rows().repartition("k").group_by("k").agg(n=ir.count())
    assert "grouped where they are, nothing travels" in data.explain()


def test_a_small_side_is_brought_to_every_rank() -> None:
    assert "it is brought to every rank" in rows().join(table(), on="k").explain()


def test_a_state_key_that_the_body_changes_is_dropped_and_told() -> None:
    def body(ranks: Dataset, links: Dataset) -> Dataset:
        return ranks.select(page=(col("page") + 1) % 4, rank="rank")

    data = loop(body)
    assert 'the body changes its key column "page"' in data.explain()
    assert answers(data, True) == answers(data, False)


def stages_of(data: Dataset) -> tuple[list[Any], list[Any]]:
    """The stages before the first iteration, and those of the body."""
    made = to_loop(data.node)
    return list(made.prepare), [
        s for step in made.body if isinstance(step, ir.Superstep) for s in step.stages
    ]


def test_what_does_not_depend_on_a_state_goes_before_the_first_iteration() -> None:
    def body(ranks: Dataset, links: Dataset) -> Dataset:
        wide = links.filter(col("w") > 1).group_by(page="dst").agg(h=ir.sum("w"))
        return ranks.left_join(wide, on="page").select("page", rank=col("rank") + col("h").fill_null(0))

    once, again = stages_of(loop(body))
    assert any(isinstance(s, ir.Shuffle) and s.combine for s in once)
    assert [type(s) for s in again] == [ir.Local]  # row identity: the groups stand beside the state's rows


def test_groups_of_indexed_rows_are_one_index_and_one_shuffle_onto_the_state() -> None:
    def body(ranks: Dataset, links: Dataset) -> Dataset:
        return told(ranks, links.join(ranks, src="page").group_by(page="dst").agg(h=ir.sum("rank")))

    once, again = stages_of(loop(body))
    assert [type(s) for s in once if not isinstance(s, ir.Local | ir.Shuffle)] == [ir.Index]
    (sums,) = (s for s in again if not isinstance(s, ir.Local))
    assert isinstance(sums, ir.Shuffle) and sums.joined is not None and sums.onto is not None


def test_an_iteration_in_the_body_of_another_has_the_stages_that_it_has_alone() -> None:
    """What is proven of its state is proven with that of the state around it, which it begins with."""

    def body(ranks: Dataset, links: Dataset) -> Dataset:
        degrees = links.group_by("src").agg(degree=ir.count())
        sent = links.join(degrees, "src").join(ranks, src="page")
        return told(ranks, sent.group_by(page="dst").agg(h=ir.sum(col("rank") / col("degree"))))

    def around(ranks: Dataset, links: Dataset) -> Dataset:
        inner = ir.iterate(lambda r: body(r, links), ranks, max_iterations=2, name="inner")
        return inner.with_columns(rank=col("rank") + 1)

    (alone,), (inner, _) = (to_loop(loop(b).node).body for b in (body, around))
    assert isinstance(inner, ir.Loop) and isinstance(inner.body[0], ir.Superstep)
    assert isinstance(alone, ir.Superstep)
    assert [type(s) for s in inner.body[0].stages] == [type(s) for s in alone.stages]
    assert not any(isinstance(s, ir.Lookup) for s in inner.body[0].stages)
    assert answers(loop(around), True) == answers(loop(around), False)


def test_a_join_in_the_body_with_rows_that_lie_with_the_state_is_beside_it() -> None:
    def body(ranks: Dataset, links: Dataset) -> Dataset:
        best = (
            links.join(ranks, src="page")
            .filter(col("rank") > col("w"))
            .group_by(page="src")
            .agg(h=ir.max("w"))
        )
        return told(ranks, best)

    once, again = stages_of(loop(body))
    assert any(isinstance(s, ir.Shuffle) and s.combine is None for s in once)  # the links, by src, once
    assert not any(isinstance(s, ir.Shuffle) and s.combine is None for s in again)
    assert answers(loop(body), True) == answers(loop(body), False)


NAMES = st.permutations(["site", "who", "n", "town", "far", "z"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=NAMES,
    kind=st.sampled_from(["sum", "min", "max", "mean"]),
    left=st.booleans(),
    weighted=st.booleans(),
    extra=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_bodies_have_equal_answers_and_no_invariant_travels_again(
    names: list[str], kind: str, left: bool, weighted: bool, extra: bool, seed: int
) -> None:
    """The bytes of an iteration do not grow with the rows that stay."""
    key, start, end, value, weight, out = names
    random = np.random.default_rng(seed)

    def build(group: Group, times: int) -> Dataset:
        ends = random_ends
        links = dealt(
            group,
            **{start: np.tile(ends[0], times), end: np.tile(ends[1], times), weight: np.tile(ends[2], times)},
        )
        state = dealt(group, **{key: np.arange(8), value: np.linspace(1, 2, 8)})

        def body(s: Dataset) -> Dataset:
            met = s.join(links, **{key: start}) if left else links.join(s, **{start: key})
            tree = col(value) * col(weight) if weighted else col(value)
            by = met.group_by(**{key + "2": end}) if left else met.group_by(**{key: end})
            heard = by.agg(**{out: getattr(ir, kind)(tree)})
            heard = heard.rename(**{key + "2": key}) if left else heard
            if extra:
                heard = heard.with_columns(**{out: col(out) / (1 + heard.max(out))})
            new = s.select(key).left_join(heard, on=key)
            return new.select(key, **{value: col(out).fill_null(0.5) * 0.5})

        return ir.iterate(body, state, max_iterations=3, key=key)

    random_ends = random.integers(0, 8, 12), random.integers(0, 8, 12), random.integers(1, 5, 12) * 0.5

    def work(group: Group) -> tuple[list[Any], list[Any], list[int], list[int]]:
        once, many = build(group, 1), build(group, 40)
        sent = [
            run_loop(to_loop(data.node, group), group).bytes_exchanged["per_iteration"]
            for data in (once, many)
        ]
        return answers(once, True, group), answers(once, False, group), sent[0], sent[1]

    for optimised, plain, few, many in run_ranks(2, work):
        assert optimised == plain
        assert few[1:] == many[1:]  # 40 times the rows that stay, and not a byte more
