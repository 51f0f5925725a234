"""Header words in front of segments, written and read in one pass over all ranks.

A compiled call costs less than one fancy assignment of NumPy, and an exchange of a thousand rows is over in
the time of ten. What the words mean is the business of `iterreduce.exchange`; here are only their places: a
header is 8 words, stage, status, rows, words, largest, schema, proposal, extra.
"""

from __future__ import annotations

from typing import Any

from iterreduce.columns.jit import kernel


@kernel
def put_status(buffer: Any, starts: Any, stage: int, status: int) -> None:
    """Stage and status into the headers that begin at ``starts``, int64 ``(ranks,)``."""
    for i in range(len(starts)):
        buffer[starts[i]] = stage
        buffer[starts[i] + 1] = status


@kernel
def heard_status(buffer: Any, starts: Any) -> int:
    """The status bits of all headers together."""
    status = 0
    for i in range(len(starts)):
        status |= buffer[starts[i] + 1]
    return status


@kernel
def put_heads(
    heads: Any, stage: int, status: int, rows: Any, words: Any, schema: int, proposal: int, extra: Any
) -> None:
    """Whole headers, one per row of ``heads``: int64 of shape ``(ranks, at least 8)``."""
    largest = 0
    for i in range(len(words)):
        largest = max(largest, words[i])
    for i in range(len(words)):
        heads[i, 0], heads[i, 1], heads[i, 2], heads[i, 3] = stage, status, rows[i], words[i]
        heads[i, 4], heads[i, 5], heads[i, 6], heads[i, 7] = largest, schema, proposal, extra[i]


@kernel
def read_heads(heads: Any, stop: int, second: int, out: Any, counts: Any, late: Any) -> Any:
    """Copy headers to ``out``, int64 ``(ranks, 8)``; ``(all status bits, largest, is anyone late)``.

    ``counts``: words that came, none of a rank that says ``second`` (it is ``late``, bool), and none at all
    where any rank says a bit of ``stop``.
    """
    status = largest = 0
    for i in range(len(counts)):
        for k in range(8):
            out[i, k] = heads[i, k]
        status |= out[i, 1]
        largest = max(largest, out[i, 4])
    some = False
    for i in range(len(counts)):
        late[i] = (status & stop) == 0 and (out[i, 1] & second) != 0
        counts[i] = 0 if late[i] or (status & stop) != 0 else out[i, 3]
        some |= late[i]
    return status, largest, some
