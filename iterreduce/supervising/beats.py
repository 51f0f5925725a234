"""Whether ranks get on: what their beats say, and since when each says the same.

Only this process's clock counts: other hosts' clocks may differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from iterreduce.supervising import places
from iterreduce.supervising.witnesses import GONE

#: A process whose beat stands still for so many of its pauses is stopped, dead, or on a host that is.
SILENT_PAUSES = 5
#: Before the first event ranks load the app and meet, which has limits of its own.
STARTING_SECONDS = 180.0


@dataclass
class _Pulse:
    said: dict[str, Any] = field(default_factory=dict)
    beat_since: float = 0.0
    event_since: float = 0.0


class Beats:
    """The beats of one attempt's ranks."""

    def __init__(self, directory: str, ranks: int, pause: float) -> None:
        self.directory, self.pause = directory, pause
        now = time.monotonic()
        self._pulses = {rank: _Pulse({}, now, now) for rank in range(ranks)}
        self._gone: dict[int, _Pulse] = {}
        self._coming: list[int] = []
        self.witnessed: set[int] = set()  # that are gone, on other hosts

    def look(self) -> None:
        """Read what ranks say now."""
        now = time.monotonic()
        for rank in self._coming:
            self._read(rank)
        for rank, pulse in self._pulses.items():
            said = self._read(rank)
            if said and said.get("beat") != pulse.said.get("beat"):
                pulse.beat_since = now
                if said.get("events") != pulse.said.get("events"):
                    pulse.event_since = now
                pulse.said = said

    def _read(self, rank: int) -> dict[str, Any]:
        said = places.read(self.directory, f"beat-{rank}")
        if said.get(GONE):
            self.witnessed.add(rank)
        return said

    def await_(self, ranks: Iterable[int]) -> None:
        """These are being started: they do not beat, but may be gone."""
        self._coming = [rank for rank in ranks if rank not in self._pulses]

    def forget(self, ranks: Iterable[int]) -> None:
        """These are gone; the others begin anew to get on."""
        for rank in ranks:
            self._gone[rank] = self._pulses.pop(rank, _Pulse())
        now = time.monotonic()
        for pulse in self._pulses.values():
            pulse.beat_since = pulse.event_since = now

    def expect(self, ranks: Iterable[int]) -> None:
        """These have come since."""
        now = time.monotonic()
        self._pulses |= {rank: _Pulse({}, now, now) for rank in ranks}

    @property
    def path(self) -> tuple[int, ...]:
        """How far the farthest rank is."""
        pulses = [*self._pulses.values(), *self._gone.values()]
        return max((tuple(pulse.said.get("path", ())) for pulse in pulses), default=())

    def path_of(self, rank: int) -> tuple[int, ...]:
        """How far this rank was at its last beat."""
        return tuple(self._pulse(rank).said.get("path", ()))

    def _pulse(self, rank: int) -> _Pulse:
        return self._pulses.get(rank) or self._gone.get(rank) or _Pulse()

    def is_still(self, seconds: float) -> bool:
        """Whether no rank had an event for so long; once all have run, whether one has been silent for so
        long.
        """
        pulses, now = self._pulses.values(), time.monotonic()
        if all(pulse.said.get("ran") for pulse in pulses):
            return now - min(pulse.beat_since for pulse in pulses) > seconds
        if not any(pulse.said.get("events") for pulse in pulses):
            seconds = max(seconds, STARTING_SECONDS)
        return now - max(pulse.event_since for pulse in pulses) > seconds

    @property
    def silent(self) -> list[int]:
        """Ranks that beat once and do not any more."""
        long_ago = time.monotonic() - SILENT_PAUSES * self.pause
        return [rank for rank, pulse in self._pulses.items() if pulse.said and pulse.beat_since < long_ago]

    def describe(self, ranks: list[int], most: int = 4) -> str:
        """What these ranks did last."""
        told = [self._describe(rank) for rank in ranks[:most]]
        return "; ".join(told) + (f"; and {len(ranks) - most} more" if len(ranks) > most else "")

    def _describe(self, rank: int) -> str:
        said = self._pulse(rank).said
        path = ".".join(map(str, said.get("path", ())))
        return f"rank {rank}: {said.get('what', 'has not come')}" + (f", iteration {path}" if path else "")
