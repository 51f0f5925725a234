"""The positions that a driver of its own was given: what it is answered when it is started again.

They are kept as columns that grow at their end, some forty bytes for each, and saved as a table beside the
states, so that a checkpoint of a loop of many iterations copies them and does not spell them out. It knows
nothing of files: a forged table is a `CheckpointError`, and which positions are kept decides who appends.

Who speaks to it: `iterreduce.lasting`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from iterreduce.columns.batch import Batch
from iterreduce.columns.ragged import Ragged
from iterreduce.errors import CheckpointError
from iterreduce.levels import Position

#: Of the table: a residual counts where it was ``measured``, ``loops`` is a number in the list of names.
COLUMNS = "iteration int64, residual float64, measured bool, loops int64, path list of int64"


class Journal:
    """Positions in the order in which they were given.

    >>> journal = Journal()
    >>> journal.append(Position(1, None, (1,), ("outer",)))
    >>> journal.append(Position(2, 0.1, (1, 1), ("outer", "inner")))
    >>> again = Journal.of(journal.rows(), journal.names)
    >>> len(again), list(again.positions(1))
    (2, [Position(iteration=2, residual=0.1, path=(1, 1), loops=('outer', 'inner'))])
    """

    def __init__(self) -> None:
        self._iterations, self._loops, self._paths = array("q"), array("q"), array("q")
        self._residuals, self._measured, self._ends = array("d"), array("b"), array("q", [0])
        self._numbers: dict[tuple[str, ...], int] = {}

    def __len__(self) -> int:
        return len(self._iterations)

    @property
    def names(self) -> list[list[str]]:
        """The names of the loops, by their number in the table."""
        return [list(names) for names in self._numbers]

    def append(self, at: Position) -> None:
        """One more."""
        self._iterations.append(at.iteration)
        self._residuals.append(0.0 if at.residual is None else at.residual)
        self._measured.append(at.residual is not None)
        self._loops.append(self._numbers.setdefault(at.loops, len(self._numbers)))
        self._paths.extend(at.path)
        self._ends.append(len(self._paths))

    def rows(self) -> Batch:
        """As a table with the columns `COLUMNS`: copies, as more may be appended meanwhile."""
        return Batch(
            iteration=np.array(self._iterations, np.int64),
            residual=np.array(self._residuals, np.float64),
            measured=np.array(self._measured, np.bool_),
            loops=np.array(self._loops, np.int64),
            path=Ragged(np.array(self._ends, np.int64), np.array(self._paths, np.int64), "list"),
        )

    @classmethod
    def of(cls, rows: Batch, names: Sequence[Sequence[str]]) -> Journal:
        """Out of such a table. Raises `CheckpointError` for what no journal wrote."""
        path, made = rows["path"], cls()
        low, high = rows["loops"].min(initial=0), rows["loops"].max(initial=-1)
        made._numbers = {tuple(loops): number for number, loops in enumerate(names)}
        if low < 0 or high >= len(names) or len(made._numbers) < len(names):
            raise CheckpointError("the positions that were saved are of loops that are not named")
        made._iterations.frombytes(rows["iteration"].tobytes())
        made._residuals.frombytes(rows["residual"].tobytes())
        made._measured.frombytes(rows["measured"].tobytes())
        made._loops.frombytes(rows["loops"].tobytes())
        made._ends.frombytes((path.offsets[1:] - path.offsets[0]).tobytes())
        made._paths.frombytes(path.values[path.offsets[0] : path.offsets[-1]].tobytes())
        return made

    def until(self, n: int) -> Journal:
        """The first ``n``."""
        return Journal.of(self.rows().slice(0, n), self.names)

    def positions(self, first: int) -> Iterator[Position]:
        """Those from number ``first`` on."""
        names = list(self._numbers)
        for i in range(first, len(self)):
            residual = self._residuals[i] if self._measured[i] else None
            path = tuple(self._paths[self._ends[i] : self._ends[i + 1]])
            yield Position(self._iterations[i], residual, path, names[self._loops[i]])
