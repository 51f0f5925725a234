"""CSV and TSV as they are written: what `csv.py` reads back to the same rows.

Two things do not come back: bools return as 1 and 0, and text returns as numbers if every row is a numeral.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Array, Ragged
from iterreduce.columns.schema import Field, Schema
from iterreduce.errors import OutputError

# Rows turned into text at a time.
TEXT_ROWS = 1 << 16


class CsvOutput:
    """A header and one line per row. Floats are written so that reading gives the same bits."""

    def __init__(self, temporary: str, path: str, schema: Schema, delimiter: str):
        self.passes = [tuple(schema)]
        self._delimiter = delimiter
        lists = [name for name, field in schema.items() if field.kind == "list"]
        if lists:
            raise OutputError(
                f'{path}: column "{lists[0]}" holds lists, which {path[-4:]} cannot; write .h5 or .parquet'
            )
        names = [cell for name, field in schema.items() for cell in header_cells(name, field)]
        self._blank = "" if len(names) > 1 else " "  # an empty line is no row, a blank one is
        self._file = open(temporary, "wb")  # noqa: SIM115 (closed by close)
        self._line(delimiter.join(quoted(names, delimiter)) + "\n")

    def _line(self, text: str) -> None:
        self._file.write(text.encode("utf-8", errors="surrogateescape"))

    def write(self, batch: Batch) -> None:
        """The next rows."""
        for lo in range(0, len(batch), TEXT_ROWS):
            part = batch.slice(lo, lo + TEXT_ROWS)
            columns = [cells for name in part.names for cells in self._cells(part, name)]
            self._line("".join(self._delimiter.join(row) + "\n" for row in zip(*columns, strict=True)))

    def _cells(self, batch: Batch, name: str) -> Iterator[list[str]]:
        valid = batch.valid(name)
        for cells in column_cells(batch[name], self._delimiter):
            if valid is not None:
                for row in np.flatnonzero(~valid).tolist():
                    cells[row] = self._blank
            yield cells

    def close(self) -> None:
        """Done."""
        self._file.close()

    abandon = close


def header_cells(name: str, field: Field) -> list[str]:
    """The column's names in the header: ``x[0]``, ``x[1]`` for vectors.

    >>> header_cells("x", Field("fixed", np.dtype(float), (2,)))
    ['x[0]', 'x[1]']
    """
    if not field.shape:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*field.shape)]


def column_cells(column: Any, delimiter: str) -> Iterator[list[str]]:
    """The cells of each column of text that a column of a batch makes."""
    if isinstance(column, Ragged):
        yield quoted(Ragged(column.offsets, column.values, "text").to_list(), delimiter)
        return
    flat = column.reshape(len(column), int(np.prod(column.shape[1:], dtype=np.int64)))
    for i in range(flat.shape[1]):
        yield numerals(flat[:, i])


def numerals(values: Array) -> list[str]:
    """Numbers as text that reads back to the same bits; bools as 1 and 0, dates as ISO 8601."""
    if values.dtype.kind == "b":
        values = values.astype(np.int8)
    if values.dtype.kind in "mM" or (values.dtype.kind in "fc" and values.dtype.itemsize < 8):
        return [str(value) for value in values]
    return list(map(repr, values.tolist()))


def quoted(cells: Iterable[str], delimiter: str) -> list[str]:
    """Cells in quotes where they need them: those that are empty or hold a delimiter, quote, line end or
    outer blank.

    >>> quoted(["to", "a,b", 'q"', ""], ",")
    ['to', '"a,b"', '"q""\"', '""']
    """
    special = {delimiter, '"', "\n", "\r"}
    return [
        f'"{c.replace(chr(34), chr(34) * 2)}"'
        if not c or c.strip(" \t") != c or not special.isdisjoint(c)
        else c
        for c in cells
    ]
