"""`python -m iterreduce`: the supervisor of a job, or one rank of it.

A rank keeps signals, tells its supervisor that it is there, sets its environment, and then reads its command
line.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iterreduce.signals import Watch

STARTED = time.perf_counter()


def main() -> None:
    """Run the command line of this process and exit with its status."""
    from iterreduce import signals

    arguments = sys.argv[1:]
    if arguments[:1] == ["run"]:
        from iterreduce.supervising.command import run

        sys.exit(run(arguments[1:], STARTED))
    if arguments[:1] == ["submit"]:
        sys.exit(_submit(arguments[1:]))
    if arguments[:1] == ["doctor"]:
        from iterreduce.doctor.command import doctor

        sys.exit(doctor(arguments[1:]))
    if arguments[:1] == ["join"]:  # by ranks that have lost others
        from iterreduce.start import join_as

        join_as([int(name) for name in arguments[1].split(",")])
        arguments = arguments[2:]
    watch = signals.hold(arguments, STARTED)
    sys.exit(_command_line(arguments, watch))


def _submit(arguments: list[str]) -> int:
    from iterreduce.start import prepare_environment

    users = dict(os.environ)  # jobs shall not inherit what is for this process
    prepare_environment()
    from iterreduce.slurm.submit import submit

    return submit(arguments, users)


def _command_line(arguments: list[str], watch: Watch) -> int:
    from iterreduce.errors import LaunchError
    from iterreduce.start import prepare_environment
    from iterreduce.supervising import vitals

    try:
        vitals.begin(watch.leave_to_parent)
    except LaunchError as error:
        print(f"iterreduce: {error}", file=sys.stderr)
        return 1
    prepare_environment()
    from iterreduce.cli import run_command_line

    status = run_command_line(arguments, watch)
    vitals.leave(status)
    watch.over()
    return status


if __name__ == "__main__":
    main()
