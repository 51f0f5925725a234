"""What a person sees while a loop runs: iteration, residual, bytes moved, time and invariant memory.

A live line on a terminal, plain lines at most every few seconds elsewhere. Watches one rank: who makes it
decides which (the command line: rank 0). Writes nothing when nothing happens, so a long iteration is silent.
"""

from __future__ import annotations

import math
from typing import Any, TextIO

from iterreduce.events import Event

LIVE_SECONDS = 0.1
PLAIN_SECONDS = 5.0


class Progress:
    """A watcher that writes to `stream`; live when it is a terminal.

    >>> import sys
    >>> watch = Progress(sys.stdout)
    >>> done = {"iteration": 1, "residual": 0.5, "seconds": 0.25, "bytes": 2048}
    >>> watch(Event("iteration.commit", 0.0, done))
    iteration 1  residual 0.5  sent 2.0 KiB  0.25 s
    >>> end = {"outcome": "CONVERGED", "iterations": 2, "residual": 0.1, "seconds": 0.4}
    >>> watch(Event("run.end", 1.0, end))
    converged after 2 iterations, residual 0.1, 0.4 s
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._pause = LIVE_SECONDS if self._live else PLAIN_SECONDS
        self._next = -math.inf
        self._open_line = False
        self._nan_since = ""  # the iteration from which on residuals were not a number

    def __call__(self, event: Event) -> None:
        if event.name == "iteration.commit":
            self._watch_for_nan(event.fields)
            if event.seconds >= self._next:
                self._next = event.seconds + self._pause
                self._write(_line(event.fields), last=False)
        elif event.name == "restart.anew":
            self._write("nothing was saved before the last attempt ended: begins anew", last=True)
        elif event.name == "restart":
            self._write(_restart_line(event.fields), last=True)
        elif event.name == "recovery.end":
            self._write(_recovery_line(event.fields), last=True)
        elif event.name == "run.end":
            self._write(_last_line(event.fields) + self._note_on_nan(event.fields), last=True)

    def _watch_for_nan(self, fields: Any) -> None:
        if not _is_nan(fields.get("residual")):
            self._nan_since = ""
        elif not self._nan_since:
            self._nan_since = _iteration(fields)

    def _note_on_nan(self, fields: Any) -> str:
        if not (self._nan_since and _is_nan(fields.get("residual"))):
            return ""
        return f" (not a number since iteration {self._nan_since}, so no distance could end the loop)"

    def note(self, text: str) -> None:
        """A line of its own between the others."""
        self._write(text, last=True)

    def close(self) -> None:
        """Leave the live line, so that what comes next starts on a line of its own."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False

    def _write(self, text: str, last: bool) -> None:
        if self._live:
            self._stream.write(f"\r{text}\x1b[K")
            self._open_line = True
            if last:
                self.close()
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def _line(fields: Any) -> str:
    parts = [f"iteration {_iteration(fields)}"]
    if fields.get("residual") is not None:
        parts.append(f"residual {fields['residual']:.6g}")
    if fields.get("bytes") is not None:
        parts.append(f"sent {_size(fields['bytes'])}")
    if fields.get("seconds") is not None:
        parts.append(f"{fields['seconds']:.3g} s")
    if fields.get("invariant_bytes"):
        parts.append(f"invariants {_size(fields['invariant_bytes'])}")
    return "  ".join(parts)


def _restart_line(fields: Any) -> str:
    ranks = f"{fields['ranks']} rank{'' if fields['ranks'] == 1 else 's'}"
    return f"goes on after iteration {fields['iteration']}, saved by {ranks} (checkpoint {fields['number']})"


def _recovery_line(fields: Any) -> str:
    """What was lost, and from where the others go on.

    >>> fields = {"lost": (2,), "survivors": 3, "origin": "memory", "iteration": 7}
    >>> _recovery_line({**fields, "seconds": {"total": 0.25}})
    'rank 2 has died; 3 ranks go on after iteration 7, from memory (0.25 s)'
    """
    lost, left = fields["lost"], fields["survivors"]
    if not lost:
        who = "ranks have"
    else:
        who = f"rank {lost[0]} has" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} have"
    origin = {"memory": "from memory", "checkpoint": "from a checkpoint"}.get(
        fields["origin"], "from the start"
    )
    ranks = "1 rank goes" if left == 1 else f"{left} ranks go"
    seconds = fields["seconds"]["total"]
    return f"{who} died; {ranks} on after iteration {fields['iteration']}, {origin} ({seconds:.2g} s)"


def _iteration(fields: Any) -> str:
    return ".".join(map(str, fields.get("path", ()))) or str(fields["iteration"])


def _is_nan(residual: float | None) -> bool:
    return residual is not None and math.isnan(residual)


def _last_line(fields: Any) -> str:
    outcome = str(fields.get("outcome") or "failed").lower().replace("_", " ")
    iterations = fields.get("iterations") or 0
    parts = [f"{outcome} after {iterations} iteration{'' if iterations == 1 else 's'}"]
    if fields.get("residual") is not None:
        parts.append(f"residual {fields['residual']:.6g}")
    if fields.get("seconds") is not None:
        parts.append(f"{fields['seconds']:.3g} s")
    return ", ".join(parts)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
