"""A communicator that refuses what MPI could not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def watchful(comm: Any, most_words: int) -> Any:
    """This communicator, taking no count and no displacement above `most_words`."""
    from mpi4py import MPI

    def checking(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for message in (*args, *kwargs.values()):
                if isinstance(message, list):
                    parts = message[1] if isinstance(message[1], tuple) else ([message[1]],)
                    numbers = [number for part in parts for number in part]
                    assert max(numbers) <= most_words, f"{name} with {numbers}"
            return getattr(MPI.Intracomm, name)(self, *args, **kwargs)

        return call

    moves = ("Allgather", "Allgatherv", "Alltoall", "Alltoallv", "Alltoallv_init", "Sendrecv")
    names = (*moves, "Allreduce", "Bcast")
    return type("Watchful", (MPI.Intracomm,), {name: checking(name) for name in names})(comm)
