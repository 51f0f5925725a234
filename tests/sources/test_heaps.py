"""Text of variable length in HDF5: heaps are checked before HDF5 walks through them."""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterreduce as ir
from iterreduce.collectives import SoloGroup
from iterreduce.heaps import MAGIC, HeapError, check_heap
from iterreduce.sources import load, open_source

WORDS = ["", "zwölf", "x" * 9000, *(f"row {i}" * (i % 7) for i in range(300))]


def rows_of(path) -> ir.Batch:
    source, group = open_source(path), SoloGroup()
    source.open(group)
    return load(group, source).batch


def written(path, **how) -> None:
    with h5py.File(path, "w", **how) as file:
        file.create_dataset("text", data=WORDS, dtype=h5py.string_dtype())


def damaged(path, at: int, raw: bytes) -> None:
    """Other bytes, so far behind the beginning of each heap."""
    whole = bytearray(path.read_bytes())
    found = whole.find(MAGIC)
    assert found >= 0
    while found >= 0:
        whole[found + at : found + at + len(raw)] = raw
        found = whole.find(MAGIC, found + 1)
    path.write_bytes(whole)


@pytest.mark.parametrize("how", [{}, {"libver": "latest"}])
def test_text_is_read_through_checked_heaps_in_every_format(tmp_path, how):
    written(tmp_path / "a.h5", **how)
    assert rows_of(tmp_path / "a.h5")["text"].to_list() == WORDS


def test_text_is_read_in_a_file_whose_sizes_take_four_bytes(tmp_path):
    sizes = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    sizes.set_sizes(4, 4)
    made = h5py.h5f.create(os.fsencode(tmp_path / "a.h5"), fcpl=sizes)
    with h5py.File(made) as file:
        file.create_dataset("text", data=WORDS, dtype=h5py.string_dtype())
    assert rows_of(tmp_path / "a.h5")["text"].to_list() == WORDS


def test_chunked_text_lists_and_compounds_with_text_are_read_as_h5py_reads_them(tmp_path):
    cells = np.empty(len(WORDS), object)
    cells[:] = [np.arange(len(word) % 5, dtype=np.int32) for word in WORDS]
    kind = np.dtype([("word", h5py.string_dtype()), ("n", "i8")])
    pairs = np.array([(word, i) for i, word in enumerate(WORDS)], kind)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("text", data=WORDS, dtype=h5py.string_dtype(), chunks=(7,), compression="gzip")
        file.create_dataset("list", data=cells, dtype=h5py.vlen_dtype(np.int32), chunks=(5,))
        file.create_dataset("pairs", data=pairs)
    found = rows_of(tmp_path / "a.h5")
    assert found["text"].to_list() == found["word"].to_list() == WORDS
    assert [row.tolist() for row in found["list"].to_list()] == [cell.tolist() for cell in cells]
    assert found["n"].tolist() == list(range(len(WORDS)))


def test_a_link_to_text_in_another_file_is_followed(tmp_path):
    written(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["text"] = h5py.ExternalLink("a.h5", "/text")
    assert rows_of(tmp_path / "b.h5")["text"].to_list() == WORDS


def test_text_put_together_from_other_files_is_refused(tmp_path):
    written(tmp_path / "a.h5")
    layout = h5py.VirtualLayout((len(WORDS),), h5py.string_dtype())
    layout[:] = h5py.VirtualSource(str(tmp_path / "a.h5"), "text", (len(WORDS),))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_virtual_dataset("text", layout)
    with pytest.raises(ir.InputError, match="copy them there"):
        rows_of(tmp_path / "b.h5")


def test_an_object_of_no_bytes_at_which_hdf5_never_ends_is_an_error(tmp_path):
    written(tmp_path / "a.h5")
    damaged(tmp_path / "a.h5", 16, bytes(16))
    with pytest.raises(ir.InputError, match=r"text rows 0 to .* a heap of its values is damaged at byte 16"):
        rows_of(tmp_path / "a.h5")


@pytest.mark.parametrize("size", [1 << 62, 1 << 40, (1 << 64) - 1])
def test_a_heap_larger_than_its_file_is_an_error(tmp_path, size):
    written(tmp_path / "a.h5")
    damaged(tmp_path / "a.h5", 8, size.to_bytes(8, "little"))
    with pytest.raises(ir.InputError, match="the file ends before"):
        rows_of(tmp_path / "a.h5")


def test_the_name_of_a_mask_is_read_through_checked_heaps_too(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["mask"] = np.arange(3.0), np.array([True, False, True])
        file["x"].attrs["iterreduce_valid"] = "/mask"
    path = f"{tmp_path}/a.h5:/x"
    assert rows_of(path).valid("x").tolist() == [True, False, True]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_a_walk_through_any_bytes_ends_and_says_where_it_cannot_go_on(raw):
    """The oracle: object by object, each with a header of 16 bytes, as long as there is room for one."""
    heap = MAGIC + bytes(11) + raw
    at, good = 16, True
    while good and at + 16 <= len(heap):
        number, size = (
            int.from_bytes(heap[at : at + 2], "little"),
            int.from_bytes(heap[at + 8 : at + 16], "little"),
        )
        step = 16 + size + -size % 8 if number else size
        good, at = 0 < step <= len(heap) - at, at + step
    if good:
        check_heap(heap)
    else:
        with pytest.raises(HeapError, match="damaged at byte"):
            check_heap(heap)
