"""What all ranks agree on before a checkpoint is written: tables, sizes, files, places.

Three collectives when nothing fails and ranks without rows have the columns of the others: words of a fixed
number, with a status first. What fails on one rank is raised on all, alike, and nothing stays on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from iterreduce.collectives import Group
from iterreduce.columns.batch import Batch
from iterreduce.columns.checksum import finished
from iterreduce.columns.ragged import Array
from iterreduce.columns.schema import Field, Schema, difference, never_null
from iterreduce.errors import CheckpointError, DisagreementError, IterReduceError, OutputError
from iterreduce.saving.directory import Attempt, remove
from iterreduce.saving.layout import Image, Layout, Stream, file_numbers, image, parts_of, streams_of
from iterreduce.saving.manifest import File, Manifest, Piece, TableInfo
from iterreduce.sources.agreement import agree

# Room beyond the data that must be there: files around the data, and what others write meanwhile.
SPARE_SHARE, SPARE_BYTES = 0.05, 1 << 20


class Saved(NamedTuple):
    """This rank's rows of a table; `everywhere`: the same on all ranks, written once, by rank 0."""

    batch: Batch
    everywhere: bool = False


class Plan(NamedTuple):
    """What all ranks know of one write. ``offsets``: int64 ``(files, streams)``; ``rank`` and ``ranks`` are
    those of its beginning, whatever becomes of the group.
    """

    group: Group
    rank: int
    ranks: int
    attempt: Attempt
    number: int
    tables: Mapping[str, Saved]
    schemas: Mapping[str, Schema]
    rows: Mapping[str, tuple[int, ...]]
    layout: Layout
    offsets: Array
    sizes: list[int]
    facts: Mapping[str, Any]

    def offset(self, rank: int, stream: int) -> int:
        """Where a rank's items of a stream begin in its file."""
        item_bytes = self.layout.streams[stream].part.item_bytes
        start = int(self.offsets[self.layout.file_of[rank], stream])
        return start + self.layout.first_item(rank, stream) * item_bytes

    def path(self, name: str) -> str:
        """Of a file that is being written."""
        return os.path.join(self.attempt.draft(self.number), name)


# ---------------------------------------------------------------- agreements


def planned(
    group: Group,
    attempt: Attempt,
    number: int,
    tables: Mapping[str, Saved],
    facts: Mapping[str, Any],
    per_rank: bool = False,
    host: str | None = None,
) -> tuple[Plan, Image | None]:
    """The plan, with its files made and empty; and, on the leader of a file, how that is laid out.

    Collective.

    Raises as `writing.begin` says.
    """
    failure: BaseException | None = None
    try:
        if group.rank == 0:
            attempt.guarded(lambda: _fresh_draft(attempt, number))
    except Exception as error:
        failure = error
    hosts, tables = _agree_structure(group, tables, host, failure)
    schemas, items = _agree_sizes(group, tables)
    streams = tuple(streams_of(schemas))
    everywhere = tuple(tables[stream.table].everywhere for stream in streams)
    file_of, files = file_numbers(hosts, per_rank)
    layout = Layout(streams, everywhere, items.of(streams, group.size), file_of, files)
    own, offsets, sizes = _make_files(group, attempt, number, layout)
    plan = Plan(
        group,
        group.rank,
        group.size,
        attempt,
        number,
        tables,
        schemas,
        items.rows,
        layout,
        offsets,
        sizes,
        facts,
    )
    return plan, own


def _fresh_draft(attempt: Attempt, number: int) -> None:
    attempt.check()
    draft = attempt.draft(number)
    if os.path.lexists(draft):  # an abandoned one that could not be removed then
        remove(draft)
    os.mkdir(draft)


def _raise_agreed(group: Group, failure: BaseException | None) -> None:
    """Raise the lowest rank's failure on all ranks. Collective."""

    def work() -> None:
        if isinstance(failure, IterReduceError):
            raise failure
        if failure is not None:
            raise CheckpointError(f"{type(failure).__name__}: {failure}") from failure

    agree(group, work)


def _agree_structure(
    group: Group, tables: Mapping[str, Saved], host: str | None, failure: BaseException | None
) -> tuple[list[int], Mapping[str, Saved]]:
    """A number for each rank's host, and the tables, of which all have the same, once none has a failure.
    Collective.
    """
    shapes = [[n, s.everywhere, never_null(s.batch.schema).to_json()] for n, s in tables.items()]
    mine = [_digest(host or socket.gethostname()), _digest(json.dumps(shapes)), int(failure is not None)]
    said = np.empty(3 * group.size, np.int64)
    group.allgather(np.array(mine, np.int64), said)
    if said[2::3].any():
        _raise_agreed(group, failure)
    if (said[1::3] != said[1]).any():
        tables = _agree_schemas(group, tables)
    hosts: list[int] = said[::3].tolist()
    return hosts, tables


def _agree_schemas(group: Group, tables: Mapping[str, Saved]) -> Mapping[str, Saved]:
    """Ranks without rows may have made columns of other dtypes: theirs become those of ranks with rows.
    Collective.
    """
    mine = [[n, s.everywhere, len(s.batch), s.batch.schema.to_json()] for n, s in tables.items()]
    told = [json.loads(text) for text in group.allgather_bytes(json.dumps(mine).encode())]
    names = [[entry[:2] for entry in theirs] for theirs in told]
    if other := [rank for rank, theirs in enumerate(names) if theirs != names[0]]:
        raise DisagreementError(f"ranks 0 and {other[0]} have other tables to save")
    agreed = {}
    for (name, saved), entries in zip(tables.items(), zip(*told, strict=True), strict=True):
        schema = _schema_of_rows(name, [(rows, Schema.from_json(text)) for _, _, rows, text in entries])
        agreed[name] = saved if len(saved.batch) else saved._replace(batch=Batch.empty(schema))
    return agreed


def _schema_of_rows(name: str, told: list[tuple[int, Schema]]) -> Schema:
    """What the ranks with rows have; if there is none, what rank 0 has. Raises `DisagreementError`."""
    known = [(rank, schema) for rank, (rows, schema) in enumerate(told) if rows] or [(0, told[0][1])]
    (first, schema), *others = known
    for rank, theirs in others:
        unlike = difference(never_null(schema), never_null(theirs))
        if unlike:
            raise DisagreementError(f'table "{name}" to save: ranks {first} and {rank} differ: {unlike}')
    return schema


def _digest(text: str) -> int:
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


class _Items(NamedTuple):
    """Of each table: rows of each rank; of each ragged column: values of each rank."""

    rows: dict[str, tuple[int, ...]]
    values: dict[tuple[str, str], Array]

    def of(self, streams: Sequence[Stream], ranks: int) -> Array:
        """int64 of shape ``(ranks, streams)``."""
        counts = np.zeros((ranks, len(streams)), np.int64)
        for k, stream in enumerate(streams):
            ragged = stream.part.name == "values"
            counts[:, k] = self.values[stream[:2]] if ragged else self.rows[stream.table]
        return counts


def _agree_sizes(group: Group, tables: Mapping[str, Saved]) -> tuple[dict[str, Schema], _Items]:
    """Schemas, a column nullable where it is on any rank, and all sizes. Collective."""
    words: list[int] = []
    for saved in tables.values():
        written = saved.batch if group.rank == 0 or not saved.everywhere else saved.batch.slice(0, 0)
        words.append(len(written))
        for name, field in saved.batch.schema.items():
            words += [int(field.nullable), _values(written, name, field)]
    said = np.empty((group.size, len(words)), np.int64)
    group.allgather(np.array(words, np.int64), said.reshape(-1))
    return _sizes_told(tables, said)


def _values(batch: Batch, name: str, field: Field) -> int:
    return 0 if field.kind == "fixed" else int(batch[name].offsets[-1] - batch[name].offsets[0])


def _sizes_told(tables: Mapping[str, Saved], said: Array) -> tuple[dict[str, Schema], _Items]:
    told = iter(said.T)
    schemas, items = {}, _Items({}, {})
    for table, saved in tables.items():
        items.rows[table] = tuple(next(told).tolist())
        fields = {}
        for name, f in saved.batch.schema.items():
            fields[name] = Field(f.kind, f.dtype, f.shape, bool(next(told).any()))
            items.values[table, name] = next(told).copy()
        schemas[table] = Schema(fields)
    return schemas, items


def _make_files(
    group: Group, attempt: Attempt, number: int, layout: Layout
) -> tuple[Image | None, Array, list[int]]:
    """Each file, made by its leader and empty, and where everything goes. Collective."""
    own: Image | None = None
    failure: BaseException | None = None
    words = np.zeros(2 + len(layout.streams), np.int64)
    try:
        if group.rank == 0:
            attempt.guarded(lambda: _check_room(attempt.path, layout.nbytes))
        if group.rank in layout.leaders:
            file = layout.file_of[group.rank]
            own, offsets = _laid_out(layout, file)
            path, nbytes = os.path.join(attempt.draft(number), layout.files[file]), own.nbytes
            attempt.guarded(lambda: _make_file(path, nbytes))
            words[1:] = own.nbytes, *offsets
    except Exception as error:
        failure, words[0] = error, 1
    said = np.empty((group.size, len(words)), np.int64)
    group.allgather(words, said.reshape(-1))
    if said[:, 0].any():
        if group.rank == 0:
            remove(attempt.draft(number))
        _raise_agreed(group, failure)
    leaders = said[list(layout.leaders)]
    return own, leaders[:, 2:], leaders[:, 1].tolist()


def _laid_out(layout: Layout, file: int) -> tuple[Image, list[int]]:
    datasets = layout.datasets(file)
    made = image(tuple(dataset for _, dataset in datasets))
    offsets = [0] * len(layout.streams)
    for (stream, _), offset in zip(datasets, made.offsets, strict=True):
        offsets[stream] = offset
    return made, offsets


def _make_file(path: str, nbytes: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(handle, nbytes)
    finally:
        os.close(handle)


def _check_room(path: str, nbytes: int) -> None:
    found = os.statvfs(path)
    room, wanted = found.f_bavail * found.f_frsize, int(nbytes * (1 + SPARE_SHARE)) + SPARE_BYTES
    if room < wanted:
        raise OutputError(
            f"{path}: the disk has {room >> 20} MiB left, a checkpoint needs {-(-wanted >> 20)} MiB; "
            "free some space, or save elsewhere"
        )


# ---------------------------------------------------------------- the manifest, on rank 0


def manifest_of(plan: Plan, told: Array, index: File) -> Manifest:
    """The manifest of what was written. `told`, uint64 ``(ranks, streams + 1)``: each rank's sums, and the
    checksum around the data of the file that it leads.
    """
    layout = plan.layout
    files = [
        File(name, plan.sizes[file], int(told[layout.leaders[file], -1]))
        for file, name in enumerate(layout.files)
    ]
    pieces = _pieces(plan, told)
    tables = {
        name: TableInfo(
            name,
            schema,
            plan.tables[name].everywhere,
            plan.rows[name],
            {(c, p.name): pieces[name, c, p.name] for c, field in schema.items() for p in parts_of(field)},
        )
        for name, schema in plan.schemas.items()
    }
    return Manifest(plan.number, plan.attempt.number, plan.ranks, plan.facts, tuple(files), index, tables)


def _pieces(plan: Plan, told: Array) -> dict[tuple[str, str, str], tuple[Piece, ...]]:
    layout = plan.layout
    found = {}
    for k, stream in enumerate(layout.streams):
        lengths = (layout.items[:, k] * stream.part.item_bytes).tolist()
        found[stream.table, stream.column, stream.part.name] = tuple(
            Piece(layout.file_of[r], plan.offset(r, k) if n else 0, n, finished(int(told[r, k]), n))
            for r, n in enumerate(lengths)
        )
    return found
