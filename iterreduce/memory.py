"""Who holds how many bytes: accounts by name, against a budget.

On Linux memory errors mostly kill, so large holders say here what they hold before they hold it. Nothing is
allocated, measured or freed here, and one rank's accounts say nothing about another's: agreement is the
engine's business.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping


class Accounts:
    """The accounts of one rank; sizes in bytes. Without a budget everything fits.

    >>> accounts = Accounts(1000)
    >>> accounts.set("input", 600)
    >>> accounts.fits(500), accounts.fits(400)
    (False, True)
    >>> accounts.set("input", 100)
    >>> accounts.total, accounts.report()
    (100, {'input': 100})
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.budget_bytes = budget_bytes
        self._held: dict[str, int] = {}
        self.total = 0
        self.peak = 0

    def set(self, name: str, nbytes: int) -> None:
        """The account `name` now holds `nbytes`; zero closes it."""
        self.total += nbytes - self._held.pop(name, 0)
        if nbytes:
            self._held[name] = nbytes
        self.peak = max(self.peak, self.total)

    def get(self, name: str) -> int:
        """Bytes that the account holds now; 0 if there is none of that name."""
        return self._held.get(name, 0)

    def fits(self, nbytes: int) -> bool:
        """Whether `nbytes` more stay within the budget."""
        return self.budget_bytes is None or self.total + nbytes <= self.budget_bytes

    def report(self) -> Mapping[str, int]:
        """Bytes by account, largest first."""
        return dict(sorted(self._held.items(), key=lambda item: (-item[1], item[0])))


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident, in bytes.

    Linux' own counter is preferred: `getrusage` also counts what the launcher had before it became us.

    >>> peak_rss_bytes() > 1_000_000
    True
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
