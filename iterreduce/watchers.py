"""Who looks on at a run of the command line: progress, the file of events, the supervisor, warnings.

Progress and events are rank 0's. Where ranks die that may become another process: it goes on with the file
behind the last whole line.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from iterreduce.collectives import Group
from iterreduce.errors import CheckpointWarning, ScratchWarning
from iterreduce.events import Event, Events
from iterreduce.launch import say
from iterreduce.options import Options
from iterreduce.supervising import vitals

LONG_SECONDS = 2.0
COMPILING = "compiling for this kind of input, once on each machine"


@contextlib.contextmanager
def watching(events: Events, options: Options, group: Group) -> Iterator[None]:
    """The watchers of rank 0, whoever that is, and those of every rank, for the time of the run."""
    with contextlib.ExitStack() as stack:
        supervised = vitals.current()
        if supervised is not None:
            stack.callback(events.subscribe(supervised))
        if group.rank == 0:
            _first(stack, events, options, takes_over=group.epoch > 0)
        elif group.heals:
            stack.callback(events.subscribe(_Heir(stack, events, options, group)))
        yield


class _Heir:
    """Becomes rank 0 when all before it are lost."""

    def __init__(self, stack: contextlib.ExitStack, events: Events, options: Options, group: Group) -> None:
        self._stack, self._events, self._options, self._group = stack, events, options, group
        self._waits = True

    def __call__(self, event: Event) -> None:
        if self._waits and event.name == "rank.lost" and self._group.rank == 0:
            self._waits = False
            for watcher in _first(self._stack, self._events, self._options, takes_over=True):
                watcher(event)


def _first(
    stack: contextlib.ExitStack, events: Events, options: Options, takes_over: bool = False
) -> list[Any]:
    """Those of rank 0."""
    made: list[Any] = []
    if not options.quiet:
        from iterreduce.columns.jit import when_compiling_takes
        from iterreduce.observe.progress import Progress

        progress = Progress(sys.stderr)
        stack.enter_context(when_compiling_takes(LONG_SECONDS, lambda: progress.note(COMPILING)))
        made.append(progress)
    if options.events is not None:
        from iterreduce.observe.jsonlines import JsonLines

        if takes_over:
            _cut_torn_line(options.events)
        # The name is opened now: whoever follows the file sees it grow.
        stream = open(options.events, "a" if takes_over else "w", encoding="utf-8")  # noqa: SIM115
        stack.callback(_close, stream)
        made.append(JsonLines(stream))
    for watcher in made:
        stack.callback(watcher.close)
        stack.callback(events.subscribe(watcher))
    return made


def _close(stream: TextIO) -> None:
    """What could not be written has been said."""
    with contextlib.suppress(OSError):
        stream.close()


def _cut_torn_line(path: str) -> None:
    """What a rank wrote when it died may end anywhere."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        os.truncate(path, file.read().rfind(b"\n") + 1)


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """Warnings about checkpoints, and about the scratch directory, are messages of ours, each time."""
    ours = CheckpointWarning, ScratchWarning
    with warnings.catch_warnings():
        for category in ours:
            warnings.simplefilter("always", category)
        show = warnings.showwarning

        def tell(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ours):
                say(f"iterreduce: warning: {message}")
            else:
                show(message, category, *where, **more)

        warnings.showwarning = tell
        yield
