"""Test data of any size: points, graphs, text, records; a seed gives the same bytes on any number of ranks.

    python -m iterreduce apps/generate.py blobs points.h5 --rows 2000000 --dim 16 --centers 64 --seed 1
    mpirun -n 8 python -m iterreduce apps/generate.py rmat edges.npy --scale 20 --weights 255

Every number is a function of (seed, name, row), so each rank makes its own blocks of rows, and memory stays
bounded. R-MAT: Chakrabarti, Zhan, Faloutsos, "R-MAT: a recursive model for graph mining", SDM 2004, with the
constants of Graph500. Records are those of the sort benchmark, in text: key, row number, filler, CR LF.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

import iterreduce as ir

BLOCK = 1 << 16  # rows made at a time: blocks begin at its multiples whatever the number of ranks
BLOCK_BYTES = 1 << 24  # of one column; wide rows come fewer at a time
COLUMNS = (".npy", ".h5", ".hdf5")
EDGE_LISTS = (".txt", ".el", ".edges")
SYLLABLES = np.array([[c, v] for c in b"bcdfghjklmnpqrstvwxz" for v in b"aeiou"], np.uint8)
HEX = np.frombuffer(b"0123456789ABCDEF", np.uint8)
PRINTABLE, FIRST_PRINTABLE = 95, 32


@ir.app
def generate(
    kind: Literal["blobs", "rmat", "uniform", "zipf", "terasort"],
    path: str,
    group: ir.Group,
    rows: int = 1_000_000,
    dim: int = 16,
    centers: int = 64,
    spread: float = 1.0,
    scale: int = 16,
    edge_factor: int = 16,
    a: float = 0.57,
    b: float = 0.19,
    c: float = 0.19,
    permute: bool = True,
    weights: int = 0,
    vocabulary: int = 1_000_000,
    exponent: float = 1.0,
    seed: int = 0,
) -> None:
    """Write test data of a KIND to PATH.

    blobs: ROWS points, column x of DIM numbers, at deviation SPREAD around CENTERS centers (deviation 3).
    rmat, uniform: columns src, dst; 2**SCALE vertices, EDGE_FACTOR edges per vertex; rmat takes A, B, C, and
    --no-permute keeps the vertices of high degree first. WEIGHTS > 0 adds a column weight, 1 to WEIGHTS.
    To .txt, .el or .edges they go as lines of text.
    zipf: text of ROWS words, the word of rank r with probability proportional to r ** -EXPONENT.
    terasort: ROWS records of 100 bytes, as columns to .npy or .h5. Points go to .npy, .h5 and their like.
    """
    check_sizes(
        rows=rows, dim=dim, centers=centers, scale=scale, edge_factor=edge_factor, vocabulary=vocabulary
    )
    edges = edge_factor << scale
    if kind == "blobs":
        write_rows(group, path, rows, blobs(dim, centers, spread, seed))
    elif kind == "rmat":
        write_edges(group, path, edges, weighted(rmat(scale, (a, b, c), permute, seed), weights, seed))
    elif kind == "uniform":
        write_edges(group, path, edges, weighted(uniform_edges(scale, seed), weights, seed))
    elif kind == "zipf" and path.endswith(COLUMNS):
        raise ir.UsageError(f"{path}: zipf writes text; give a name that ends in .txt")
    elif kind == "zipf":
        write_text(group, path, rows, zipf(rows, vocabulary, exponent, seed))
    elif path.endswith(COLUMNS):
        write_rows(group, path, rows, lambda at: split_records(records(at, seed)))
    else:
        write_text(group, path, rows, lambda at: records(at, seed).tobytes())


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ir.UsageError(f"--{name.replace('_', '-')}: wanted at least 1, got {size}")
    if sizes["scale"] > 40:
        raise ir.UsageError(f"--scale: wanted at most 40 (2**40 vertices), got {sizes['scale']}")


# ---------------------------------------------------------------------------- files


def write_rows(group: ir.Group, path: str, rows: int, make: Callable[[np.ndarray], ir.Batch]) -> None:
    """Each rank makes and writes its blocks. Collective."""
    schema = make(np.arange(0)).schema
    widest = max(field.row_bytes for field in schema.values())
    height = max(1, min(BLOCK, BLOCK_BYTES // widest))
    blocks = -(-rows // height)
    with ir.RowWriter(group, path, schema, rows) as file:
        for block in range(blocks * group.rank // group.size, blocks * (group.rank + 1) // group.size):
            file.write(block * height, make(rows_of(block, rows, height)))


def write_edges(group: ir.Group, path: str, edges: int, make: Callable[[np.ndarray], ir.Batch]) -> None:
    """As columns, or as lines of text. Collective."""
    if path.endswith(EDGE_LISTS):
        write_text(group, path, edges, lambda at: lines_of(make(at)))
    else:
        write_rows(group, path, edges, make)


def write_text(group: ir.Group, path: str, rows: int, make: Callable[[np.ndarray], bytes]) -> None:
    """Ranks make blocks in turn. Collective."""
    ir.write_text_blocks(group, path, -(-rows // BLOCK), lambda block: make(rows_of(block, rows, BLOCK)))


def rows_of(block: int, rows: int, height: int) -> np.ndarray:
    return np.arange(block * height, min(rows, (block + 1) * height))


def lines_of(rows: ir.Batch) -> bytes:
    """Whole numbers in decimal, a row to a line, apart by spaces."""
    cells, shown = [], []
    for name in rows.names:
        digits = max(1, len(str(rows[name].max(initial=0))))
        powers = 10 ** np.arange(digits - 1, -1, -1)
        cells.append(rows[name][:, None] // powers % 10 + ord("0"))
        shown.append((rows[name][:, None] >= powers) | (powers == 1))
        cells.append(np.full((len(rows), 1), ord(" ")))
        shown.append(np.ones((len(rows), 1), bool))
    cells[-1][:] = ord("\n")
    return np.hstack(cells)[np.hstack(shown)].astype(np.uint8).tobytes()


# ---------------------------------------------------------------------------- points


def blobs(dim: int, centers: int, spread: float, seed: int) -> Callable[[np.ndarray], ir.Batch]:
    middles = 3 * ir.random.normal(seed, "centers", 0, np.arange(centers * dim)).reshape(centers, dim)

    def make(at: np.ndarray) -> ir.Batch:
        cells = (at[:, None] * dim + np.arange(dim)).reshape(-1)
        noise = ir.random.normal(seed, "noise", 0, cells).reshape(-1, dim)
        return ir.Batch(x=middles[ir.random.integers(seed, "center", 0, at, 0, centers)] + spread * noise)

    return make


# ---------------------------------------------------------------------------- graphs


def rmat(
    scale: int, shares: tuple[float, float, float], permute: bool, seed: int
) -> Callable[[np.ndarray], ir.Batch]:
    if min(shares) < 0 or sum(shares) > 1:
        raise ir.UsageError(f"--a, --b, --c: wanted three shares of at most 1 together, got {shares}")
    first, second, third = (int(share * 2**32) for share in np.cumsum(shares))

    def make(at: np.ndarray) -> ir.Batch:
        src, dst = np.zeros(len(at), np.int64), np.zeros(len(at), np.int64)
        for level in range(scale):  # one quadrant of the adjacency matrix per level: a | b over c | d
            draw = random_uint32(seed, "quadrant", level, at)
            low = draw >= second
            right = (draw >= first) & ~low | (draw >= third)
            src, dst = 2 * src + low, 2 * dst + right
        if permute:
            src, dst = relabel(src, scale, seed), relabel(dst, scale, seed)
        return ir.Batch(src=src, dst=dst)

    return make


def uniform_edges(scale: int, seed: int) -> Callable[[np.ndarray], ir.Batch]:
    def make(at: np.ndarray) -> ir.Batch:
        ends = (ir.random.integers(seed, name, 0, at, 0, 1 << scale) for name in ("src", "dst"))
        return ir.Batch(src=next(ends), dst=next(ends))

    return make


def weighted(
    make: Callable[[np.ndarray], ir.Batch], weights: int, seed: int
) -> Callable[[np.ndarray], ir.Batch]:
    if weights < 1:
        return make
    return lambda at: make(at).with_columns(weight=ir.random.integers(seed, "weight", 0, at, 1, weights + 1))


def relabel(vertex: np.ndarray, scale: int, seed: int) -> np.ndarray:
    """A bijection of the numbers below 2**scale: odd multipliers and xor-shifts, both invertible."""
    mask = np.uint64((1 << scale) - 1)
    mixed = vertex.astype(np.uint64)
    for key in ir.random.words(seed, "labels", 0, np.arange(4)):
        mixed = (mixed * (key | np.uint64(1)) + (key >> np.uint64(32))) & mask
        mixed ^= mixed >> np.uint64((scale + 1) // 2)
    return mixed.astype(np.int64)


def random_uint32(seed: int, name: str, number: int, at: np.ndarray) -> np.ndarray:
    """Two draws to a word of 64 bits."""
    both = ir.random.words(seed, name, number // 2, at)
    return (both >> np.uint64(32 * (number % 2))) & np.uint64(2**32 - 1)


# ---------------------------------------------------------------------------- text and records


def zipf(rows: int, vocabulary: int, exponent: float, seed: int) -> Callable[[np.ndarray], bytes]:
    """Ten words to a line; frequent words are short."""
    mass = np.cumsum(np.arange(1, vocabulary + 1, dtype=float) ** -exponent)
    table = words_of(vocabulary)

    def make(at: np.ndarray) -> bytes:
        rank = np.searchsorted(mass, ir.random.uniform(seed, "word", 0, at) * mass[-1], side="right")
        text = table.take(np.minimum(rank, vocabulary - 1))
        ends = text.offsets[1:] - 1
        last = (at % 10 == 9) | (at == rows - 1)
        text.values[ends[last]] = ord("\n")
        return text.values.tobytes()

    return make


def words_of(count: int) -> ir.Ragged:
    """Distinct words, each with a space behind: as many syllables as its number has digits in base 100."""
    number = np.arange(count)
    syllables, first, several = np.ones(count, np.int64), np.zeros(count, np.int64), 100
    while several <= count:
        syllables[several:] += 1
        first[several:] = several
        several = several * 100 + 100
    offsets = np.concatenate([[0], np.cumsum(2 * syllables + 1)])
    letters = np.full(offsets[-1], ord(" "), np.uint8)
    rest = number - first
    for back in range(int(syllables.max(initial=0))):
        has = syllables > back
        at = offsets[1:][has] - 3 - 2 * back
        letters[at], letters[at + 1] = SYLLABLES[rest[has] % 100].T
        rest //= 100
    return ir.Ragged(offsets, letters, "bytes")


def records(at: np.ndarray, seed: int) -> np.ndarray:
    """uint8 of shape (n, 100): key of 10 printable characters, row number in 32 hex digits, filler."""
    out = np.full((len(at), 100), ord(" "), np.uint8)
    for i in range(10):
        draw = random_uint32(seed, "key", i, at)
        out[:, i] = FIRST_PRINTABLE + ((draw * np.uint64(PRINTABLE)) >> np.uint64(32))
    digits = (at[:, None] >> (4 * np.arange(15, -1, -1))) & 15
    out[:, 12:28] = HEX[0]
    out[:, 28:44] = HEX[digits]
    out[:, 46:98] = HEX[digits[:, -13:]].repeat(4, axis=1)
    out[:, 98:] = 13, 10
    return out


def split_records(whole: np.ndarray) -> ir.Batch:
    return ir.Batch(key=whole[:, :10].copy(), value=whole[:, 10:].copy())
