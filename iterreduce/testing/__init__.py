"""What tests of loops need, for this package and for its users: ranks as threads of one process."""

from __future__ import annotations

from iterreduce.testing.threads import RanksTimedOut, ThreadGroup, ThreadRanksBroken, run_ranks

__all__ = ["RanksTimedOut", "ThreadGroup", "ThreadRanksBroken", "run_ranks"]
