"""An app whose argument is a graph: any file of edges, through the command line, on real ranks and alone."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from iterreduce.cli import run_command_line
from tests.launch import mpirun

DEGREES = '''
import numpy as np
import iterreduce as ir

def ends(edges):
    return ir.Batch(vertex=edges["src"], degree=np.ones(len(edges), np.int64))

@ir.app
def degrees(edges: ir.Dataset):
    """How many edges leave each vertex of EDGES."""
    return ir.MapReduce(map=ends, reduce=ir.SUM, key="vertex")(edges.as_edges())
'''


@pytest.mark.parametrize(("name", "ranks"), [("g.txt", 1), ("g.el.gz", 2), ("g", 1)])
def test_an_app_reads_its_argument_as_a_graph(tmp_path: Path, name: str, ranks: int) -> None:
    (tmp_path / "degrees.py").write_text(DEGREES)
    raw = b"# a graph\nnews home\nhome news\nnews shop\n"
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    out = tmp_path / "out.csv"
    words = [str(tmp_path / "degrees.py"), str(tmp_path / name), "--out", str(out), "--quiet"]
    if ranks == 1:
        assert run_command_line(words) == 0
    else:
        done = mpirun(ranks, "-m", "iterreduce", *words)
        assert done.returncode == 0, done.stderr
    assert sorted(out.read_text().splitlines()[1:]) == ["home,1", "news,2"]
