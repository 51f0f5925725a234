from __future__ import annotations
from collections.abc import Sequence
from iterreduce.supervising.processes import sweep


def doctor(arguments: Sequence[str]) -> int:
    sweep(0.0)
    return 0
