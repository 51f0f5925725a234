"""The supervisor, which gives up what others do not notice as soon as a file says so.

Not before: a busy machine may take seconds to start what is then to be missed.
"""

import os
import sys
import threading
import time
from pathlib import Path

from iterreduce.supervising import attempt
from iterreduce.supervising.command import run


def wait(sign: Path) -> None:
    while not sign.exists():
        time.sleep(0.05)
    attempt.NOTICE_SECONDS = 0.3


if __name__ == "__main__":
    sign = Path(os.environ["ITERREDUCE_TEST_FOLDER"]) / "impatient"
    threading.Thread(target=wait, args=(sign,), daemon=True).start()
    sys.exit(run(sys.argv[1:], time.perf_counter()))
