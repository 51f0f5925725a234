"""Rows whose columns nobody can name: what is wrong with a file beneath them comes before any complaint.

A source that does not say which columns it has (`Source.peek` gives None) cannot be opened, as a rule: there
is no such file, or it holds something else. So where a name is asked for, sources like that are opened by
this rank alone, for the error that every rank would get when the plan runs. Who speaks to it: makers of nodes
and the handle, before they say that columns are not known.
"""

from __future__ import annotations

import copy

from iterreduce.group import SoloGroup
from iterreduce.plan.nodes import Node, Source, walk


def tell_broken(*roots: Node) -> None:
    """Raise the error of the first source beneath that has no names because it cannot be opened. Local.

    Nothing is touched where all sources have names, nor a source that was never asked (one without `peek`).
    """
    for node in walk(*roots):
        if isinstance(node, Source) and node.fields is None and hasattr(node.source, "peek"):
            copy.copy(node.source).open(SoloGroup())
