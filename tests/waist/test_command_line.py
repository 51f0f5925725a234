"""Programs at the waist as apps: files in, files out, on real ranks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

import iterreduce as ir
from tests.launch import mpirun
from tests.waist.kit import FOLDER, random_graph, verify


def run(ranks: int, name: str, *args: str) -> None:
    done = mpirun(ranks, "-m", "iterreduce", str(FOLDER / f"{name}.py"), *args, "--quiet")
    assert done.returncode == 0, done.stderr


def test_pagerank_of_an_array_of_edges_on_three_ranks(tmp_path: Path) -> None:
    edges = random_graph(300, 1500)
    np.save(tmp_path / "edges.npy", np.stack([edges["src"], edges["dst"]], axis=1))
    (tmp_path / "restart.csv").write_text("page,weight\n50,2\n40,1\n")
    run(3, "pagerank", str(tmp_path / "edges.npy"), "--restart", str(tmp_path / "restart.csv"),
        "--out", str(tmp_path / "ranks.npz"), "--summary", str(tmp_path / "run.json"))  # fmt: skip
    with np.load(tmp_path / "ranks.npz") as rows:
        result = ir.Batch(page=rows["page"], rank=rows["rank"])
    assert verify("pagerank", result, edges, weight={50: 2.0, 40: 1.0}) < 2e-9
    assert json.loads((tmp_path / "run.json").read_text())["outcome"].lower() == "converged"


def test_shortest_paths_of_an_edge_list_of_text_on_three_ranks(tmp_path: Path) -> None:
    edges = random_graph(300, 1500)
    ends = [[f"at {i}".replace(" ", "-") for i in edges[end].tolist()] for end in ("src", "dst")]
    lines = zip(*ends, (edges["weight"] / 4).tolist(), strict=True)
    (tmp_path / "roads.edges").write_text("".join(f"{a} {b} {w}\n" for a, b, w in lines))
    run(3, "sssp", str(tmp_path / "roads.edges"), "at-40", "--out", str(tmp_path / "far.csv"))
    with (tmp_path / "far.csv").open() as file:
        rows = list(csv.DictReader(file))
    result = ir.Batch(
        vertex=[row["vertex"] for row in rows], distance=np.array([float(row["distance"]) for row in rows])
    )
    named = ir.Batch(src=ends[0], dst=ends[1], weight=edges["weight"] / 4)
    assert verify("sssp", result, named, "at-40") > 200
