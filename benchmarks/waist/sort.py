"""Sort records by a key: TeraSort, and its verifier.

    python -m iterreduce apps/generate.py terasort records.h5 --rows 10000000
    mpirun -n 8 python -m iterreduce benchmarks/waist/sort.py records.h5 --out sorted.h5 --summary run.json

One shuffle, routed by splitters. What verifies it shares no code with the engine: every share is compared
with itself one row on, the ends of shares with each other, and the records' checksums are added up before
and after.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir

BLOCK = 1 << 15  # rows whose checksums are made at a time


def comparable(key: np.ndarray) -> np.ndarray:
    """Keys of several bytes as NumPy compares them, numbers as they are."""
    return np.ascontiguousarray(key).view(f"S{key.shape[1]}")[:, 0] if key.ndim == 2 else key


def checksum(records: ir.Batch) -> np.ndarray:
    """The sum of a 64-bit hash of every record, whatever their order; uint64."""
    total = np.zeros(1, np.uint64)
    for lo in range(0, len(records), BLOCK):
        part = records.slice(lo, lo + BLOCK)
        rows = [np.ascontiguousarray(part[n]).reshape(len(part), -1).view(np.uint8) for n in part.names]
        cells = np.concatenate(rows, axis=1).astype(np.uint64)
        weights = ir.random.words(7, "checksum", 0, np.arange(cells.shape[1])) | np.uint64(1)
        mixed = (cells + np.uint64(1)) @ weights
        mixed ^= mixed >> np.uint64(32)
        total += (mixed * weights[0]).sum(dtype=np.uint64)
    return total


@dataclass(frozen=True)
class Examine:
    """A rank's share: its first and last key; beside the first how many records, their checksum, and how
    many stand behind a larger one."""

    key: str

    def run(self, context: ir.Context, records: ir.Batch) -> ir.Batch:
        key = records[self.key]
        ordered = comparable(key)
        ends = np.array([0, len(key) - 1]) if len(key) else np.zeros(0, np.int64)
        first = (np.arange(len(ends)) == 0).astype(np.int64)
        return ir.Batch(
            key=key[ends],
            records=first * len(key),
            checksum=first.astype(np.uint64) * checksum(records),
            misplaced=first * int((ordered[1:] < ordered[:-1]).sum()),
        )


def verdict(before: ir.Batch, after: ir.Batch) -> ir.Batch:
    """Raises where a record is lost, made, changed or out of order."""
    for what in ("records", "checksum"):
        if before[what].sum() != after[what].sum():
            raise ValueError(f"{what}: {before[what].sum()} before, {after[what].sum()} after")
    ends = comparable(after["key"])
    misplaced = int(after["misplaced"].sum() + (ends[1:] < ends[:-1]).sum())
    if misplaced:
        raise ValueError(f"{misplaced} records stand behind a larger one")
    largest = int(after["records"].max(initial=0))
    return ir.Batch(records=after["records"].sum(keepdims=True), largest_share=np.array([largest]))


@ir.app
def sort(records: ir.Dataset, key: str = "key", sample: int = 1024) -> ir.Dataset:
    """Sort RECORDS by the column KEY: a number, or some bytes per row.

    --sample SAMPLE rows per rank are looked at to cut the ranges of ranks. The summary's values are the
    number of records and the largest share of a rank.
    """
    if sample < 1:
        raise ir.UsageError(f"--sample: wanted at least 1 row, got {sample}")
    inputs = ir.Inputs()
    rows = inputs.rows("records", records)
    route = ir.Splitters(sample)
    step = ir.Superstep(
        "sort", (ir.Shuffle(rows, (key,), "ordered", route=route),), (ir.Replace("sorted", "ordered"),)
    )
    verify = (
        ir.Local(Examine(key), (rows,), "share before", cut="share"),
        ir.Gather("share before", "before"),
        ir.Local(Examine(key), ("sorted",), "share after", cut="share"),
        ir.Gather("share after", "after"),
        ir.Local(verdict, ("before", "after"), "verdict", cut="share"),
    )
    return ir.Dataset.of_loop(
        ir.Loop(
            "sort",
            inputs.sources,
            {"sorted": ir.State("")},
            (step,),
            ir.Until((ir.MaxIterations(1),)),
            "sorted",
            prepare=inputs.prepare,
            finish=verify,
            values={name: ("verdict", name) for name in ("records", "largest_share")},
        ),
        records.comm,
    )
