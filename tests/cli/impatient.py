"""The supervisor, which waits for 2 seconds only for what others notice of a death."""

import sys
import time

from iterreduce.supervising import attempt
from iterreduce.supervising.command import run

if __name__ == "__main__":
    attempt.NOTICE_SECONDS = 2.0
    sys.exit(run(sys.argv[1:], time.perf_counter()))
