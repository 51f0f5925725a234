"""What ranks find out about their nodes, a line of JSON per rank: run under mpirun on several hosts."""

from __future__ import annotations

import json
import os
import socket

from iterreduce.collectives import Group, world
from iterreduce.cores import share_of_cores
from tests.collectives.contract import Exchange, uneven


def found(group: Group) -> dict[str, object]:
    exchange = Exchange(group, uneven(group.size))
    group.alltoallv(*exchange.args)
    exchange.assert_arrived()
    names = [name.decode() for name in group.allgather_bytes(socket.gethostname().encode())]
    node = group.split(names.index(socket.gethostname()))
    assert node is not None
    window = node.window(5)
    assert window is not None
    window.mine[:] = group.rank
    window.fence()
    shared = [int(window.of(rank)[0]) for rank in range(node.size)]
    window.fence()
    window.free()
    return {
        "rank": group.rank,
        "host": socket.gethostname(),
        "node_ranks": group.node_ranks(),
        "window over all": group.window(5) is not None,
        "window of the node": shared,
        "shared": group.shared([3] * group.size) is not None,
        "cores": share_of_cores(group),
    }


if __name__ == "__main__":
    os.write(1, f"\n{json.dumps(found(world()))}\n".encode())  # in one piece, beside those of others
