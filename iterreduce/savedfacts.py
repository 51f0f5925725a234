"""Whether the facts of a checkpoint are what `iterreduce.capture` writes down, before anybody uses them.

A checkpoint whose checksums fit may still have been written by another program, or by hand. Each fact has its
type, tables that are named are there, and numbers are numbers; what fails is a `CheckpointError`, the same on
all ranks, as they all have the same facts. Whether they are those of this job is asked elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from iterreduce.errors import CheckpointError
from iterreduce.fixpoint import Outcome
from iterreduce.journal import COLUMNS
from iterreduce.table import LayoutKind

MOST = 1 << 62
LAYOUTS = get_args(LayoutKind)


class _WrongError(Exception):
    """A fact is not what it must be; the text says which."""


Check = Callable[[str, Any], None]


def check_facts(facts: Mapping[str, Any], tables: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` unless a run could be taken up from these facts and tables.

    >>> check_facts({"ranks": 1}, {}, "saved")  # rows that were saved before the first iteration
    >>> check_facts({"ranks": 1, "levels": 7}, {}, "saved")
    Traceback (most recent call last):
      ...
    iterreduce.errors.CheckpointError: saved: its facts are not those of a run: levels is 7
    """
    try:
        _fields("facts", facts, {"ranks": _count})
        if facts.get("kept") is not None:
            _count("kept", facts["kept"])
        if "levels" in facts:
            _check_run(facts, tables)
    except _WrongError as wrong:
        raise CheckpointError(f"{where}: its facts are not those of a run: {wrong}") from None


def _check_run(facts: Mapping[str, Any], tables: Mapping[str, Any]) -> None:
    entry, output = _entry_of(tables), _output_of(tables)
    level = {
        "loop": _text,
        "iteration": _count,
        "at": _count,
        "runs": _whole,
        "residual": _number,
        "outcome": _outcome,
        "carry": _each(_number),
        "gained": _each(_row(_number, _whole)),
        "tables": _each(entry),
        "before": _each(entry),
    }
    _fields(
        "facts",
        facts,
        {
            "levels": _list(lambda what, value: _fields(what, value, level)),
            "outputs": _each(output),
            "journal": _journal_of(tables),
            "forgotten": _count,
            "partitions": _count,
        },
    )
    if not facts["levels"]:
        raise _WrongError("no loop is open")


def _entry_of(tables: Mapping[str, Any]) -> Check:
    """A table that was stored: where it is, and how it lies on the ranks."""

    def stored(what: str, value: Any) -> None:
        _text(what, value)
        if value not in tables:
            raise _WrongError(f"{what} is no table that is there")

    def entry(what: str, value: Any) -> None:
        _fields(what, value, {"stored": stored, "layout": _layout, "keys": _list(_text), "rows": _whole})
        info = tables[value["stored"]]
        if value["rows"] not in (-1, info.rows) or info.everywhere != (value["layout"] == "everywhere"):
            raise _WrongError(f"{what} is not stored as it lay on the ranks")
        if any(key not in info.schema for key in value["keys"]):
            raise _WrongError(f"{what} has no such key column")

    return entry


def _output_of(tables: Mapping[str, Any]) -> Check:
    """The rows that were sunk, and how many of them in each part: as many parts on every rank."""
    entry = _entry_of(tables)

    def output(what: str, value: Any) -> None:
        entry(what, value)
        _fields(what, value, {"parts": _text})
        parts = tables.get(value["parts"])
        if parts is None or "rows" not in parts.schema or len(set(parts.rank_rows)) != 1:
            raise _WrongError(f"{what} has no rows of each part")
        field = parts.schema["rows"]
        if field.describe() != "int64":
            raise _WrongError(f"{what} has {field.describe()} rows in each part")

    return output


def _journal_of(tables: Mapping[str, Any]) -> Check:
    """The positions that a driver of its own was given: a table, or a list of them, as it was once."""
    entries = _list(_row(_count, _residual, _list(_count), _list(_text)))

    def journal(what: str, value: Any) -> None:
        if isinstance(value, list):
            entries(what, value)
            return
        _fields(what, value, {"stored": _text, "loops": _list(_list(_text))})
        info = tables.get(value["stored"])
        if info is None or not info.everywhere or info.schema.describe() != COLUMNS:
            raise _WrongError(f"{what} is no table of positions")

    return journal


def _bad(what: str, value: Any) -> _WrongError:
    told = repr(value)[:60] if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return _WrongError(f"{what[:200]} is {told}")


def _fields(what: str, value: Any, checks: Mapping[str, Check]) -> None:
    if not isinstance(value, Mapping):
        raise _bad(what, value)
    for name, check in checks.items():
        if name not in value:
            raise _WrongError(f"{what[:200]} has no {name}")
        check(name if what == "facts" else f"{what}.{name}", value[name])


def _each(check: Check) -> Check:
    """Of a mapping."""

    def every(what: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _bad(what, value)
        for name, one in value.items():
            check(f"{what}.{name}", one)

    return every


def _list(check: Check) -> Check:
    def every(what: str, value: Any) -> None:
        if not isinstance(value, list):
            raise _bad(what, value)
        for number, one in enumerate(value):
            check(f"{what}.{number}", one)

    return every


def _row(*checks: Check) -> Check:
    def every(what: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) != len(checks):
            raise _bad(what, value)
        for number, (check, one) in enumerate(zip(checks, value, strict=True)):
            check(f"{what}.{number}", one)

    return every


def _text(what: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _bad(what, value)


def _whole(what: str, value: Any) -> None:
    if type(value) is not int or not -1 <= value <= MOST:
        raise _bad(what, value)


def _count(what: str, value: Any) -> None:
    _whole(what, value)
    if value < 0:
        raise _bad(what, value)


def _number(what: str, value: Any) -> None:
    """What `capture` makes of a number: None, a whole one, or the bits of a float."""
    if isinstance(value, dict):
        if list(value) != ["float"]:
            raise _bad(what, value)
        _residual(what, value["float"] or 0)
    elif value is not None and (not isinstance(value, int) or abs(value) > 1 << 64):
        raise _bad(what, value)


def _residual(what: str, value: Any) -> None:
    """The bits of a float as text, or None."""
    try:
        if value is not None:
            float.fromhex(value)
    except (TypeError, ValueError, OverflowError):
        raise _bad(what, value) from None


def _outcome(what: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or value not in Outcome.__members__):
        raise _bad(what, value)


def _layout(what: str, value: Any) -> None:
    if value not in LAYOUTS:
        raise _bad(what, value)
