"""apps/generate.py: the same bytes on any number of ranks, and the distributions it promises."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from iterreduce.errors import UsageError
from iterreduce.testing import run_ranks

APP = Path(__file__).resolve().parents[2] / "apps" / "generate.py"
SPEC = importlib.util.spec_from_file_location("generate_app", APP)
app = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(app)

KINDS = [
    ("blobs", "points.h5", {"rows": 1000, "dim": 3, "centers": 4}),
    ("blobs", "points.npy", {"rows": 1000, "dim": 3, "centers": 4}),
    ("rmat", "edges.npy", {"scale": 7, "weights": 9}),
    ("uniform", "edges.h5", {"scale": 6, "edge_factor": 20}),
    ("rmat", "edges.txt", {"scale": 7, "weights": 9}),
    ("uniform", "edges.el", {"scale": 6, "edge_factor": 20}),
    ("zipf", "words.txt", {"rows": 1234, "vocabulary": 500}),
    ("terasort", "records.dat", {"rows": 777}),
    ("terasort", "records.npy", {"rows": 777}),
]


def write(ranks, kind, path, **arguments):
    run_ranks(ranks, lambda group: app.generate(kind, str(path), group, **arguments))
    return path.read_bytes()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(app, "BLOCK", 150)
    monkeypatch.setattr(app, "BLOCK_BYTES", 1000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kind", "name", "arguments"), KINDS)
def test_the_bytes_do_not_depend_on_the_number_of_ranks(tmp_path, kind, name, arguments):
    digests = {
        hashlib.sha256(write(ranks, kind, tmp_path / f"{ranks}{name}", **arguments)).hexdigest()
        for ranks in (1, 2, 3, 5)
    }
    assert len(digests) == 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kind", "name", "arguments"), KINDS)
def test_another_seed_gives_other_bytes(tmp_path, kind, name, arguments):
    first, second = (write(1, kind, tmp_path / f"{seed}{name}", seed=seed, **arguments) for seed in (1, 2))
    assert first != second and abs(len(first) - len(second)) < 400


def test_fewer_rows_than_ranks_are_written_once(tmp_path):
    assert write(5, "terasort", tmp_path / "r.dat", rows=3).count(b"\r\n") == 3


def test_blobs_stand_around_their_centers(tmp_path):
    write(2, "blobs", tmp_path / "x.npy", rows=100_000, dim=5, centers=7, spread=0.1, seed=3)
    x = np.load(tmp_path / "x.npy")
    from sklearn.cluster import KMeans

    found = KMeans(7, n_init=5, random_state=0).fit(x)
    assert x.shape == (100_000, 5)
    assert np.bincount(found.labels_).min() > 13_000
    rest = x - found.cluster_centers_[found.labels_]
    np.testing.assert_allclose(rest.std(axis=0), 0.1, rtol=0.02)


def test_rmat_has_the_quadrants_that_were_asked_for(tmp_path):
    write(1, "rmat", tmp_path / "e.npy", scale=12, permute=False, seed=5)
    edges = np.load(tmp_path / "e.npy")
    assert len(edges) == 16 << 12 and edges["src"].max() < 1 << 12
    for bit in (0, 5, 11):
        pairs = 2 * (edges["src"] >> bit & 1) + (edges["dst"] >> bit & 1)
        np.testing.assert_allclose(np.bincount(pairs) / len(edges), [0.57, 0.19, 0.19, 0.05], atol=0.01)


def test_permuted_rmat_is_the_same_graph_under_other_names(tmp_path):
    for name, permute in (("plain", False), ("mixed", True)):
        write(1, "rmat", tmp_path / f"{name}.npy", scale=10, permute=permute, seed=5)
    plain, mixed = np.load(tmp_path / "plain.npy"), np.load(tmp_path / "mixed.npy")
    name_of = app.relabel(np.arange(1 << 10), 10, 5)
    assert sorted(name_of.tolist()) == list(range(1 << 10))
    np.testing.assert_array_equal(name_of[plain["src"]], mixed["src"])
    np.testing.assert_array_equal(name_of[plain["dst"]], mixed["dst"])
    assert abs(np.corrcoef(np.arange(1 << 10), name_of)[0, 1]) < 0.15


@pytest.mark.parametrize("scale", [1, 2, 3, 13])
def test_relabelling_is_a_bijection(scale):
    for seed in range(5):
        assert len(np.unique(app.relabel(np.arange(1 << scale), scale, seed))) == 1 << scale


def test_uniform_edges_and_weights_fill_their_ranges_evenly(tmp_path):
    write(2, "uniform", tmp_path / "e.npy", scale=8, edge_factor=256, weights=5)
    edges = np.load(tmp_path / "e.npy")
    for name in ("src", "dst"):
        counts = np.bincount(edges[name], minlength=256)
        assert ((counts - 256) ** 2 / 256).sum() < 400  # chi squared, 255 degrees of freedom
    assert sorted(set(edges["weight"].tolist())) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("weights", [0, 1000])
def test_edges_as_text_are_those_of_the_columns(tmp_path, weights):
    for kind in ("rmat", "uniform"):
        for name in ("e.npy", "e.edges"):
            write(2, kind, tmp_path / name, scale=9, weights=weights)
        text, columns = np.loadtxt(tmp_path / "e.edges", np.int64), np.load(tmp_path / "e.npy")
        assert text.tolist() == [list(row) for row in columns.tolist()]


def test_words_follow_the_law_of_zipf(tmp_path):
    text = write(2, "zipf", tmp_path / "w.txt", rows=200_005, vocabulary=1000, exponent=1.0)
    lines = text.decode().split("\n")
    counts = Counter(text.decode().split())
    assert lines[-1] == "" and [len(line.split()) for line in lines[:-1]] == [10] * 20_000 + [5]
    assert counts.total() == 200_005 and len(counts) == 1000
    (first, most), (_, next_most) = counts.most_common(2)
    harmonic = (1 / np.arange(1, 1001)).sum()
    assert first == "ba"
    assert most == pytest.approx(200_005 / harmonic, rel=0.05)
    assert next_most == pytest.approx(most / 2, rel=0.1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [1, 10, 149, 150, 151])
def test_text_ends_with_a_newline(tmp_path, rows):
    text = write(1, "zipf", tmp_path / "w.txt", rows=rows)
    assert text.endswith(b"\n") and len(text.split()) == rows and text.count(b"\n") == -(-rows // 10)


def test_words_of_the_vocabulary_are_distinct():
    words = [word.decode() for word in app.words_of(20_000).to_list()]
    assert len(set(words)) == 20_000
    assert (words[0], words[99], words[100], words[10_099]) == ("ba ", "zu ", "baba ", "zuzu ")
    assert len(words[10_100]) == 7


def test_records_are_a_hundred_bytes_with_their_row_number(tmp_path):
    data = write(3, "terasort", tmp_path / "r.dat", rows=70_000)
    rows = [data[i : i + 100] for i in range(0, len(data), 100)]
    assert len(data) == 7_000_000 and all(row.endswith(b"\r\n") for row in rows)
    assert [int(row[12:44], 16) for row in rows] == list(range(70_000))
    keys = np.frombuffer(data, np.uint8).reshape(-1, 100)[:, :10]
    assert keys.min() == 32 and keys.max() == 126 and len(np.unique(keys, axis=0)) == 70_000
    assert keys.mean() == pytest.approx(79, abs=0.2)


def test_records_as_columns_hold_the_same_bytes(tmp_path):
    text = write(1, "terasort", tmp_path / "r.dat", rows=100)
    write(2, "terasort", tmp_path / "r.npy", rows=100)
    assert np.load(tmp_path / "r.npy").tobytes() == text


def test_text_is_not_written_into_a_file_of_columns(tmp_path):
    with pytest.raises(UsageError, match="zipf writes text"):
        write(2, "zipf", tmp_path / "w.npy")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rows": 0}, "--rows: wanted at least 1"),
        ({"scale": 41}, "--scale: wanted at most 40"),
        ({"a": 0.9, "b": 0.2}, "--a, --b, --c"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, said):
    with pytest.raises(UsageError, match=said):
        write(2, "rmat", tmp_path / "e.npy", **arguments)
    assert not list(tmp_path.iterdir())
