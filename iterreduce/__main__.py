"""`python -m iterreduce`: signals are kept, the environment is set, then the command line."""

from __future__ import annotations

import sys
import time

STARTED = time.perf_counter()


def main() -> None:
    """Run the command line of this process and exit with its status."""
    from iterreduce import signals

    arguments = sys.argv[1:]
    watch = signals.hold(arguments, STARTED)
    from iterreduce.start import prepare_environment

    prepare_environment()
    from iterreduce.cli import run_command_line

    sys.exit(run_command_line(arguments, watch))


if __name__ == "__main__":
    main()
