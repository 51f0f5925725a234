"""The pool: every range once, errors in order, nested use inline, no thread left behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterreduce.columns.threads import ALONE, Pool, current, even_parts, using
from iterreduce.errors import UsageError

before: set[threading.Thread] = set()  # of runs that other tests drive by hand and never end


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_is_not_searched_again() -> Iterator[None]:
    """By each of many collections below: what other tests have left is much."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _threads_before() -> None:
    gc.collect()
    before.clear()
    before.update(threading.enumerate())


def pool_threads() -> list[str]:
    return [t.name for t in set(threading.enumerate()) - before if t.name.startswith("iterreduce pool")]


def wait_for_helpers(pool: Pool, wanted: int) -> set[str]:
    """Threads that took part in a job whose ranges wait for each other."""
    together = threading.Barrier(wanted, timeout=20)

    def meet(lo: int, hi: int) -> str:
        together.wait()
        return threading.current_thread().name

    return set(pool.run(meet, [(i, i + 1) for i in range(wanted)]))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_range_is_run_once_and_results_stand_in_the_order_of_the_ranges(threads: int) -> None:
    counts = np.zeros(1000, np.int64)

    def count(lo: int, hi: int) -> tuple[int, int]:
        counts[lo:hi] += 1
        return lo, hi

    ranges = even_parts(1000, 37)
    with Pool(threads) as pool:
        for _ in range(20):
            assert pool.run(count, ranges) == ranges
    assert (counts == 20).all()


def test_ranges_run_on_as_many_threads_as_the_pool_has_and_the_callers_is_one_of_them() -> None:
    with Pool(3) as pool:
        names = wait_for_helpers(pool, 3)
    assert len(names) == 3 and threading.current_thread().name in names


def test_a_pool_of_one_makes_no_thread_and_neither_does_a_single_range() -> None:
    with Pool(1) as one, Pool(4) as four:
        one.run(lambda lo, hi: None, even_parts(10, 5))
        four.run(lambda lo, hi: None, [(0, 10)])
        assert not pool_threads()


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_error_of_the_first_range_that_failed_is_raised_and_the_pool_goes_on(threads: int) -> None:
    def fail(lo: int, hi: int) -> int:
        if lo in (3, 5):
            time.sleep(0.02 if lo == 3 else 0)
            raise ValueError(f"range {lo}")
        return lo

    with Pool(threads) as pool:
        for _ in range(3):
            with pytest.raises(ValueError, match="range 3"):
                pool.run(fail, [(i, i + 1) for i in range(8)])
        assert pool.run(lambda lo, hi: hi - lo, [(0, 2), (2, 5)]) == [2, 3]


def test_a_function_that_uses_the_pool_again_is_run_inline() -> None:
    with Pool(2) as pool, using(pool):
        inner = pool.run(
            lambda lo, hi: (
                pool.run(lambda a, b: threading.current_thread().name, even_parts(10, 5)),
                threading.current_thread().name,
            ),
            even_parts(4, 4),
        )
    assert all(set(names) == {own} for names, own in inner)


def test_threads_are_gone_when_a_pool_is_closed_or_forgotten() -> None:
    pool = Pool(3)
    wait_for_helpers(pool, 3)
    assert len(pool_threads()) == 2
    pool.close()
    assert not pool_threads()
    assert pool.run(lambda lo, hi: hi, [(0, 1), (1, 2)]) == [1, 2]  # on the caller's thread
    assert not pool_threads()
    forgotten = Pool(2)
    wait_for_helpers(forgotten, 2)
    del forgotten
    gc.collect()
    last = time.monotonic() + 20
    while pool_threads() and time.monotonic() < last:
        time.sleep(0.01)
    assert not pool_threads()


def test_a_waiting_thread_holds_no_arrays() -> None:
    class Held:
        pass

    import weakref

    held = Held()
    watched = weakref.ref(held)
    with Pool(2) as pool:
        pool.run(lambda lo, hi, kept=held: time.sleep(0.01), even_parts(4, 4))  # type: ignore[misc]
        del held
        last = time.monotonic() + 20
        while watched() is not None and time.monotonic() < last:
            time.sleep(0.01)
        assert watched() is None


def test_the_current_pool_is_that_of_the_thread() -> None:
    seen = []
    with Pool(2) as pool, using(pool):
        assert current() is pool
        other = threading.Thread(target=lambda: seen.append(current()))
        other.start()
        other.join()
        with Pool(3) as inner, using(inner):
            assert current() is inner
        assert current() is pool
    assert current() is ALONE and seen == [ALONE]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 12), st.integers(1, 900), st.integers(1, 64))
def test_parts_cover_the_rows_in_order_from_multiples_on(
    rows: int, threads: int, grain: int, multiple: int
) -> None:
    parts = Pool(threads).parts(rows, grain, multiple)
    assert [row for lo, hi in parts for row in range(lo, hi)] == list(range(rows))
    assert all(lo % multiple == 0 and hi > lo for lo, hi in parts) and len(parts) <= threads
    assert len(parts) < 2 or rows >= len(parts) * grain


def test_a_pool_without_threads_or_with_absurdly_many_is_refused() -> None:
    for threads in (0, 4097):
        with pytest.raises(UsageError, match="wanted 1 to 4096"):
            Pool(threads)
