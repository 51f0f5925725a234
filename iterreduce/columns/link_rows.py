"""Edges that come in chunks and any order, written into rows by source: a counting sort without the counting.

How often each source comes must be known beforehand. What this is not: a way to find that out
(`iterreduce.columns.vertexcodes`), or to compute along edges (`iterreduce.columns.links`, the only caller).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from iterreduce.columns.jit import kernel
from iterreduce.columns.link_layout import Rows
from iterreduce.columns.ragged import Array
from iterreduce.errors import UsageError


@kernel
def _place(sources: Any, targets: Any, place: Any, n_targets: Any, out: Any) -> int:
    """Write a chunk's targets behind those that their sources have; the first row that does not fit, or how
    many there are. A source with too many edges is seen at the end, unless they leave the array."""
    n_sources, edges = np.uint64(len(place)), np.uint64(len(out))
    for i in range(len(sources)):
        s, t = np.uint64(sources[i]), np.uint64(targets[i])
        if s >= n_sources or t >= n_targets:
            return i
        at = np.uint64(place[s])
        if at >= edges:
            return i
        out[at] = t
        place[s] = at + np.uint64(1)
    return len(sources)


@kernel
def _places(sources: Any, place: Any, at: Any) -> None:
    """Where `_place` will write each row of a chunk, if all sources fit; ``place`` is left as it was."""
    for i in range(len(sources)):
        s = np.uint64(sources[i])
        if s < np.uint64(len(place)):
            at[i] = place[s]
            place[s] += 1
    for i in range(len(sources)):
        s = np.uint64(sources[i])
        if s < np.uint64(len(place)):
            place[s] -= 1


@kernel
def _write_column(column: Any, at: Any, out: Any) -> None:
    for i in range(len(at)):
        out[np.uint64(at[i])] = column[i]


class RowsBuilder:
    """Takes edges chunk by chunk, where it is known how many leave each source.

    ``out_degrees`` is an integer array of shape ``(n_sources,)``; ``columns`` gives the dtype of each edge
    column. Edges of a source stay in the order in which they came. Memory: what is built, 8 bytes per source,
    and a chunk.
    """

    def __init__(
        self,
        n_sources: int,
        n_targets: int,
        out_degrees: Array,
        columns: Mapping[str, np.dtype[Any]] | None = None,
    ) -> None:
        if len(out_degrees) != n_sources or not (0 <= n_targets < 2**31 and n_sources < 2**31):
            raise UsageError(
                f"links of {n_sources} sources, {len(out_degrees)} out-degrees, {n_targets} targets: "
                "wanted a degree per source, and fewer than 2^31 of both on a rank"
            )
        offsets = np.zeros(n_sources + 1, np.int64)
        np.cumsum(out_degrees, out=offsets[1:])
        edges = int(offsets[-1])
        data = {name: np.empty(edges, dtype) for name, dtype in (columns or {}).items()}
        self._rows = Rows(offsets, np.empty(edges, np.uint32), data, n_targets)
        self._place = offsets[:-1].copy()
        self._at = np.empty(0, np.int64)
        self._added = 0

    def add(self, sources: Array, targets: Array, columns: Mapping[str, Array] | None = None) -> None:
        """Take edges: integer arrays of shape ``(n,)``, with one array of that shape per edge column."""
        columns = columns or {}
        if {len(sources), len(targets), *map(len, columns.values())} != {len(sources)} or (
            columns.keys() != self._rows.columns.keys()
        ):
            raise UsageError(
                f"edges with {len(sources)} sources, {len(targets)} targets and columns "
                f"{ {n: len(c) for n, c in columns.items()} }: wanted equal lengths, columns "
                f"{list(self._rows.columns)}"
            )
        rows, at = self._rows, self._places(sources) if columns else None
        done = _place(sources, targets, self._place, np.uint64(rows.n_targets), rows.targets)
        if done < len(sources):
            raise UsageError(self._misfit(int(sources[done]), int(targets[done])))
        for name, column in columns.items():
            _write_column(column, at, rows.columns[name])
        self._added += done

    def _places(self, sources: Array) -> Array:
        if len(self._at) < len(sources):
            self._at = np.empty(len(sources), np.int64)
        at = self._at[: len(sources)]
        _places(sources, self._place, at)
        return at

    def _misfit(self, source: int, target: int) -> str:
        rows = self._rows
        if not 0 <= source < len(self._place) or not 0 <= target < rows.n_targets:
            return (
                f"edge {source} -> {target}: wanted a source below {len(self._place)} and a target below "
                f"{rows.n_targets}"
            )
        return f"source {source} has more edges than its out-degree says"

    def rows(self) -> Rows:
        """All edges by source; the builder is used up."""
        if self._added != len(self._rows.targets):
            raise UsageError(
                f"{self._added} edges came, out-degrees promised {len(self._rows.targets)}: add them all"
            )
        differ = np.flatnonzero(self._place != self._rows.offsets[1:])
        if len(differ):
            raise UsageError(f"source {differ[0]} has not as many edges as its out-degree says")
        return self._rows
