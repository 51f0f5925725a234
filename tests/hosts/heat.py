"""Heat spreads along a ring: an app that sends values between all ranks and tells how far it is."""

import time
from pathlib import Path

import numpy as np

import iterreduce as ir

CELLS = 3000


@ir.app
def heat(folder: str, iterations: int = 40, pause: float = 0.0, group: ir.Group | None = None) -> ir.Dataset:
    """Spread heat for ITERATIONS, PAUSE seconds each, with a line per iteration in FOLDER."""
    assert group is not None
    log = open(Path(folder) / f"iterations-{group.rank}", "a", buffering=1)  # noqa: SIM115

    def spread(cells: ir.Batch) -> ir.Batch:
        log.write("begun\n")
        time.sleep(pause)
        to = np.concatenate([cells["cell"] - 1, cells["cell"] + 1]) % CELLS
        return ir.Batch(cell=to, heat=np.concatenate([cells["heat"]] * 2) / 2)

    mine = np.arange(group.rank, CELLS, group.size)
    start = ir.Dataset.from_local(group, cell=mine, heat=np.sqrt(mine))
    job = ir.MapReduce(map=spread, reduce=ir.SUM, key="cell")
    return job.iterate(state=start, state_key="cell", max_iterations=iterations)
