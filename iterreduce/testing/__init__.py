"""What tests of loops need, for this package and for its users: ranks as threads of one process, faults."""

from __future__ import annotations

from iterreduce.testing.deaths import Death, RankDied
from iterreduce.testing.faults import (
    Delay,
    DeleteFile,
    FailCall,
    FailRename,
    Fault,
    Faults,
    FillDisk,
    FlipBit,
    Kill,
    LimitFileSize,
    Raise,
    Slow,
    Stop,
    TearFile,
)
from iterreduce.testing.strikes import damage, striking
from iterreduce.testing.threads import Died, RanksTimedOut, ThreadGroup, ThreadRanksBroken, run_ranks

__all__ = [
    "Death",
    "Delay",
    "DeleteFile",
    "Died",
    "FailCall",
    "FailRename",
    "Fault",
    "Faults",
    "FillDisk",
    "FlipBit",
    "Kill",
    "LimitFileSize",
    "Raise",
    "RankDied",
    "RanksTimedOut",
    "Slow",
    "Stop",
    "TearFile",
    "ThreadGroup",
    "ThreadRanksBroken",
    "damage",
    "run_ranks",
    "striking",
]
