"""Key batches of every kind, and rows as tuples of Python values: shared by the tests of keys."""

from __future__ import annotations

import numpy as np
import pytest

from iterreduce.columns.batch import Batch
from iterreduce.columns.hashing import EMPTY, NULL_HASH, hash_keys, unhash_words
from iterreduce.columns.ragged import Ragged

ONES_KEY = int(unhash_words(np.array([EMPTY]))[0])  # the key whose hash marks free rows
NULL_TWIN = int(unhash_words(np.array([NULL_HASH]))[0])  # the key that hashes like a null


def python_rows(batch, *names):
    """Rows as tuples of Python values; None for nulls, one NaN, one zero."""
    columns = []
    for name in names or batch.names:
        column, valid = batch[name], batch.valid(name)
        values = column.to_list() if isinstance(column, Ragged) else column.tolist()
        values = ["nan" if v != v else v + 0.0 if isinstance(v, float) else v for v in map(hashable, values)]
        columns.append([v if valid is None or valid[i] else None for i, v in enumerate(values)])
    return list(zip(*columns, strict=True))


def hashable(value):
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return tuple(value) if isinstance(value, list) else value


def rng():
    return np.random.default_rng(5)


def key_columns(n):
    """Key batches of n rows, of every kind."""
    r = rng()
    some = max(1, n // 3)
    sparse = r.integers(-(2**63), 2**63 - 1, some)[r.integers(0, some, n)]
    words = [f"word {i}" * (i % 4) for i in r.integers(0, some, n)]
    mask = r.random(n) < 0.8
    edges = np.array([2**63 - 1, -(2**63), 0, -1, ONES_KEY, NULL_TWIN])[r.integers(0, 6, n)]
    text = Ragged.from_list(words) if n else Ragged.from_list([""]).slice(0, 0)
    yield "sparse", Batch(k=sparse)
    yield "distinct", Batch(k=r.permutation(np.arange(n, dtype=np.int64) * 2**40))
    yield "dense", Batch(k=r.integers(0, some, n))
    yield "equal", Batch(k=np.full(n, 7))
    yield "edges", Batch(k=edges)
    yield "nullable edges", Batch.from_dict({"k": edges}, {"k": mask})
    yield "nullable dense", Batch.from_dict({"k": r.integers(0, some, n)}, {"k": mask})
    yield "all null", Batch.from_dict({"k": sparse}, {"k": np.zeros(n, bool)})
    yield "bool", Batch(k=r.random(n) < 0.5)
    yield "int8", Batch(k=r.integers(-128, 128, n).astype(np.int8))
    yield "uint64", Batch(k=r.integers(2**63, 2**64 - 1, some, dtype=np.uint64)[r.integers(0, some, n)])
    yield "float", Batch(k=np.array([0.0, -0.0, np.nan, -np.nan, 1.5, np.inf])[r.integers(0, 6, n)])
    yield "float32", Batch(k=r.random(n).astype(np.float32))
    yield "date", Batch(k=r.integers(0, 400, n).astype("datetime64[D]"))
    yield "strided", Batch(k=np.repeat(sparse, 2)[::2])
    yield "text", Batch(k=text)
    yield "nullable text", Batch.from_dict({"k": text}, {"k": mask})
    yield "pair", Batch(a=r.integers(0, 5, n), b=text)
    yield "nullable pair", Batch.from_dict({"a": edges, "b": text}, {"a": mask, "b": r.random(n) < 0.8})
    yield "vector", Batch(k=r.integers(0, 3, (n, 2)))
    yield "complex", Batch(k=(r.integers(0, 3, n) + 1j * r.integers(0, 3, n)).astype(np.complex64))


CASES = [(f"{name} {n}", keys) for n in (0, 1, 2, 700, 9000) for name, keys in key_columns(n)]
by_case = pytest.mark.parametrize("keys", [c[1] for c in CASES], ids=[c[0] for c in CASES])
SMALL = [(n, k) for n, k in CASES if n.endswith((" 700", " 0"))]
by_small = pytest.mark.parametrize("keys", [c[1] for c in SMALL], ids=[c[0] for c in SMALL])


def weak(keys):
    return hash_keys(keys) % np.uint64(3)
