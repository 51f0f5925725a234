"""What aggregators are compared with: plain loops over the rows of each group."""

from __future__ import annotations

import itertools

import numpy as np

from iterreduce.columns.aggregators import (
    ALL,
    ANY,
    FIRST,
    LAST,
    MAX,
    MEAN,
    MIN,
    SUM,
    VAR,
)
from iterreduce.columns.schema import Field

GUARD = 0x5A5A5A5A5A5A5A5A
NUMBERS = ["bool", "int8", "int32", "int64", "uint8", "uint64", "float16", "float32", "float64"]
WORDS = {"i8": "int64", "u8": "uint64", "f8": "float64"}


def field_like(values, nullable=False):
    return Field("fixed", values.dtype, values.shape[1:], nullable)


def fresh(bound, groups):
    """Records with a guard word on either side of the accumulator."""
    records = np.full((groups, bound.words + 2), GUARD, np.int64)
    bound.fill(records, 1)
    return records


def guarded(bound, records):
    assert (records[:, 0] == GUARD).all(), "a fold wrote in front of its words"
    assert (records[:, -1] == GUARD).all(), "a fold wrote behind its words"
    return bound.finish(records, 1)


def cut(values, lo, hi):
    return tuple(v[lo:hi] for v in values) if isinstance(values, tuple) else values[lo:hi]


def fold(bound, codes, values, groups, valid=None, cuts=()):
    """All rows in one record array, in pieces."""
    records, ends = fresh(bound, groups), [0, *cuts, len(codes)]
    for lo, hi in itertools.pairwise(ends):
        mask = None if valid is None else valid[lo:hi]
        bound.update(records, 1, codes[lo:hi], cut(values, lo, hi), mask)
    return guarded(bound, records)


def fold_apart(bound, codes, values, groups, valid=None, cuts=()):
    """Each piece in records of its own, with slots in reverse; then merged in order."""
    whole, ends = fresh(bound, groups), [0, *cuts, len(codes)]
    slots = np.arange(groups)[::-1].copy()
    for lo, hi in itertools.pairwise(ends):
        part = np.full((groups, bound.words + 1), GUARD, np.int64)
        bound.fill(part, 0)
        mask = None if valid is None else valid[lo:hi]
        bound.update(part, 0, codes[lo:hi], cut(values, lo, hi), mask)
        bound.merge(whole, 1, slots, part[::-1].copy(), 0)
    return guarded(bound, whole)


def agree(got, wanted, exact=True):
    (column, valid), (other, other_valid) = got, wanted
    assert column.dtype == other.dtype
    assert column.shape == other.shape
    assert (valid is None) == (other_valid is None)
    if valid is not None:
        np.testing.assert_array_equal(valid, other_valid)
    if exact or column.dtype.kind not in "fc":
        np.testing.assert_array_equal(column, other)
    else:
        np.testing.assert_allclose(column, other, rtol=1e-12, atol=1e-300)


# The oracle: one group at a time, with NumPy's own function.
def reference_sum(rows):
    out = {"b": np.int64, "i": np.int64, "u": np.uint64, "f": np.float64, "c": np.complex128}[rows.dtype.kind]
    return rows.astype(out).sum(axis=0)


ORACLE = {
    "sum": reference_sum,
    "min": lambda rows: rows.min(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "mean": lambda rows: rows.astype(np.float64).mean(axis=0),
    "var": lambda rows: rows.astype(np.float64).var(axis=0),
    "any": lambda rows: rows.astype(bool).any(axis=0),
    "all": lambda rows: rows.astype(bool).all(axis=0),
    "first": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
}
AGGREGATORS = {a.kind: a for a in (SUM, MIN, MAX, MEAN, VAR, ANY, ALL, FIRST, LAST)}


def reference(kind, codes, values, groups, valid):
    """Group by group; (column, valid) with zeros under the nulls."""
    keep = np.ones(len(codes), bool) if valid is None else valid
    rows = [values[(codes == g) & keep] for g in range(groups)]
    found = np.array([len(r) > 0 for r in rows])
    sample = np.asarray(ORACLE[kind](values[:1]))
    column = np.zeros((groups, *sample.shape), sample.dtype)
    for g in np.flatnonzero(found):
        column[g] = ORACLE[kind](rows[g])
    return column, None if valid is None else found


def random_values(rng, dtype, shape, rows):
    if dtype == "bool":
        return rng.random((rows, *shape)) < 0.7
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(size=(rows, *shape)).astype(dtype)
    info = np.iinfo(kind)
    return rng.integers(info.min, info.max, (rows, *shape), kind, endpoint=True)
