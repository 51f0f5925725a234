"""Events reach their watchers, broken watchers break nothing, faults pass; accounts add up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iterreduce.errors
from iterreduce.events import EVENTS, Event, Events
from iterreduce.memory import Accounts, peak_rss_bytes

PACKAGE = Path(iterreduce.errors.__file__).parent


def test_events_arrive_in_order_at_every_watcher_until_it_stops() -> None:
    events, first, second = Events(), [], []  # type: ignore[var-annotated]
    stop = events.subscribe(first.append)
    events.subscribe(second.append)
    events.emit("iteration.start", iteration=1)
    stop()
    events.emit("iteration.start", iteration=2)
    assert [event.fields["iteration"] for event in first] == [1]
    assert [event.fields["iteration"] for event in second] == [1, 2]
    assert second[0].seconds <= second[1].seconds


def test_a_broken_watcher_is_reported_once_and_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    events, seen = Events(), []  # type: ignore[var-annotated]
    events.subscribe(lambda event: event.fields["nothing"])
    events.subscribe(seen.append)
    events.emit("load", rows=3)
    events.emit("load", rows=4)
    assert len(seen) == 2
    assert (
        capsys.readouterr().err
        == "iterreduce: a watcher failed at load and is not called again: KeyError: 'nothing'\n"
    )


def test_a_fault_hook_raises_into_the_engine_each_time() -> None:
    def fault(event: Event) -> None:
        raise RuntimeError(event.name)

    events = Events()
    stop = events.subscribe(fault, may_raise=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"stage\.start"):
            events.emit("stage.start", stage="map")
    stop()
    assert not events.active
    events.emit("stage.start", stage="map")


def test_a_field_may_be_called_name() -> None:
    events, seen = Events(), []  # type: ignore[var-annotated]
    events.subscribe(seen.append)
    events.emit("load", name="points")
    assert seen[0].fields == {"name": "points"}


def test_every_event_that_the_package_emits_is_in_the_table_with_these_fields() -> None:
    """Seen where the name is written down: in `emit`, and in the engine's `tell`, which hands it on."""
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") not in ("emit", "tell"):
                continue
            if node.args and isinstance(node.args[0], ast.Constant):
                name = node.args[0].value
                fields = {keyword.arg for keyword in node.keywords}
                assert name in EVENTS, f"{path.name}:{node.lineno}"
                assert fields - {None} <= set(EVENTS[name][0]), f"{path.name}:{node.lineno}"
                seen.add(name)
    assert {"run.start", "iteration.commit", "run.end"} <= seen


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 100))))
def test_the_total_is_the_sum_of_what_the_accounts_hold(moves: list[tuple[str, int]]) -> None:
    accounts, held, peak = Accounts(250), {}, 0  # type: ignore[var-annotated]
    for name, nbytes in moves:
        accounts.set(name, nbytes)
        held[name] = nbytes
        peak = max(peak, sum(held.values()))
    assert accounts.total == sum(held.values()) and accounts.peak == peak
    assert accounts.report() == {name: nbytes for name, nbytes in held.items() if nbytes}
    assert accounts.fits(10) == (accounts.total + 10 <= 250)
    assert accounts.get("d") == 0


def test_without_a_budget_everything_fits_and_memory_in_use_is_seen() -> None:
    assert Accounts().fits(2**60)
    before = peak_rss_bytes()
    filled = bytearray(64 << 20)
    filled[::4096] = b"x" * (len(filled) // 4096)
    assert peak_rss_bytes() >= max(before, 64 << 20)
