"""Rows that ranks hold already, cut into global blocks: rows at the borders of ranks move to a neighbour.

`from_local` lets blocks end where ranks end, so blocks, and with them what a map sees at a time, depend on
the number of ranks. Under ``--reproducible`` they must not: blocks are those of the global row number, each
belongs to the rank that holds its first row, and rows in front of a rank's first block go to the owner of the
block that they are in. Order does not change; a rank sends less than a block, unless it holds no first row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.packing import pack, packed_words, unpack
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Schema
from iterreduce.sources.blocks import Loaded, block_rows_for

if TYPE_CHECKING:
    from iterreduce.collectives import Group


def border_rows(ends: Array, step: int) -> tuple[Array, Array]:
    """How many rows each rank sends, from its first on, and to whom; int64 ``(size,)`` each.

    ``ends``: rows up to and with each rank, ``(size,)``; ``step``: rows of a block.

    >>> sent, to = border_rows(np.array([3, 9, 10, 16]), 4)
    >>> sent.tolist(), to.tolist()
    ([0, 1, 1, 2], [0, 0, 1, 1])
    """
    firsts = np.concatenate([[0], ends[:-1]])
    sent = np.minimum(-firsts % step, ends - firsts)
    to = np.searchsorted(ends, firsts // step * step, side="right")
    return sent, np.where(sent > 0, to, np.arange(len(ends)))


def in_global_blocks(group: Group, loaded: Loaded, schema: Schema) -> Loaded:
    """The same rows in whole global blocks. Collective."""
    rows = np.zeros(group.size, np.int64)
    rows[group.rank] = len(loaded.batch)
    group.allreduce(rows, "sum")
    ends, step = np.cumsum(rows), block_rows_for(loaded.rows_total)
    sent, to = border_rows(ends, step)
    batch = _moved(group, loaded.batch, schema, sent, to) if sent.any() else loaded.batch
    starts = np.minimum(np.arange(-(-len(batch) // step) + 1, dtype=np.int64) * step, len(batch))
    return Loaded(batch, loaded.first_row + int(sent[group.rank]), loaded.rows_total, starts)


def _moved(group: Group, batch: Batch, schema: Schema, sent: Array, to: Array) -> Batch:
    """Own rows but for the first, then those of the ranks behind, in rank order. Collective."""
    rank, size = group.rank, group.size
    mine = int(sent[rank])
    words = np.zeros(size, np.int64)
    words[rank] = packed_words(batch, None, np.array([0, mine]), schema)[0] if mine else 0
    group.allreduce(words, "sum")
    send = np.zeros(int(words[rank]), np.int64)
    if mine:
        pack(batch, None, 0, mine, send, 0, schema)
    counts = np.zeros(size, np.int64)
    counts[to[rank]] = words[rank]
    come = np.where((to == rank) & (sent > 0), words, 0)
    recv = np.zeros(int(come.sum()), np.int64)
    at = np.concatenate([[0], np.cumsum(come)])
    group.alltoallv(send, counts, np.zeros(size, np.int64), recv, come, at[:-1])
    parts = [batch.slice(mine, len(batch))]
    for source in np.flatnonzero(come).tolist():
        parts.append(unpack(recv[at[source] : at[source + 1]], schema, int(sent[source])))
    return Batch.concat([p for p in parts if len(p)] or parts[:1])
