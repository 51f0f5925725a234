"""The supervisor, which asks a host for 12 seconds only whether it answers."""

import sys
import time

from iterreduce.supervising.command import run
from iterreduce.supervising.launchers import Launcher

if __name__ == "__main__":
    Launcher.answering.__defaults__ = (12.0,)
    sys.exit(run(sys.argv[1:], time.perf_counter()))
