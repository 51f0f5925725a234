"""HDF5 files as tables: datasets of one length, side by side, are columns.

``file.h5`` means its top level, ``file.h5:/path`` a group or one dataset there. What HDF5 itself can do
stands in `iterreduce.storage`; this module only says which columns make a table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from iterreduce.columns.batch import Batch
from iterreduce.columns.schema import Schema
from iterreduce.errors import InputError
from iterreduce.sources.asked import Bounds
from iterreduce.sources.files import Found
from iterreduce.storage import hdf5_columns, hdf5_rows

_WITH_PATH = re.compile(r"^(.*\.(?:h5|hdf5|hdf))(?::(/?[^:]*))?$", re.IGNORECASE | re.DOTALL)


def split_path(path: str) -> tuple[str, str]:
    """The file and the path inside it.

    >>> split_path("run.h5:/step/x"), split_path("run.h5")
    (('run.h5', '/step/x'), ('run.h5', '/'))
    """
    found = _WITH_PATH.match(path)
    if found is None:
        return path, "/"
    inside = found.group(2) or "/"
    return found.group(1), inside if inside.startswith("/") else "/" + inside


class Hdf5:
    """The datasets at one place of an HDF5 file, read by hyperslab."""

    masks, uses_bounds = True, False
    suffix: str = ".h5"
    suffixes: tuple[str, ...] = (".h5", ".hdf5", ".hdf")

    def __init__(self, inside: str = "/"):
        self.inside = inside

    def inspect(
        self, path: str, wanted: Sequence[str] | None = None, bounds: Bounds = (), glance: bool = False
    ) -> Found:
        """Fields and rows from the datasets' headers."""
        columns = hdf5_columns(path, self.inside, wanted)
        if len({c.rows for c in columns}) > 1:
            listed = ", ".join(f"{c.name} {c.rows}" for c in columns)
            raise InputError(
                f"{path}: datasets at {self.inside} must have one length; rows: {listed} "
                f"(or name one of them: {path}:{columns[0].dataset})"
            )
        return Found({c.name: c.field for c in columns}, columns[0].rows if columns else 0)

    def read(self, path: str, schema: Schema, lo: int, hi: int) -> tuple[Batch, int]:
        """Rows of the columns wanted."""
        found = {c.name: c for c in hdf5_columns(path, self.inside, tuple(schema))}
        batch, nbytes = hdf5_rows(path, [found[name] for name in schema], lo, hi)
        return batch.select(*schema), nbytes
