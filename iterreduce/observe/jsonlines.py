"""Every event as one line of JSON, for programs that look on or look back.

    {"event": "iteration.commit", "seconds": 0.0132, "iteration": 3, "residual": 0.01, ...}

`seconds` counts from the first event. Lines are gathered and written once a second and at the end, because
formatting and writing each at once would cost more than a small iteration. The file grows while the run goes
on. Where it cannot be written (a full disk), that is said once and the run goes on without it.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from typing import Any, TextIO

from iterreduce.events import Event

FLUSH_SECONDS = 1.0


class JsonLines:
    """A watcher that writes to an open text `stream`; `close()` writes what is left.

    >>> import io
    >>> out = io.StringIO()
    >>> watch = JsonLines(out)
    >>> watch(Event("cache.hit", 5.0, {"what": "points", "bytes": 16}))
    >>> watch.close()
    >>> out.getvalue()
    '{"event": "cache.hit", "seconds": 0.0, "what": "points", "bytes": 16}\\n'
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: list[Event] = []
        self._start: float | None = None
        self._flushed = 0.0
        self._lost = False
        self._lock = threading.Lock()  # events come from the thread that writes checkpoints, too

    def __call__(self, event: Event) -> None:
        with self._lock:
            if self._start is None:
                self._start = self._flushed = event.seconds
            self._waiting.append(event)
            if event.name == "run.end" or event.seconds - self._flushed >= FLUSH_SECONDS:
                self._flushed = event.seconds
                self._flush()

    def close(self) -> None:
        """Write what is left; the stream stays open."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._lost:
            return
        try:
            self._stream.writelines(self._format(event) for event in waiting)
            self._stream.flush()
        except OSError as error:
            self._lost = True
            name = getattr(self._stream, "name", "")
            print(
                f"iterreduce: cannot write the events {name}: {error.strerror}; they end here, and the run "
                "goes on without them",
                file=sys.stderr,
            )

    def _format(self, event: Event) -> str:
        seconds = round(event.seconds - (self._start or 0.0), 6)
        return json.dumps({"event": event.name, "seconds": seconds} | plain(event.fields)) + "\n"


def plain(value: Any) -> Any:
    """The value as JSON knows it: NumPy scalars as Python's, no NaN or infinity, other objects as text.

    >>> plain({"residual": float("inf"), "bytes": (1, 2)})
    {'residual': 'inf', 'bytes': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
