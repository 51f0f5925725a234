"""What a source that wraps another passes on as it is: `Wrapping`, the base of such sources.

It decides nothing about columns and rows; whoever derives from it says what it changes.
"""

from __future__ import annotations

from iterreduce.columns.ragged import Array
from iterreduce.sources.blocks import Source


class Wrapping:
    """The hints, the counters and the rows of blocks of ``source``, the wrapped one."""

    source: Source

    def rows_hint(self) -> int | None:
        """That of the wrapped source. Local."""
        return self.source.rows_hint()

    def bytes_hint(self) -> int | None:
        """That of the wrapped source. Local."""
        return self.source.bytes_hint()

    @property
    def bytes_read(self) -> int:
        """That of the wrapped source."""
        return self.source.bytes_read

    def block_rows(self, lo: int, hi: int) -> Array:
        """Rows of each block ``[lo, hi)``. Local."""
        return self.source.block_rows(lo, hi)
