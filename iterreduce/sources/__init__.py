"""Where rows come from and where results go: one source per kind of file, one `load` and one `write_result` for all.

`open_source(path)` chooses by suffix; `LocalSource` wraps arrays that ranks already hold; `StackedSource` makes one
matrix of many columns. Nothing here moves rows between ranks, except a result on its way to rank 0, who writes it.
"""

from __future__ import annotations

from iterreduce.sources.blocks import Blocks, Loaded, Source, first_nonfinite, load
from iterreduce.sources.finite import FiniteSource
from iterreduce.sources.local import LocalSource
from iterreduce.sources.opening import open_source
from iterreduce.sources.stacked import StackedSource

__all__ = [
    "Blocks",
    "FiniteSource",
    "Loaded",
    "LocalSource",
    "Source",
    "StackedSource",
    "first_nonfinite",
    "load",
    "open_source",
]
