"""What tests of lazy apps share: an app on graphs of all kinds, dealt to ranks."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.collectives import Group
from iterreduce.testing import run_ranks
from tests.launch import ROOT
from tests.waist.kit import dealt


@cache
def app(name: str) -> Any:
    """The function marked `@ir.app` in a file of ``apps``."""
    return load_app(str(ROOT / "apps" / f"{name}.py")).function


def verify(name: str, *args: Any, **options: Any) -> Any:
    """What the app's own verifier says."""
    return app(name).__globals__["verify"](*args, **options)


def solved(
    name: str, ranks: int, *args: Any, run: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, ir.Batch]:
    """The result of rank 0, and the rows of all ranks; ``run``: options of the run."""

    def job(group: Group) -> Any:
        given = [dealt(value, group) for value in args]
        made = app(name)(*given, **{k: dealt(v, group) for k, v in options.items()})
        return made.run(group, **(run or {}))

    results = run_ranks(ranks, job)
    if results[0].everywhere:
        return results[0], results[0].batch
    return results[0], ir.Batch.concat([r.batch for r in results])


def read(
    name: str, ranks: int, *files: Path, run: dict[str, Any], pause_seconds: float = 0, **options: Any
) -> Any:
    """The result of rank 0 of an app on files; each iteration may be followed by a pause."""

    def job(group: Group) -> Any:
        events = ir.Events()
        if pause_seconds:
            events.subscribe(lambda event: time.sleep(pause_seconds * (event.name == "iteration.start")))
        made = app(name)(*(ir.read(str(f)) for f in files), **options)
        return made.run(group, events, **run)

    return run_ranks(ranks, job)[0]
