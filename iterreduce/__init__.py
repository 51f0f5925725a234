"""iterreduce: iterative MapReduce on MPI ranks and NumPy buffers.

    import iterreduce as ir

Names are loaded when they are first used, so that ``--help`` costs neither Numba nor MPI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from iterreduce.version import __version__

if TYPE_CHECKING:
    from iterreduce.application import app as app
    from iterreduce.collectives import Group as Group
    from iterreduce.columns.batch import Batch as Batch
    from iterreduce.dataset import Dataset as Dataset
    from iterreduce.frontends.mapreduce import MapReduce as MapReduce
    from iterreduce.loop import Loop as Loop

INT64_MAX = 2**63 - 1

_AGGREGATORS = (
    "SUM",
    "MIN",
    "MAX",
    "COUNT",
    "MEAN",
    "VAR",
    "ANY",
    "ALL",
    "FIRST",
    "LAST",
    "COLLECT",
    "Aggregator",
)
_AGGREGATOR_MAKERS = ("count", "mean", "var", "first", "last", "collect", "argmin", "argmax")
_WHERE = {
    "iterreduce.application": ("app",),
    "iterreduce.collectives": ("Group",),
    "iterreduce.columns.aggregators": (*_AGGREGATORS, *_AGGREGATOR_MAKERS),
    "iterreduce.columns.batch": ("Batch",),
    "iterreduce.columns.expressions": (
        "Expr", "Parameter", "coalesce", "col", "lit", "maximum", "minimum", "when", "where",
    ),
    "iterreduce.columns.groups": ("Groups",),
    "iterreduce.columns.nearest": ("nearest",),
    "iterreduce.columns.ragged": ("Ragged",),
    "iterreduce.dataset": ("Dataset", "Inputs", "iterate", "iterate_changes"),
    "iterreduce.levels": ("Position",),
    "iterreduce.recovery": ("LoopRun",),
    "iterreduce.errors": (
        "CheckpointError", "CheckpointWarning", "DisagreementError", "FinishedError", "InputError",
        "IterReduceError", "LaunchError", "MemoryBudgetError", "RanksLost",
        "OtherJobError", "OutputError", "ScheduleError", "SchemaError", "ScratchError", "ScratchWarning",
        "StageError", "UsageError", "UserCodeError",
    ),
    "iterreduce.events": ("Events",),
    "iterreduce.fixpoint": (
        "CarryRule", "Distance", "Empty", "MaxIterations", "NoneActive", "Outcome", "Predicate", "Unchanged",
        "Until", "carry", "changed", "distance", "l1", "l2", "linf",
    ),
    "iterreduce.frontends.mapreduce": ("MapReduce",),
    "iterreduce.loop": (
        "Accumulate", "Bounded", "Carry", "Context", "Gather", "Index", "Insert", "Joined", "Kernel", "Local",
        "Lookup", "Loop", "Number", "Patch", "Remove", "Replace", "Shuffle", "Sink", "Splitters", "State",
        "Superstep", "Synchronous", "Total",
    ),
    "iterreduce.options": ("Options",),
    "iterreduce.run": ("Output", "Result"),
    "iterreduce.sources": ("RowWriter", "write_text_blocks"),
}  # fmt: skip
_NAMES = {name: module for module, names in _WHERE.items() for name in names}
# names of Python's own functions stand with an underscore where they are defined
_RENAMED = {name: f"{name}_" for name in ("sum", "min", "max", "any", "all")}

__all__ = ["INT64_MAX", "__version__", "columns", "random", "read", "read_edges", *_NAMES, *_RENAMED]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _RENAMED:
        value = getattr(importlib.import_module("iterreduce.columns.aggregators"), _RENAMED[name])
    elif name == "read":
        value = importlib.import_module("iterreduce.dataset").Dataset.read
    elif name == "read_edges":
        value = importlib.import_module("iterreduce.dataset").Dataset.read_edges
    elif name == "random":
        value = importlib.import_module("iterreduce.columns.random")
    else:
        raise AttributeError(f"module 'iterreduce' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
