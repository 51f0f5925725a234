"""Where rows come from and where results go: one source per kind of file, one `load` and one `write_result`
for all.

`open_source(path)` chooses by suffix; `LocalSource` wraps arrays that ranks already hold; `StackedSource`
makes one matrix of many columns. Nothing here moves rows between ranks, except a result on its way to rank 0,
who writes it.
"""

from __future__ import annotations

from iterreduce.sources.blocks import Blocks, Loaded, Source, first_nonfinite, load, release
from iterreduce.sources.finite import FiniteSource
from iterreduce.sources.local import LocalSource
from iterreduce.sources.opening import open_source
from iterreduce.sources.rowwriter import RowWriter, write_text_blocks
from iterreduce.sources.stacked import StackedSource
from iterreduce.sources.write import check_output, write_result
from iterreduce.storage import write_text

__all__ = [
    "Blocks",
    "FiniteSource",
    "Loaded",
    "LocalSource",
    "RowWriter",
    "Source",
    "StackedSource",
    "check_output",
    "first_nonfinite",
    "load",
    "open_source",
    "release",
    "write_result",
    "write_text",
    "write_text_blocks",
]
