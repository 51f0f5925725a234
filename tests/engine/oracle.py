"""Slow and obvious: what stages must give, by dicts and lists over all rows. Knows nothing of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def grouped(rows: Sequence[Row], keys: Sequence[str]) -> dict[Any, list[Row]]:
    """Rows by key, in their order; all NaN are one key, and so are both zeros."""
    out: dict[Any, list[Row]] = {}
    for row in rows:
        out.setdefault(tuple(canonical(row[k]) for k in keys), []).append(row)
    return out


def canonical(value: Any) -> Any:
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value + 0.0
    return value


def there(rows: Sequence[Row], column: str) -> list[Any]:
    """The values that are not null."""
    return [row[column] for row in rows if row[column] is not None]


def variance(values: Sequence[float]) -> float | None:
    if not values:
        return None
    centre = sum(values) / len(values)
    return sum((v - centre) ** 2 for v in values) / len(values)


def where(rows: Sequence[Row], value: str, by: str, largest: bool) -> Any:
    """The value of the first row in which ``by`` is largest or smallest."""
    best: Row | None = None
    for row in rows:
        if row[value] is None or row[by] is None:
            continue
        if best is None or (row[by] > best[by] if largest else row[by] < best[by]):
            best = row
    return None if best is None else best[value]


def none_of(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Null where nothing is left."""
    return lambda values: function(values) if values else None


FOLDS: dict[str, Callable[[list[Any]], Any]] = {
    "sum": none_of(sum),
    "min": none_of(min),
    "max": none_of(max),
    "count": len,
    "mean": none_of(lambda values: sum(values) / len(values)),
    "var": variance,
    "any": none_of(any),
    "all": none_of(all),
    "first": none_of(lambda values: values[0]),
    "last": none_of(lambda values: values[-1]),
}


def reduced(
    rows: Sequence[Row], keys: Sequence[str], outputs: dict[str, tuple[str, str]]
) -> dict[Any, tuple[Any, ...]]:
    """Key -> results; ``outputs``: name -> (fold, column)."""
    return {
        key: tuple(
            FOLDS[fold](there(group, column)) if column else len(group) for fold, column in outputs.values()
        )
        for key, group in grouped(rows, keys).items()
    }


def close(a: Any, b: Any) -> bool:
    """Equal; floats up to a few last bits; NaN equals NaN."""
    if a is None or b is None or isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    if isinstance(a, tuple) or isinstance(b, tuple):
        return len(a) == len(b) and all(map(close, a, b))
    return (
        bool(a == b) or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)
    )
