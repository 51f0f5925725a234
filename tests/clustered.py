"""What the ranks of a test, and one alone, find in the same points."""

from __future__ import annotations

from pathlib import Path

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.collectives import Group

KMEANS = Path(__file__).parents[1] / "apps" / "kmeans.py"


def clustered(points: Path | str, group: Group | None = None) -> list[object]:
    """What k-means says of a file of points."""
    kmeans = load_app(str(KMEANS)).function
    made = kmeans(ir.read(str(points)), k=5, max_iterations=3).run(group, reproducible=True)
    return [made.result_sha256, made.iterations, made.residual, made.values]
