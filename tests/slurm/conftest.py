"""One cluster for all tests of Slurm, and the jobs of all, handed in at once: they wait side by side."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cases
from tests.slurm.cluster import Cluster, Job, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    # sockets want a short path
    place = Path(tempfile.mkdtemp(prefix="slurm-"))
    place.chmod(0o755)
    made = Cluster(place, nodes=10)
    try:
        made.up()
        yield made
    finally:
        made.down()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """By case; each is disturbed already."""
    made = cases.Cases(cluster, tmp_path_factory.mktemp("jobs"))
    made.submit_all()
    made.disturb_all()
    return made.jobs
