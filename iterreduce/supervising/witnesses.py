"""A small process beside each rank on another host than the supervisor's: it tells when the rank is gone.

The supervisor follows processes of its own machine by their handles. Of others it hears through the launcher,
which may say nothing: of a rank that left MPI without a word, or of a new one that has not met the others. So
such a rank holds a pipe, as it does for the supervisor where that is here, and the witness at its other end
writes the rank's last beat. It is forked before MPI and NumPy are there, holds nothing else of the rank's,
and ends with it. A host that is lost takes it along.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable

#: A beat is padded to this, so that writing it again replaces it.
BEAT_BYTES = 512
#: Of the process, as `ps` and `top` show it.
NAME = "rank-witness"
#: What the last beat says.
GONE = "gone"


def stand_by(path: str, forked: Callable[[], None]) -> int:
    """From now on there is a witness that writes into this beat. The pipe to it: `dismiss` it before the rank
    leaves in order. `forked` is called in it. Raises OSError.
    """
    beat = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    watched, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            forked()
            if os.fork() == 0:  # nobody's child, or the rank would have to wait for it
                _bear_witness(watched, beat)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(watched)
    os.close(beat)
    return pipe


def dismiss(pipe: int) -> None:
    """The rank leaves in order."""
    with contextlib.suppress(OSError):  # it was killed
        os.write(pipe, b".")


def _bear_witness(watched: int, beat: int) -> None:
    """Hold nothing that others wait for until all have closed it: what is written, a line to the launcher."""
    os.setsid()
    files = os.open(os.devnull, os.O_RDWR), watched, beat
    null, watched, beat = [fcntl.fcntl(file, fcntl.F_DUPFD, 5) for file in files]
    for place, file in enumerate((null, null, null, watched, beat)):
        os.dup2(file, place)
    os.closerange(5, os.sysconf("SC_OPEN_MAX"))
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:
        name.write(NAME)
    if not os.read(3, 1):
        _tell(4)


def _tell(beat: int) -> None:
    said: dict[str, object] = {}
    with contextlib.suppress(ValueError):  # it died while it wrote
        said = json.loads(os.pread(beat, BEAT_BYTES, 0))
    os.pwrite(beat, padded({**said, GONE: True}), 0)


def padded(said: dict[str, object]) -> bytes:
    """A beat as it is written."""
    return json.dumps(said).ljust(BEAT_BYTES)[:BEAT_BYTES].encode()
