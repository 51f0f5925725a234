"""The JSON that tells what a run did, made from plain values and written in one piece.

Keys of a run (see `summarise`): app, ranks, threads (of rank 0), iterations, outcome, residual,
result_sha256, reproducible, seconds, seconds_per_iteration, bytes_exchanged, bytes_read (of input files, by
all ranks), memory_bytes, scratch_bytes, checkpoints, recoveries, copies (both by rank 0), peak_rss_bytes,
values, versions, cpu. A key whose subject did not
take place is absent. It gathers nothing from other ranks: who calls it has done that.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from iterreduce.observe.jsonlines import plain


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest; empty for none.

    >>> spread([3.0, 1.0, 2.0])
    {'min': 1.0, 'median': 2.0, 'max': 3.0}
    """
    if not seconds:
        return {}
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}


def add_up(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum over ranks of numbers and of lists of numbers, by key.

    >>> add_up([{"total": 1, "per_iteration": [1, 2]}, {"total": 5, "per_iteration": [0, 3]}])
    {'total': 6, 'per_iteration': [1, 5]}
    """
    return {
        key: [sum(row) for row in zip(*(part[key] for part in parts), strict=True)]
        if isinstance(value, list)
        else sum(part[key] for part in parts)
        for key, value in parts[0].items()
    }


def most_held(parts: Sequence[Mapping[str, int]], apart: str = "\0") -> dict[str, int]:
    """Of each account the most that a rank held, largest first, behind the most that a rank held in all.

    Accounts whose names end in ``apart`` are no memory and do not count for that.

    >>> most_held([{"state s": 1, "source p": 5}, {"state s": 3, "source p": 4}])
    {'total': 7, 'source p': 5, 'state s': 3}
    """
    out: dict[str, int] = {}
    for name, nbytes in (item for part in parts for item in part.items()):
        out[name] = max(nbytes, out.get(name, 0))
    memory = [{name: n for name, n in part.items() if not name.endswith(apart)} for part in parts]
    total = max((sum(part.values()) for part in memory), default=0)
    return {"total": total, **dict(sorted(out.items(), key=lambda item: (-item[1], item[0])))}


def most_in_scratch(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What large arrays took on the rank that had most, in memory and in scratch files, and all bytes that
    ranks ever put into files.

    >>> most_in_scratch([dict(memory_peak=4, peak=9, total=9), dict(memory_peak=5, peak=0, total=2)])
    {'memory_peak': 5, 'peak': 9, 'total': 11}
    """
    most = {name: max(part[name] for part in parts) for name in ("memory_peak", "peak")}
    return most | {"total": sum(part["total"] for part in parts)}


def summarise(
    app: str, peak_rss_bytes: Sequence[int], libraries: Mapping[str, str], **run: Any
) -> dict[str, Any]:
    """The summary: `peak_rss_bytes` of every rank, more versions, and what the engine reports of the run.

    >>> summarise("kmeans", [100, 300], {"mpi": "none"}, iterations=3, residual=None)["peak_rss_bytes"]
    {'max': 300, 'sum': 400}
    """
    parts: dict[str, Any] = {"app": app, "ranks": len(peak_rss_bytes)}
    parts |= {key: value for key, value in run.items() if value is not None}
    parts["peak_rss_bytes"] = {"max": max(peak_rss_bytes), "sum": sum(peak_rss_bytes)}
    parts["versions"] = versions() | dict(libraries)
    parts["cpu"] = cpu()
    summary: dict[str, Any] = plain(parts)
    return summary


def versions() -> dict[str, str]:
    """Of Python and of the libraries that make the numbers."""
    found = {"python": platform.python_version()}
    for name in ("numpy", "numba", "h5py", "mpi4py"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cpu() -> dict[str, Any]:
    """Of this host: the model's name and how many cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": _cpu_model() or platform.machine(), "cores": cores}


def format_summary(summary: Mapping[str, Any]) -> str:
    """JSON with a line per value, and per list of numbers: one has an entry for every iteration.

    >>> print(format_summary({"bytes": {"per_iteration": [1, 2]}}), end="")
    {
      "bytes": {
        "per_iteration": [1, 2]
      }
    }
    """
    numbers = re.compile(r"\[([-+.\deE,\s]+)\]")
    return numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(summary, indent=2)) + "\n"


def write_summary(path: str, summary: Mapping[str, Any]) -> None:
    """Replace the file `path` in one step: nobody reads half a summary. OSError when that cannot be."""
    handle, draft = tempfile.mkstemp(prefix=".summary-", dir=os.path.dirname(path) or ".")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(format_summary(summary))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o666 & ~_umask())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(
                (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
            )
    except OSError:
        return ""
