"""What happens in a run, told to whoever wants to know.

The engine emits, watchers listen: the progress line, the JSON lines file, tests, fault points. An event has a
name out of `EVENTS` and a few plain fields. Watchers are called at once, on the thread that emits, one after
another: an event is also a place in the program, and a fault kit may stop the program there on purpose.

Some events are no news to anybody but mark where a program can be struck (`PLACES`). They are emitted only
while a watcher has asked for them.

This is no log and no metric: nothing is formatted, stored or sent here, and with no watcher an `emit` costs a
test of an empty list. In a hot place guard the fields as well: `if events.active: events.emit(...)`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

#: Every event: its fields and what it says. `bytes` are those of this rank that went to other ranks.
EVENTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "run.start": (("name", "rank", "size", "max_iterations"), "the work is known, nothing is read yet"),
    "load": (
        ("name", "rows", "bytes", "bytes_read", "seconds"),
        "this rank's share of one source is in memory; bytes_read: of its files, by this rank",
    ),
    "iteration.start": (("iteration", "path"), "numbered from 1; the path is that of its commit"),
    "stage.start": (("stage", "iteration"), "one stage of a superstep begins"),
    "stage.end": (
        ("stage", "iteration", "seconds", "bytes", "rows"),
        "the stage is done on this rank, which has so many rows of its result",
    ),
    "exchange.ready": (
        ("stage", "iteration"),
        "this rank has folded and packed what it sends; next it meets the others",
    ),
    "exchange.done": (("stage", "iteration"), "what others sent is here, and nothing is made of it yet"),
    "control.ready": (
        ("iteration", "path"),
        "the iteration's work is done on this rank; next is the control reduction",
    ),
    "commit.start": (("iteration", "path"), "all ranks have agreed to commit, and no table is swapped yet"),
    "iteration.commit": (
        ("iteration", "residual", "seconds", "bytes", "invariant_bytes", "path"),
        "the writes of the iteration are visible; the residual is the same on all ranks, or None; the path "
        "is (3,), or (3, 5) for the fifth iteration of an inner loop after three of the outer",
    ),
    "iteration.rollback": (("iteration", "reason", "path"), "nothing of the iteration stays"),
    "loop.end": (
        ("name", "path", "outcome", "iterations", "residual"),
        "an inner loop has ended; its result is bound in the next iteration to be committed",
    ),
    "cache.hit": (("what", "bytes"), "an invariant was found"),
    "cache.miss": (("what",), "an invariant has to be made"),
    "cache.evict": (("what", "bytes"), "agreed by all ranks"),
    "replan": (("stage", "iteration", "reason"), "an exchange is repeated with a fresh plan"),
    "checkpoint.start": (
        ("number", "iteration", "path"),
        "all ranks have agreed to save, and nothing is copied yet",
    ),
    "checkpoint.copy": (
        ("number", "iteration", "path", "bytes", "seconds"),
        "this rank's share of the state is copied, and its write begins behind the iterations; "
        "seconds: how long the iterations waited",
    ),
    "checkpoint.step": (
        ("number", "step"),
        "a write got this far on this rank; may come from the thread that writes",
    ),
    "checkpoint.published": (
        ("number", "iteration", "seconds", "bytes"),
        "all ranks' shares are on disk under their name; seconds from the copy to that",
    ),
    "checkpoint.failed": (("number", "reason"), "it was given up, and the job goes on without"),
    "restart.start": (("number",), "a checkpoint is found whole, and no state is replaced yet"),
    "restart.anew": (
        ("attempts",),
        "the attempts before this one ended before they had saved anything: the job begins anew",
    ),
    "restart": (
        ("number", "iteration", "path", "ranks", "seconds"),
        "the loop goes on from this checkpoint, which that many ranks had written",
    ),
    "rank.lost": (
        ("lost", "survivors"),
        "ranks have died, by the numbers that they had; the others have agreed on it and are a group again",
    ),
    "recovery.start": (("lost", "commits"), "the run makes itself anew on the ranks that are left"),
    "recovery.end": (
        ("lost", "survivors", "origin", "iteration", "recomputed", "seconds", "read"),
        "it goes on from this iteration: its state was in memory, in a checkpoint, or made from the start; "
        "recomputed: transactions to be done again; seconds: by part; read: what all survivors together read "
        "again of the sources, and rows that they did not need to",
    ),
    "recovery.nocopies": ((), "a rank has no memory for copies of the state: none are made any more"),
    "run.end": (("outcome", "iterations", "residual", "seconds"), "outcome is None when the run failed"),
}

#: Events that are emitted only while a watcher wants them: places to strike, inside what other events span.
PLACES = frozenset(
    {
        "exchange.ready",
        "exchange.done",
        "control.ready",
        "commit.start",
        "checkpoint.start",
        "restart.start",
    }
)


class Event(NamedTuple):
    """One thing that happened.

    `seconds` is `time.perf_counter()` of this process: only differences mean something.
    """

    name: str
    seconds: float
    fields: Mapping[str, Any]


Watcher = Callable[[Event], None]
_event, _now = tuple.__new__, time.perf_counter  # Event(...) itself costs twice as much


class Events:
    """The watchers of one run on one rank.

    >>> events = Events()
    >>> events.active
    False
    >>> seen = []
    >>> stop = events.subscribe(lambda event: seen.append((event.name, event.fields["iteration"])))
    >>> events.emit("iteration.start", iteration=1)
    >>> stop()
    >>> events.emit("iteration.start", iteration=2)
    >>> seen
    [('iteration.start', 1)]
    """

    __slots__ = ("_fragile", "_placed", "active", "places", "watchers")

    def __init__(self) -> None:
        self.active = self.places = False
        self.watchers: list[Watcher] = []
        self._fragile: set[Watcher] = set()
        self._placed: set[Watcher] = set()

    def subscribe(
        self, watcher: Watcher, may_raise: bool = False, places: bool = False
    ) -> Callable[[], None]:
        """Call `watcher(event)` for every event from now on; returns a function that ends it.

        An exception of a watcher is written to standard error once and the watcher is dropped: who looks on
        must not break a run. With `may_raise` it passes through `emit` into the engine instead, as a fault of
        that place in the program. With `places` the events of `PLACES` are emitted as well, to all watchers.
        """
        self.watchers = [*self.watchers, watcher]
        if not may_raise:
            self._fragile.add(watcher)
        if places:
            self._placed.add(watcher)
        self.active, self.places = True, bool(self._placed)

        def stop() -> None:
            self._drop(watcher)

        return stop

    def emit(self, name: str, /, **fields: Any) -> None:
        """Tell all watchers, in the order in which they subscribed."""
        if not self.active:
            return
        event = _event(Event, (name, _now(), fields))
        for watcher in self.watchers:
            try:
                watcher(event)
            except Exception as error:
                if watcher not in self._fragile:
                    raise
                self._give_up(watcher, event, error)

    def _give_up(self, watcher: Watcher, event: Event, error: Exception) -> None:
        self._drop(watcher)
        print(
            f"iterreduce: a watcher failed at {event.name} and is not called again: "
            f"{type(error).__name__}: {error}",
            file=sys.stderr,
        )

    def _drop(self, watcher: Watcher) -> None:
        # a new list: the old one may be in the middle of an `emit`
        self.watchers = [other for other in self.watchers if other is not watcher]
        self._fragile.discard(watcher)
        self._placed.discard(watcher)
        self.active, self.places = bool(self.watchers), bool(self._placed)


def emit_iteration(events: Events, iteration: int, path: tuple[int, ...]) -> None:
    """Tell that an iteration begins."""
    events.emit("iteration.start", iteration=iteration, path=path)


def emit_place(events: Events, name: str, iteration: int, path: tuple[int, ...]) -> None:
    """Tell that this rank stands at a place of an iteration."""
    events.emit(name, iteration=iteration, path=path)
