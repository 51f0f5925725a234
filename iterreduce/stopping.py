"""The wish to stop: a flag that a signal or a time limit raises and the engine reads once per iteration.

Setting it is all that a signal handler does. The engine proposes it in the next control reduction; then all
ranks stop alike, after the same iteration, and save. One rank's wish is enough.
"""

from __future__ import annotations

import time


class StopRequest:
    """Whether, why and until when a run should stop. Any thread, and a signal handler, may call `request`.

    ``deadline``: the `time.perf_counter` at which the run must be over, saving included; rank 0's counts.

    >>> stop = StopRequest()
    >>> stop.request("SIGTERM")
    >>> stop.reason
    'SIGTERM'
    """

    def __init__(self, limit_seconds: float | None = None, started: float | None = None) -> None:
        self.reason = ""
        now = time.perf_counter() if started is None else started
        self.deadline = None if limit_seconds is None else now + limit_seconds

    def request(self, reason: str) -> None:
        """Stop after the iteration under way; the first reason stays."""
        self.reason = self.reason or reason
