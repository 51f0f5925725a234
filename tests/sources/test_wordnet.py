"""The graph of WordNet arrives whole: string ids, on any number of ranks, as Python reads the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from iterreduce.sources import open_source

from .. import wordnet
from .kit import loaded


@pytest.mark.parametrize("size", [1, 3])
def test_the_graph_of_wordnet_is_read_whole(wordnet_edges: Path, size: int) -> None:
    batch, _, _ = loaded(size, lambda: open_source(wordnet_edges))
    lines = [line.split() for line in wordnet_edges.read_text().splitlines()[1:]]
    assert batch["src"].to_list() == [src for src, _ in lines]
    assert batch["dst"].to_list() == [dst for _, dst in lines]
    assert len(lines) > 250_000 and len({*batch["src"].to_list()}) > 100_000


def test_pointers_of_a_synset_follow_its_words() -> None:
    line = "00001930 03 n 01 physical_entity 0 003 @ 00001740 n 0000 ~ 00002452 n 0000 + 01 a 0101 | text"
    assert list(wordnet.pointers("n", line.split(" | ")[0].split())) == [
        ("n00001930", "n00001740"),
        ("n00001930", "n00002452"),
        ("n00001930", "a01"),
    ]


def test_without_the_package_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs Debian's package wordnet-base: `apt-get download"):
        wordnet._run(["apt-get", "download", wordnet.PACKAGE], tmp_path)
