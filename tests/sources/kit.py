"""What tests of sources share: load on several ranks, and the error that all of them must report alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from iterreduce.collectives import Group, SoloGroup
from iterreduce.columns.batch import Batch
from iterreduce.errors import IterReduceError
from iterreduce.sources import Loaded, Source, load, open_source
from iterreduce.testing import run_ranks

SIZES = (1, 2, 3, 5, 8)


def loaded(size: int, make: Callable[[], Source]) -> tuple[Batch, list[Loaded], list[Source]]:
    """All rows in rank order, and each rank's share, after the checks that hold for any source."""

    def work(group: Group) -> tuple[Loaded, Source]:
        source = make()
        source.open(group)
        return load(group, source), source

    got = run_ranks(size, work)
    shares, sources = [share for share, _ in got], [source for _, source in got]
    rows = [len(share.batch) for share in shares]
    assert [share.first_row for share in shares] == np.cumsum([0, *rows])[:-1].tolist()
    assert {share.rows_total for share in shares} == {sum(rows)}
    assert len({source.token for source in sources}) == 1
    assert len({share.batch.schema for share in shares}) == 1, "ranks without rows hold the same schema"
    assert shares[0].batch.schema == sources[0].schema
    for share in shares:
        assert share.block_starts[-1] == len(share.batch)
        assert (np.diff(share.block_starts) >= 0).all()
    return Batch.concat([share.batch for share in shares]), shares, sources


def read(path: Any, size: int = 1, **options: Any) -> Batch:
    """All rows of a path, read on `size` ranks."""
    return loaded(size, lambda: open_source(path, **options))[0]


def complaint(work: Callable[[Group], Any], size: int = 3) -> str:
    """The error that `work` raises, which must be the same on all ranks: its kind and its text."""

    def caught(group: Group) -> str:
        try:
            work(group)
        except IterReduceError as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    told = set(run_ranks(size, caught)) | set(run_ranks(1, caught))
    assert len(told) == 1, told
    (text,) = told
    return text


def complaint_about(path: Any, size: int = 3, **options: Any) -> str:
    """The error of opening and loading a path, on all ranks alike."""

    def work(group: Group) -> None:
        source = open_source(path, **options)
        source.open(group)
        load(group, source)

    return complaint(work, size)


def opened(source: Source) -> Source:
    """The source, opened by one rank."""
    source.open(SoloGroup())
    return source


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
